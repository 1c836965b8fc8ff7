"""Attention over rows of several sequences, and which row layout a model can take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tbpo_cli.batch.layouts import LAYOUTS, collate
from tbpo_cli.batch.packing import Segments, Sequences, segments_of
from tbpo_cli.data.tokens import TokenizedPair
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.sharding import LanguageModel, causal_model

BY_SEQUENCE = "tbpo_by_sequence"
MORE_THAN_PLAIN = (
    "dropout",
    "softcap",
    "position_bias",
    "s_aux",
)  # options of an attention that the one kernel lacks
WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
)  # the config's names for "sees no further back than"


def attend_by_sequence(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    sequences: Sequences | None = None, segments: Segments | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each sequence of a row: no mask, no padding, nothing computed across.

    On a GPU in half precision all sequences go through one kernel, FlashAttention's for sequences of many lengths, if
    it agrees there with the way that is taken elsewhere: a call of torch's fused attention for each of them.

    Args:
        query: (1, heads, L, head size); key and value may have fewer heads.
        sequences: what sees what in the row; None for rows of one sequence each.
        segments: the same for the one kernel, on the device.

    Returns:
        (1, L, heads, head size), and no attention weights.
    """
    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    plain = not any(options.get(name) for name in MORE_THAN_PLAIN)
    if segments is not None and plain and query.is_cuda and _one_kernel_agrees(
        query.dtype, query.shape[1], key.shape[1], query.shape[3]
    ):  # fmt: skip
        return in_one_kernel(query, key, value, segments, options.get("scaling")), None
    return one_by_one(module, query, key, value, sequences, **options), None


def one_by_one(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    **options: Any,
) -> Tensor:
    """A sequence that continues another one is attended together with it: the kernel sees a plain causal square."""
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
            continue  # its own outputs come with the first sequence that continues it
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
    query: Tensor, key: Tensor, value: Tensor, of: Segments, scale: float | None
) -> Tensor:
    """All sequences of a row in one call of torch's varlen attention, which needs a GPU."""
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    grouped: Any = (
        {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    )  # which torch 2.11 does not know
    attended = varlen_attn(
        query.contiguous(), key[of.key_index], value[of.key_index], of.cu_seqlens_q, of.cu_seqlens_k, of.max_seqlen_q, of.max_seqlen_k,
        scale=scale, window_size=(-1, 0), **grouped,
    )  # fmt: skip
    return cast(Tensor, attended)[None]


@functools.cache
def _one_kernel_agrees(dtype: torch.dtype, heads: int, key_heads: int, size: int) -> bool:
    """Whether the one kernel takes such states, and gives the outputs and gradients of the other way on a small row."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
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
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ):  # not on this device, not by this torch, or not for such heads
        return False
    return all(
        torch.allclose(a, b, rtol=0.05, atol=0.05) for a, b in zip(found, wanted, strict=True)
    )


AttentionInterface.register(BY_SEQUENCE, attend_by_sequence)


def choose_layout(models: Iterable[LanguageModel], wanted: str, longest: int) -> tuple[str, str]:
    """The row layout for some models, which are made ready for it.

    Args:
        models: that will read the same rows.
        wanted: "auto", or a name in LAYOUTS.
        longest: tokens of the longest sequence, prompt and response.

    Returns:
        The layout's name, and why it is that one.

    Raises:
        TbpoError: if a model cannot take the wanted layout.
    """
    if wanted == "padded":
        return wanted, "as the recipe says"
    for model in models:
        if obstacle := _obstacle(model, longest):
            if wanted == "auto":
                return "padded", obstacle
            raise TbpoError(
                f"the model cannot take rows of several sequences: {obstacle}",
                f"layout = {wanted!r}",
                "full causal attention through transformers' attention interface",
                'layout = "auto"',
            )
    if wanted == "auto":
        return next(iter(LAYOUTS)), "every prompt is read once, nothing is padded"
    return wanted, "as the recipe says"


def _obstacle(model: LanguageModel, longest: int) -> str | None:
    """Why a model cannot attend by sequence; if it can, it does from now on."""
    causal = causal_model(model)
    config = causal.config.get_text_config()
    windows = [window for name in WINDOWS if isinstance(window := getattr(config, name, None), int)]
    if windows and min(windows) < longest:
        return f"its attention window of {min(windows):,} tokens is shorter than the longest pair, {longest:,}"
    before = causal.config._attn_implementation
    if before not in ("sdpa", BY_SEQUENCE):
        return f"its attention is {before}"
    causal.set_attn_implementation(BY_SEQUENCE)
    if _reads_sequences_apart(causal):
        return None
    causal.set_attn_implementation(before)
    return "its layers carry more, or other things, from token to token than plain causal attention does"


@torch.no_grad()
def _reads_sequences_apart(causal: LanguageModel) -> bool:
    """Whether two made-up pairs give the same hidden states in one row as in rows of their own.

    Of weights without numbers ("meta"), whether the model takes such rows, and keeps nothing else from token to token.
    """
    vocab_size = causal.config.get_text_config().vocab_size
    ids = [(7 * number + 3) % vocab_size for number in range(24)]
    pairs = [
        TokenizedPair("0", ids[:5], ids[5:11], ids[11:15]),
        TokenizedPair("1", ids[15:18], ids[18:20], ids[20:]),
    ]
    device, was_training = next(causal.parameters()).device, causal.training
    causal.eval()
    try:
        states = []
        for layout in ("shared_prompt", "padded"):
            batch = collate(pairs, layout).to(device)
            hidden = causal.base_model(**batch.model_inputs).last_hidden_state
            states.append(hidden.flatten(0, 1)[batch.predictor].float())
    except (TypeError, ValueError):  # it takes no further arguments, or its scores are capped
        return False
    finally:
        causal.train(was_training)
    if device.type == "meta":
        return not getattr(causal, "_is_stateful", False)
    tolerance = 1e-3 if causal.dtype == torch.float32 else 0.05
    return bool((states[0] - states[1]).norm() <= tolerance * states[1].norm())
