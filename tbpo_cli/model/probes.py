"""What a model is, as far as rows and samples depend on it: read from its modules, or tried."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tbpo_cli.errors import TbpoError
from tbpo_cli.model.out_of_memory import refuse_as_answer
from tbpo_cli.model.sharding import LanguageModel, causal_model, text_decoder

PROBE_TOKENS = 12
CHANGED_TOKENS = 4
SHOWN_KEYS = 6
# Relative distances of hidden states or logits that are the same but for rounding.
SAME_IN_FP32 = 1e-4
SAME_IN_TF32 = 2e-3  # of products in fp32 on a GPU
SAME_IN_HALF = 0.05
# `layer_types` of a config whose layers pass nothing along but by attention over earlier tokens.
ATTENDING = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
# Models whose own code refuses gradients outside the training mode (reversible layers).
ONLY_WITH_DROPOUT = frozenset({"reformer"})
# Parts of the names of what a model has for images or sound.
NOT_TEXT = ("vision", "visual", "audio", "image", "speech", "multi_modal", "vqmodel")
# Names of a config's settings for "attends no further back than".
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")


def text_config(model: LanguageModel) -> Any:
    """The config of a model's language part."""
    return causal_model(model).config.get_text_config()


def attention_of(model: LanguageModel) -> str:
    """The name of the attention of a model's language part."""
    return str(text_config(model)._attn_implementation)


def set_attention(model: LanguageModel, name: str) -> None:
    """Gives a model's language part another attention; what it has for images or sound keeps its
    own, which may know no other.
    """
    causal = causal_model(model)
    parts = [
        part
        for part in getattr(causal.config, "sub_configs", None) or {}
        if getattr(causal.config, part, None) is text_config(model)
    ]
    causal.set_attn_implementation({parts[0]: name} if parts else name)


@contextlib.contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """A model in evaluation mode, without gradients, within the context."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in in_training:
            module.training = True


def probe_ids(model: LanguageModel, count: int = PROBE_TOKENS, start: int = 0) -> list[int]:
    """Token ids of the model's vocabulary, none of them rare or special by intent."""
    size = text_config(model).vocab_size
    return [(7 * number + 5) % size for number in range(start, start + count)]


def differ(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two results of a model differ by more than rounding in the dtype of its products."""
    if dtype in (torch.bfloat16, torch.float16):
        within = SAME_IN_HALF
    else:
        within = SAME_IN_TF32 if one.is_cuda else SAME_IN_FP32
    distance = (one.float() - other.float()).norm()
    return not bool(distance <= within * other.float().norm())


def check_causality(model: LanguageModel, source: str) -> None:
    """Refuses a model that is not causal: one in which a later token changes an earlier logit.

    Also one whose logits are not finite, or that cannot be trained without its own dropout. Weights
    without numbers ("meta") are not tried: of those, only what the architecture tells is refused.

    Raises:
        TbpoError: for such a model, and for one that cannot be called with tokens alone.
    """
    where = f"model.base = {source!r}"
    fix = "take a decoder, such as those that AutoModelForCausalLM is made for"
    kind = getattr(causal_model(model).config, "model_type", "")
    if kind in ONLY_WITH_DROPOUT:
        what = f"the model cannot be trained: {kind} computes gradients with its own dropout only"
        raise TbpoError(what, where, "a causal language model of text", fix)
    weight = next(model.parameters())
    if weight.is_meta:
        return
    ids = probe_ids(model)
    changed = ids[:-CHANGED_TOKENS] + probe_ids(model, CHANGED_TOKENS, start=PROBE_TOKENS + 1)
    found = []
    try:
        with evaluating(model):
            for row in (ids, changed):
                inputs = torch.tensor([row], device=weight.device)
                logits = model(input_ids=inputs, use_cache=False).logits
                found.append(logits[0, :-CHANGED_TOKENS])
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        refuse_as_answer(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"the model cannot be called with the tokens of a text alone: {reason}"
        raise TbpoError(what, where, "a causal language model of text", fix) from error
    if not all(logits.isfinite().all() for logits in found):
        _refuse_no_numbers(model, where)
    if differ(found[0], found[1], weight.dtype):
        what = f"the model is not causal: in {type(causal_model(model)).__name__} a token sees"
        expected = "a causal language model: a token's distribution depends on earlier tokens alone"
        raise TbpoError(f"{what} later ones", where, expected, fix)


def _refuse_no_numbers(model: LanguageModel, where: str) -> None:
    """Raises TbpoError for logits that are infinite or no numbers, with the tensors at fault."""
    causal = causal_model(model)
    faulty = [name for name, tensor in causal.named_parameters() if not _is_finite(tensor)]
    if faulty:
        more = f" and {len(faulty) - SHOWN_KEYS} more" if len(faulty) > SHOWN_KEYS else ""
        what = f"weights are infinite or no numbers (NaN): {', '.join(faulty[:SHOWN_KEYS])}{more}"
        fix = "copy or download the checkpoint again; if it is your own, the training diverged"
        raise TbpoError(what, where, "finite weights", fix)
    raise TbpoError(
        f"the logits of a short text are infinite or no numbers (NaN) in {causal.dtype}",
        where,
        "finite logits",
        'model.dtype = "float32" or "bfloat16", or another base',
    )


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def carried_state(model: LanguageModel) -> str | None:
    """What a model passes from token to token besides attention, in words; None if nothing.

    Read from what the architecture is: its own mark for a recurrent state, the types of its layers,
    and convolutions over time.
    """
    causal = causal_model(model)
    if getattr(causal, "_is_stateful", False):
        return "it carries a recurrent state from token to token"
    others = set(getattr(text_config(model), "layer_types", None) or ()) - ATTENDING
    if others:
        return f"it has layers of the type {', '.join(sorted(others))}"
    if any(isinstance(module, nn.Conv1d) for module in text_decoder(model).modules()):
        return "it has convolutions over the tokens of a row"
    return None


def rope_tables(model: LanguageModel) -> list[dict[str, Any]]:
    """The settings of a model's rotary positions: one table, or one for each type of layer."""
    parameters = getattr(text_config(model), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def independent_length(model: LanguageModel) -> int | None:
    """The longest sequence up to which a row's positions do not depend on its neighbours.

    With rope_type "dynamic" and "longrope" the frequencies are chosen by the longest sequence of a
    batch, once it is longer than this. None: they never depend on it.
    """
    bounds = [bound for _, bound in _bounds_of_rope(model)]
    return min(bounds) if bounds else None


def positions_change(model: LanguageModel, start: int, end: int) -> bool:
    """Whether earlier tokens get other positions while a sequence grows.

    With rope_type "dynamic" every token past the bound changes the frequencies of all, with
    "longrope" the one that crosses it: keys that were computed before do not belong to them.

    Args:
        start, end: tokens of the sequence at the first pass and at the last one.
    """
    return any(
        end > bound and (kind == "dynamic" or start <= bound)
        for kind, bound in _bounds_of_rope(model)
    )


def _bounds_of_rope(model: LanguageModel) -> list[tuple[str, int]]:
    """The types of positions that depend on the length, and the length up to which they do not."""
    config = text_config(model)
    return [
        (
            table["rope_type"],
            int(table.get("original_max_position_embeddings") or config.max_position_embeddings),
        )
        for table in rope_tables(model)
        if table.get("rope_type") in ("dynamic", "longrope")
    ]


def num_positions(model: LanguageModel) -> int | None:
    """How many positions a model has in a table, learned or computed; None if it has no such table.

    Found by name: an embedding or a buffer for positions of text, with a line for each.
    """
    causal = causal_model(model)
    tables: list[int] = []
    for name, tensor in [*causal.named_parameters(), *causal.named_buffers()]:
        owner = ".".join(name.split(".")[-2:]).lower()
        is_for_positions = any(
            word in owner for word in ("wpe", "embed_pos", "position_emb", "pos_")
        )
        is_of_text = not any(word in name for word in NOT_TEXT)
        if tensor.ndim == 2 and is_for_positions and is_of_text and "rel" not in owner:
            tables.append(tensor.shape[0])
    if not tables:
        return None
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return min([*tables, limit]) if isinstance(limit, int) else min(tables)


def check_positions(models: list[LanguageModel], length: int, where: str, fix: str) -> None:
    """Refuses sequences that are longer than the positions that a model has.

    Args:
        length: tokens of the longest sequence.
        where, fix: the parts of the error that depend on who asks; {limit} in them is the number of
            positions.

    Raises:
        TbpoError: if one of the models has fewer positions.
    """
    limits = [limit for model in models if (limit := num_positions(model)) is not None]
    if limits and length > min(limits):
        limit = min(limits)
        raise TbpoError(
            f"the model has {limit:,} positions, and a sequence would have {length:,} tokens",
            where.format(limit=limit),
            f"at most {limit:,} tokens, prompt and response",
            fix.format(limit=limit),
        )


def reads_padding(model: LanguageModel) -> str | None:
    """Why samples of a model depend on padding on the left, in words; None if they do not.

    The architecture tells of states and of positions that depend on the batch; what it does not
    tell is tried, with the way that `generate` pads.
    """
    if state := carried_state(model):
        return state
    if independent_length(model) is not None:
        return "its positions depend on the longest sequence of a batch"
    causal = causal_model(model)
    device = next(causal.parameters()).device
    ids = probe_ids(model)
    logits = []
    try:
        with evaluating(model):
            for padding in (0, 5):
                mask = torch.tensor([[0] * padding + [1] * len(ids)], device=device)
                inputs = torch.tensor([ids[:1] * padding + ids], device=device)
                step = causal.prepare_inputs_for_generation(
                    inputs, attention_mask=mask, use_cache=False, is_first_iteration=True
                )
                step = {name: value for name, value in step.items() if value is not None}
                logits.append(causal(**step).logits[0, -1])
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        refuse_as_answer(error)
        return "its code takes no padding on the left"
    if differ(logits[1], logits[0], causal.dtype):
        return "its logits change with padding on the left"
    return None
