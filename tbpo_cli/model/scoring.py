"""PairBatch → PairScores: two passes through the model, and one gather of the positions that predict a response."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tbpo_cli.batch.layouts import PairBatch, SideBatch
from tbpo_cli.core import oracle
from tbpo_cli.core.baseline import StateBaseline
from tbpo_cli.core.head import (
    CHUNK_TOKENS,
    DIAGNOSTICS,
    REFERENCE_FREE,
    STATISTICS,
    Head,
    token_statistics,
    uses_identity,
)
from tbpo_cli.core.losses import importance_weights
from tbpo_cli.core.types import PairScores, SideScores
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.load import NEGATIVE, POLICY, POSITIVE, REFERENCE, Policy
from tbpo_cli.model.sharding import LanguageModel, causal_model, gathered


@dataclass(frozen=True)
class Scorer:
    """Computes, for a batch of pairs, the statistics that a loss needs, and no others.

    Args:
        policy: the model and the frozen ones beside it.
        heads: the output head by view (the policy's own under POLICY); None for a head that `core/head.py` does not
            know: the oracle then works from the model's own logits.
        baseline: b_φ, for losses that need `state_baseline`.
    """

    policy: Policy
    heads: dict[str, Head | None]
    baseline: StateBaseline | None = None

    @classmethod
    def of(cls, policy: Policy, baseline: StateBaseline | None = None) -> Scorer:
        """Reads the heads. Raises TbpoError if a baseline is given, but the policy's head is unknown."""
        compute = (
            policy.autocast if policy.is_sharded else None
        )  # weights are cast as they are gathered
        own = read_head(policy.model, compute)
        if baseline is not None and own is None:
            raise TbpoError(
                "the state baseline needs a model with a linear output head",
                "align.loss",
                "logits that are a linear function of the last hidden state",
                "take a loss without a baseline: align.loss.name = tbpo_a",
            )
        views: dict[str, Head | None] = dict.fromkeys((POLICY, REFERENCE, *policy.adapters), own)
        return cls(
            policy,
            views | {name: read_head(model, compute) for name, model in policy.frozen.items()},
            baseline,
        )

    def describe(self, needs: frozenset[str]) -> str:
        """How the statistics in `needs` are computed, and why so."""
        head, statistics = self.heads[POLICY], needs & STATISTICS
        if head is None:
            return "dense logits: the output head is no linear layer"
        if statistics == {"advantage"} and uses_identity(head, self.heads.get(REFERENCE)):
            return "no policy logits: policy and reference have one frozen, linear head"
        why = "the head's logits are capped" if head.softcap else "the head is trained"
        why = why if statistics == {"advantage"} else "the loss reads log π_θ"
        return f"logits of {CHUNK_TOKENS} response tokens at a time: {why}"

    def score(
        self,
        batch: PairBatch,
        needs: frozenset[str],
        diagnostics: bool = False,
        reference_logps: Tensor | None = None,
        view: str = POLICY,
    ) -> PairScores:
        """Scores of a batch on its device.

        Args:
            needs: fields of SideScores, computed with gradients (those in STATISTICS and `state_baseline`) or
                without (`weights`).
            diagnostics: compute the other DIAGNOSTICS as well, exactly and without gradients; without a reference,
                those that need none.
            reference_logps: (N,) log π_ref of the batch's tokens, if it is known: the reference is then not run. Only
                without diagnostics, and for `needs` within `from_reference_logps`.
            view: a frozen model of the policy's, in whose place it is scored, without gradients.
        """
        statistics = needs & STATISTICS
        if reference_logps is not None:
            statistics = statistics - {"log_ratio"} | {"logps"}
        extra: frozenset[str] = frozenset()
        if diagnostics:
            extra = DIAGNOSTICS - statistics
            if not self.policy.has_reference:
                extra &= REFERENCE_FREE
        reference = None if statistics | extra <= REFERENCE_FREE else self._view(REFERENCE, batch)
        columns = {}
        if "weights" in needs:
            columns["weights"] = self.view_logps(POSITIVE, batch) - self.view_logps(NEGATIVE, batch)
        own = view == POLICY
        states = (
            self._states(self.policy.model, batch, self.heads[POLICY])
            if own
            else self._view(view, batch)
        )
        columns |= self._statistics(statistics, batch, view, states, reference)
        if reference_logps is not None:
            columns["log_ratio"] = columns["logps"] - reference_logps
        if extra:
            with torch.no_grad():
                columns |= self._statistics(extra, batch, view, states.detach(), reference)
        if "state_baseline" in needs:
            assert self.baseline is not None
            columns["state_baseline"] = self.baseline(states)
        scores = _to_sides(columns, batch)
        return _with_importance(scores) if "weights" in needs else scores

    def view_logps(self, view: str, batch: PairBatch) -> Tensor:
        """log-probabilities of the batch's tokens by a frozen model of the policy's, (N,), on the batch's device."""
        return self._statistics(frozenset({"logps"}), batch, view, self._view(view, batch))["logps"]

    def _view(self, name: str, batch: PairBatch) -> Tensor:
        with self.policy.view(name) as model:
            return self._states(model, batch, self.heads[name])

    def _states(self, model: LanguageModel, batch: PairBatch, head: Head | None) -> Tensor:
        """What predicts each response token, chosen tokens first: hidden states (N, H), or logits without a head."""
        dtype = self.policy.autocast
        with torch.autocast(batch.tokens.device.type, dtype, enabled=dtype is not None):
            states = (
                model(**batch.model_inputs).logits
                if head is None
                else _hidden_states(model, batch.model_inputs)
            )
        return states.flatten(0, 1)[batch.predictor]

    def _statistics(
        self,
        needs: frozenset[str],
        batch: PairBatch,
        view: str,
        states: Tensor,
        reference: Tensor | None = None,
    ) -> dict[str, Tensor]:
        tokens = batch.tokens
        head, reference_head = self.heads[view], self.heads.get(REFERENCE)
        if head is not None:
            same, head = head is reference_head, _gathered_head(head)
            if same or reference is None:
                reference_head = head
            else:
                assert reference_head is not None
                reference_head = _gathered_head(reference_head)
            computed = token_statistics(needs, tokens, states, head, reference, reference_head)
        else:
            everything = torch.ones(1, len(tokens), dtype=torch.bool, device=tokens.device)
            logits = states if reference is None else reference
            computed = oracle.side_scores(
                states.float()[None], logits.float()[None], tokens[None], everything
            )
        return {name: getattr(computed, name).reshape(-1) for name in needs}


def from_reference_logps(needs: frozenset[str]) -> bool:
    """Whether log π_ref of the data's tokens is all that a loss takes from the reference."""
    return needs & STATISTICS - REFERENCE_FREE == {"log_ratio"}


def _with_importance(scores: PairScores) -> PairScores:
    """The helpers' log-ratios, in `weights`, made into TIS-DPO's weights: they count against a rejected token."""

    def weighted(side: SideScores, sign: int) -> SideScores:
        assert side.weights is not None
        return replace(side, weights=importance_weights(sign * side.weights, side.mask))

    return PairScores(weighted(scores.chosen, 1), weighted(scores.rejected, -1))


def _to_sides(columns: dict[str, Tensor], batch: PairBatch) -> PairScores:
    """(N,) statistics, chosen tokens first, as (B, T) of the two sides."""

    def side(of: SideBatch, part: int) -> SideScores:
        scattered = {
            name: values.new_zeros(of.mask.numel())
            .scatter(0, of.slots, values.split(lengths)[part])
            .view_as(of.mask)
            for name, values in columns.items()
        }
        return SideScores(mask=of.mask, **scattered)

    lengths = [len(batch.chosen.slots), len(batch.rejected.slots)]
    return PairScores(side(batch.chosen, 0), side(batch.rejected, 1))


def _hidden_states(model: LanguageModel, rows: dict[str, Any]) -> Tensor:
    """(R, L, H): what the output head reads."""
    causal = causal_model(model)
    states: Tensor = getattr(causal, "sharded_backbone", causal.base_model)(
        **rows
    ).last_hidden_state
    return states


def _gathered_head(head: Head) -> Head:
    return replace(head, weight=gathered(head.weight), bias=gathered(head.bias))


def read_head(model: LanguageModel, compute: torch.dtype | None = None) -> Head | None:
    """What the model's output head can do, checked against the model's own logits; None if it is something else.

    Weights without numbers ("meta") are not checked.

    Args:
        compute: the dtype that the model's own logits are computed in; None: that of the head's weight.
    """
    causal = causal_model(model)
    config, linear = causal.config.get_text_config(), causal.get_output_embeddings()
    if getattr(type(linear), "forward", None) is not nn.Linear.forward:
        return _unknown_head(f"it is a {type(linear).__name__}")
    head = Head(
        weight=linear.weight,
        bias=linear.bias,
        scale=(getattr(config, "logit_scale", None) or 1.0)
        / (getattr(config, "logits_scaling", None) or 1.0),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    if linear.weight.is_meta:
        return head
    rows = {
        "input_ids": torch.arange(1, 9, device=linear.weight.device)[None] % config.vocab_size,
        "use_cache": False,
    }
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**rows).logits[0].float()
        rebuilt = _gathered_head(head).logits(_hidden_states(model, rows)[0]).float()
    model.train(was_training)
    tolerance = (
        0.02 if (compute or linear.weight.dtype) in (torch.bfloat16, torch.float16) else 1e-4
    )
    if (logits - rebuilt).abs().max() > tolerance * (1 + logits.abs().max()):
        return _unknown_head("its logits are not those of a linear layer on the last hidden state")
    return head


def _unknown_head(reason: str) -> Head | None:
    logging.getLogger("tbpo").warning(
        "the output head is unknown (%s): scoring falls back to dense logits", reason
    )
    return None
