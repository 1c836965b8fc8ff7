"""Which row layout some models can take: chosen, applied, and checked on real pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from tbpo_cli.batch.layouts import LAYOUTS, PairBatch, collate
from tbpo_cli.data.tokens import TokenizedPair
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.attention import BY_SEQUENCE
from tbpo_cli.model.out_of_memory import refuse_as_answer
from tbpo_cli.model.probes import (
    WINDOWS,
    attention_of,
    carried_state,
    differ,
    evaluating,
    independent_length,
    probe_ids,
    set_attention,
    text_config,
)
from tbpo_cli.model.scoring import Scorer
from tbpo_cli.model.sharding import LanguageModel, backbone, causal_model

PADDED = "padded"


def choose_layout(models: Sequence[LanguageModel], wanted: str, longest: int) -> tuple[str, str]:
    """The row layout for some models, which are left as they are: see `apply_layout`.

    Args:
        models: that will read the same rows.
        wanted: "auto", or a name in LAYOUTS.
        longest: tokens of the longest sequence, prompt and response.

    Returns:
        The layout's name, and why it is that one.

    Raises:
        TbpoError: if a model cannot take the wanted layout, or reads the rows in no layout as it
            would read each sequence alone.
    """
    for model in models:
        bound = independent_length(model)
        if bound is not None and longest > bound:
            raise TbpoError(
                "past a length, the model's positions depend on the longest sequence of a batch",
                f"{type(causal_model(model)).__name__}: {bound:,} tokens; the longest sequence "
                f"has {longest:,}",
                "sequences within that length: a row's values then depend on no other row",
                f"data.max_length = {bound}",
            )
    if wanted == PADDED:
        return wanted, "as the recipe says"
    for model in models:
        if obstacle := _obstacle(model, longest):
            if wanted == "auto":
                return PADDED, obstacle
            raise _refused(wanted, obstacle)
    if wanted == "auto":
        return next(iter(LAYOUTS)), "every prompt is read once, nothing is padded"
    return wanted, "as the recipe says"


def _refused(wanted: str, obstacle: str) -> TbpoError:
    return TbpoError(
        f"the model cannot take rows of several sequences: {obstacle}",
        f"layout = {wanted!r}",
        "full causal attention through transformers' attention interface",
        'layout = "auto"',
    )


def apply_layout(models: Sequence[LanguageModel], layout: str) -> None:
    """Gives the models the attention that a layout needs."""
    if layout != PADDED:
        for model in models:
            set_attention(model, BY_SEQUENCE)


def take_back_layout(models: Sequence[LanguageModel]) -> None:
    """Gives the models back transformers' own attention, which `apply_layout` has replaced."""
    for model in models:
        if attention_of(model) == BY_SEQUENCE:
            set_attention(model, "sdpa")


def check_layout(scorer: Scorer, layout: str, pairs: Sequence[TokenizedPair]) -> str | None:
    """Compares real pairs in a layout with each of their sequences alone, by every whole model.

    Returns:
        What differs, in words; None if nothing does.
    """
    device = next(scorer.policy.model.parameters()).device
    together = collate(pairs, layout).to(device)
    # In the order of a batch's tokens: all chosen responses, then all rejected ones.
    sides = [(pair, pair.chosen_ids) for pair in pairs]
    sides += [(pair, pair.rejected_ids) for pair in pairs if len(pair.rejected_ids)]
    alone = [
        collate([replace(pair, chosen_ids=ids, rejected_ids=())], PADDED).to(device)
        for pair, ids in sides
    ]
    for view in scorer.policy.views:
        joint = scorer.view_logps(view, together)
        single = torch.cat([scorer.view_logps(view, batch) for batch in alone])
        if differ(joint, single, joint.dtype if scorer.is_exact else torch.bfloat16):
            gap = float((joint - single).abs().max())
            what = f"log-probabilities of its tokens differ by up to {gap:.2g} nats from those of"
            return f"{what} each sequence alone"
    return None


def confirm_layout(
    scorer: Scorer, layout: str, wanted: str, reason: str, pairs: Sequence[TokenizedPair]
) -> tuple[str, str]:
    """A layout that was chosen, after a check on real pairs: see `check_layout`.

    Args:
        layout, reason: from `choose_layout`.
        wanted: what the recipe asks for; with "auto", the rows are padded where the check fails.

    Returns:
        The layout, and why it is that one.

    Raises:
        TbpoError: if the check fails, and padding is no way out.
    """
    difference = check_layout(scorer, layout, pairs)
    if difference is None:
        return layout, reason
    if wanted == "auto" and layout != PADDED:
        take_back_layout(scorer.policy.models)
        return confirm_layout(scorer, PADDED, PADDED, f"in {layout} rows, {difference}", pairs)
    raise TbpoError(
        f"a row's values depend on its neighbours: in {layout} rows, {difference}",
        f"pairs {', '.join(pair.pair_id for pair in pairs)}",
        "the log-probabilities of each sequence alone",
        'layout = "padded"' if layout != PADDED else "train another base: this one reads padding",
    )


def _obstacle(model: LanguageModel, longest: int) -> str | None:
    """Why a model cannot attend by sequence; None if it can.

    What the architecture is decides first, then whether its code takes such rows and gives the same
    numbers.
    """
    config = text_config(model)
    windows = [size for name in WINDOWS if isinstance(size := getattr(config, name, None), int)]
    if windows and 0 < min(windows) < longest:
        what = f"its attention window of {min(windows):,} tokens is shorter than the longest"
        return f"{what} sequence, {longest:,}"
    if state := carried_state(model):
        return state
    causal = causal_model(model)
    implementation = attention_of(model)
    if implementation not in ("sdpa", BY_SEQUENCE):
        return f"its attention is {implementation}"
    with _attending_by_sequence(causal), evaluating(causal):
        return _difference(causal)


@contextmanager
def _attending_by_sequence(causal: LanguageModel) -> Iterator[None]:
    before = attention_of(causal)
    set_attention(causal, BY_SEQUENCE)
    try:
        yield
    finally:
        set_attention(causal, before)


def _difference(causal: LanguageModel) -> str | None:
    """What differs between one line of several sequences and a line for each, in words.

    1. Two made-up pairs in one packed line, and padded, have the same hidden states.
    2. Other tokens in one response of a packed line change nothing elsewhere.

    Of weights without numbers ("meta"), only whether the model's code takes such lines.
    """
    ids = probe_ids(causal, 30)
    pairs = [
        TokenizedPair("0", ids[:5], ids[5:11], ids[11:15]),
        TokenizedPair("1", ids[15:18], ids[18:20], ids[20:24]),
    ]
    changed = replace(pairs[0], chosen_ids=ids[24:30])
    weight = next(causal.parameters())
    batches = [
        collate(pairs, "shared_prompt").to(weight.device),
        collate(pairs, PADDED).to(weight.device),
        collate([changed, pairs[1]], "shared_prompt").to(weight.device),
    ]
    try:
        packed, alone, other = (_predicting(causal, batch) for batch in batches)
    except (TypeError, ValueError, AttributeError, IndexError):
        return "its attention takes no rows of several sequences, or adds more than a causal mask"
    except RuntimeError as error:
        refuse_as_answer(error)
        if weight.is_meta:  # its code asks for numbers, as routers do
            return None
        return "its attention takes no rows of several sequences"
    if weight.is_meta:
        return None
    if differ(packed, alone, causal.dtype):
        return "in one row with others, a sequence has other hidden states than alone"
    rest = slice(len(changed.chosen_ids), None)  # the first are the predictors of what was changed
    if differ(other[rest], packed[rest], causal.dtype):
        return "in one row with others, a sequence's hidden states depend on the others"
    return None


def _predicting(causal: LanguageModel, batch: PairBatch) -> torch.Tensor:
    """(N, H): the hidden states that predict the response tokens of a batch."""
    states = backbone(causal)(**batch.model_inputs).last_hidden_state
    return states.flatten(0, 1)[batch.predictor].float()  # type: ignore[no-any-return]
