"""PairBatch → PairScores: a pass of each model, and a gather of what predicts the responses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tbpo_cli.batch.layouts import PairBatch, SideBatch
from tbpo_cli.core import oracle
from tbpo_cli.core.baseline import StateBaseline
from tbpo_cli.core.head import (
    CHUNK_TOKENS,
    CHUNK_TOKENS_ON_GPU,
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
from tbpo_cli.model.heads import gathered_head, hidden_states, read_head
from tbpo_cli.model.policy import GUIDE, NEGATIVE, POLICY, POSITIVE, REFERENCE, Policy
from tbpo_cli.model.sharding import LanguageModel


@dataclass(frozen=True)
class Scorer:
    """Computes, for a batch of pairs, the statistics that a loss needs, and no others.

    Args:
        policy: the model and the frozen ones beside it.
        heads: the output head by view (the policy's own under POLICY); None for a head that
            `core/head.py` does not know: the oracle then works from the model's own logits.
        baseline: b_φ, for losses that need `state_baseline`.
    """

    policy: Policy
    heads: dict[str, Head | None]
    baseline: StateBaseline | None = None

    @classmethod
    def of(cls, policy: Policy, baseline: StateBaseline | None = None) -> Scorer:
        """Reads the heads.

        Raises:
            TbpoError: if a baseline is given, but the policy's head is unknown.
        """
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

    @property
    def is_exact(self) -> bool:
        """Whether products are computed in fp32."""
        dtype = self.policy.autocast or next(self.policy.model.parameters()).dtype
        return dtype not in (torch.bfloat16, torch.float16)

    def describe(self, needs: frozenset[str]) -> str:
        """How the statistics in `needs` are computed, and why so."""
        head = self.heads[POLICY]
        statistics = needs & STATISTICS
        if head is None:
            return "dense logits: the output head is no linear layer"
        if statistics == {"advantage"} and uses_identity(head, self.heads.get(REFERENCE)):
            return "no policy logits: policy and reference have one frozen, linear head"
        why = "the head's logits are capped" if head.softcap else "the head is trained"
        why = why if statistics == {"advantage"} else "the loss reads log π_θ"
        on_gpu = "" if head.frozen else f" ({CHUNK_TOKENS_ON_GPU:,} on a GPU)"
        return f"logits of {CHUNK_TOKENS} response tokens at a time{on_gpu}: {why}"

    def score(
        self, batch: PairBatch, needs: frozenset[str], reference_logps: Tensor | None = None
    ) -> PairScores:
        """What a loss needs of a batch on its device, with gradients.

        Args:
            needs: fields of SideScores. Those in STATISTICS and `state_baseline` have gradients,
                `weights` has none.
            reference_logps: (N,) log π_ref of the batch's tokens, if it is known: the reference is
                then not run. Only for `needs` with `from_reference_logps`.
        """
        statistics = self._read(needs)
        if reference_logps is not None:
            statistics = statistics - {"log_ratio"} | {"logps"}
        reference = self._reference_states(statistics, batch)
        states = self._policy_states(batch)
        columns = self._statistics(statistics, batch, POLICY, states, reference)
        if reference_logps is not None:
            columns["log_ratio"] = columns["logps"] - reference_logps
        return self._completed(columns, needs, batch, states)

    def score_and_measure(self, batch: PairBatch, needs: frozenset[str]) -> PairScores:
        """As `score`, and all other DIAGNOSTICS as well, exactly and without gradients.

        Without a reference, those that need none.
        """
        statistics = self._read(needs)
        measured = self._diagnostics - statistics
        reference = self._reference_states(statistics | measured, batch)
        states = self._policy_states(batch)
        columns = self._statistics(statistics, batch, POLICY, states, reference)
        with torch.no_grad():
            columns |= self._statistics(measured, batch, POLICY, states.detach(), reference)
        return self._completed(columns, needs, batch, states)

    def measure(self, batch: PairBatch, needs: frozenset[str], view: str) -> PairScores:
        """Statistics of a view of the policy, without gradients."""
        with torch.no_grad():
            reference = self._reference_states(needs, batch)
            states = self._view_states(view, batch)
            return _to_sides(self._statistics(needs, batch, view, states, reference), batch)

    def view_logps(self, view: str, batch: PairBatch) -> Tensor:
        """Log-probabilities of the batch's tokens by a view of the policy: (N,), on its device."""
        states = self._view_states(view, batch)
        return self._statistics(frozenset({"logps"}), batch, view, states)["logps"]

    @property
    def _diagnostics(self) -> frozenset[str]:
        return DIAGNOSTICS if self.policy.has_reference else DIAGNOSTICS & REFERENCE_FREE

    def _completed(
        self, columns: dict[str, Tensor], needs: frozenset[str], batch: PairBatch, states: Tensor
    ) -> PairScores:
        """The scores of both sides, with what is not a statistic of policy and reference."""
        if "weights" in needs and self._is_guided:
            reference_logps = (columns["logps"] - columns["log_ratio"]).detach()
            columns["weights"] = self.view_logps(GUIDE, batch) - reference_logps
        elif "weights" in needs:
            columns["weights"] = self.view_logps(POSITIVE, batch) - self.view_logps(NEGATIVE, batch)
        if "state_baseline" in needs:
            assert self.baseline is not None
            columns["state_baseline"] = self.baseline(states)
        scores = _to_sides(columns, batch)
        return _with_importance(scores) if "weights" in needs and not self._is_guided else scores

    @property
    def _is_guided(self) -> bool:
        """Whether the weights of tokens are the guidance of one helper, as TGDPO's."""
        return GUIDE in self.policy.views

    def _read(self, needs: frozenset[str]) -> frozenset[str]:
        """The statistics to compute: log π_θ as well where it leads to log π_ref of a guidance."""
        needs_reference_logps = "weights" in needs and self._is_guided
        return needs & STATISTICS | (frozenset({"logps"}) if needs_reference_logps else frozenset())

    def _reference_states(self, needs: frozenset[str], batch: PairBatch) -> Tensor | None:
        return None if needs <= REFERENCE_FREE else self._view_states(REFERENCE, batch)

    def _policy_states(self, batch: PairBatch) -> Tensor:
        return self._states(self.policy.model, batch, self.heads[POLICY])

    def _view_states(self, name: str, batch: PairBatch) -> Tensor:
        with self.policy.view(name) as model:
            return self._states(model, batch, self.heads[name])

    def _states(self, model: LanguageModel, batch: PairBatch, head: Head | None) -> Tensor:
        """What predicts each response token: hidden states (N, H), or logits without a head."""
        dtype = self.policy.autocast
        with torch.autocast(batch.tokens.device.type, dtype, enabled=dtype is not None):
            states = (
                model(**batch.model_inputs).logits
                if head is None
                else hidden_states(model, batch.model_inputs)
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
        head = self.heads[view]
        reference_head = self.heads.get(REFERENCE)
        if head is not None:
            same = head is reference_head
            head = gathered_head(head)
            if same or reference is None:
                reference_head = head
            else:
                assert reference_head is not None
                reference_head = gathered_head(reference_head)
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
    """The helpers' log-ratios, in `weights`, made into TIS-DPO's weights.

    They count against a rejected token.
    """

    def weighted(side: SideScores, sign: int) -> SideScores:
        assert side.weights is not None
        return replace(side, weights=importance_weights(sign * side.weights, side.mask))

    chosen, rejected = weighted(scores.chosen, 1), weighted(scores.rejected, -1)
    return replace(scores, chosen=chosen, rejected=rejected)


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
    return PairScores(side(batch.chosen, 0), side(batch.rejected, 1), batch.pair_weights)
