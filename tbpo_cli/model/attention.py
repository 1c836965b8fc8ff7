"""Attention within the sequences of a packed line: varlen attention, without padding or a mask."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tbpo_cli.batch.packing import Segments, Sequences, segments_of
from tbpo_cli.model.out_of_memory import refuse_as_answer

BY_SEQUENCE = "tbpo_by_sequence"
# Options of an attention that the varlen kernel does not have.
NOT_IN_VARLEN = ("dropout", "softcap", "position_bias", "s_aux")
# torch 2.11 has no such option: there keys and values are repeated.
HAS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend_by_sequence(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    sequences: Sequences | None = None, segments: Segments | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each sequence of a packed line; nothing is computed across them.

    On a GPU in half precision one varlen kernel computes all sequences (FlashAttention, over
    `cu_seqlens` of queries and keys, with a bottom-right aligned causal mask), if it agrees there
    with the way that is taken elsewhere: a call of torch's fused attention for each sequence.

    Args:
        query: (1, heads, L, head size); key and value may have fewer heads.
        attention_mask: used for lines of one sequence each only.
        sequences: what sees what in the line; None for lines of one sequence each.
        segments: the same for the varlen kernel, on the device.
        options: of transformers' attention functions: scaling, dropout, ….

    Returns:
        (1, L, heads, head size), and no attention weights.
    """
    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value = _as_autocast(query, key, value)
    plain = not any(options.get(name) for name in NOT_IN_VARLEN)
    if segments is not None and plain and query.is_cuda and not varlen_fault(
        query.dtype, query.shape[1], key.shape[1], query.shape[3]
    ):  # fmt: skip
        return in_one_kernel(query, key, value, segments, options.get("scaling")), None
    return one_by_one(module, query, key, value, sequences, **options), None


def _as_autocast(*states: Tensor) -> list[Tensor]:
    """Queries, keys and values in the dtype of autocast, if that is on.

    Rotary positions in fp32 leave queries and keys in fp32, beside values in bf16; the varlen
    kernel takes none but half precision.
    """
    device = states[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return [*states]
    dtype = torch.get_autocast_dtype(device)
    return [each.to(dtype) for each in states]


def describe_attention(
    models: Sequence[Any], dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """How attention over packed lines is computed there, and what the fast way is wanting.

    It tries the varlen kernel for all layers' shapes: what it finds is kept for the passes.

    Args:
        models: transformers' models, whose attention is BY_SEQUENCE.
        dtype: of the matrix products.
    """
    each_call = "a call of torch's fused attention for each sequence"
    if device.type != "cuda":
        return each_call, ""
    for heads, key_heads, size in sorted(set(map(_head_shape, models))):
        if fault := varlen_fault(dtype, heads, key_heads, size):
            return each_call, fault
    return "one varlen kernel for all sequences of a row", ""


def _head_shape(model: Any) -> tuple[int, int, int]:
    """(heads, key-value heads, size of a head) of a model, from its config."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, key_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def one_by_one(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    **options: Any,
) -> Tensor:
    """One call of torch's fused attention for each sequence.

    1. A sequence that continues another one is attended together with it: the queries and keys of
       the prompt, then its own, are plain causal attention.
    2. The prompt's outputs come with the first sequence that continues it.
    3. The outputs are put back in the order of the line.
    """
    parts = [states.split(sequences.lengths, dim=2) for states in (query, key, value)]
    attended: dict[int, Tensor] = {}
    for number, prefix in enumerate(sequences.continues):
        own = [states[number] for states in parts]
        if number != prefix:
            own = [
                torch.cat((states[prefix], part), dim=2)
                for states, part in zip(parts, own, strict=True)
            ]
        elif number in sequences.continues[number + 1 :]:
            continue  # step 2
        result, _ = sdpa_attention_forward(
            module, own[0], own[1], own[2], None, is_causal=True, **options
        )
        if number != prefix:
            before, result = result.split(
                (sequences.lengths[prefix], sequences.lengths[number]), dim=1
            )
            attended.setdefault(prefix, before)
        attended[number] = result
    return torch.cat([attended[number] for number in range(len(sequences.lengths))], dim=1)


def in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None
) -> Tensor:
    """All sequences of a line in one call: see `Segments` for the queries and keys of each."""
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    grouped: Any = {"enable_gqa": True} if groups > 1 else {}
    if groups > 1 and not HAS_GROUPS:
        grouped = {}
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    if segments.repeats_keys:  # backward, `index_select` adds without sorting the index first
        key, value = (states.index_select(0, segments.key_index) for states in (key, value))
    attended = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.max_seqlen_q,
        segments.max_seqlen_k,
        scale=scale,
        window_size=(-1, 0),  # causal
        **grouped,
    )
    return cast(Tensor, attended)[None]


@functools.cache
def varlen_fault(dtype: torch.dtype, heads: int, key_heads: int, size: int) -> str:
    """Why the varlen kernel is not taken on this GPU, in words; "" if it is right here.

    Its outputs and gradients on a small line are compared with those of a call for each sequence.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the varlen kernel takes half precision alone, and products are in {dtype}"
    sequences = Sequences((5, 3, 4, 2, 6), (0, 0, 0, 3, 3))
    segments = segments_of(sequences).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, count, sum(sequences.lengths), size) for count in (heads, key_heads, key_heads)]
    states = [
        torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for shape in shapes
    ]
    module = nn.Module()
    vars(module)["num_key_value_groups"] = heads // key_heads  # as transformers' layers have it

    def with_gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        query, key, value = leaves = [each.clone().requires_grad_() for each in states]
        result = attend(query, key, value)
        return [result, *torch.autograd.grad(result.float().square().sum(), leaves)]

    try:
        with torch.enable_grad():
            wanted = with_gradients(
                lambda query, key, value: one_by_one(module, query, key, value, sequences)
            )
            found = with_gradients(
                lambda query, key, value: in_one_kernel(query, key, value, segments, None)
            )
    except (RuntimeError, TypeError, ValueError) as error:
        refuse_as_answer(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"the varlen kernel does not take {heads} heads of size {size} here: {reason}"
    agrees = all(
        torch.allclose(a, b, rtol=0.05, atol=0.05) for a, b in zip(found, wanted, strict=True)
    )
    return "" if agrees else "the varlen kernel gives other numbers here"


AttentionInterface.register(BY_SEQUENCE, attend_by_sequence)
