"""The time that a step's floating-point operations take as bare matrix products."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from statistics import median

import torch

from tbpo_cli.core import build_loss
from tbpo_cli.core.baseline import StateBaseline
from tbpo_cli.core.head import CHUNK_TOKENS
from tbpo_cli.data.batches import cut_to_span
from tbpo_cli.data.tokens import TokenizedPair


def roofline_seconds(shape: tuple, rank: int, loss: str, pairs: Sequence[TokenizedPair], device: torch.device) -> float:
    """Seconds of the products that a LoRA step needs with a frozen head, live reference and no recomputation.

    Each prompt once, each response cut to what the loss reads. Attention counts the visible half of its squares. The
    reference goes forward, the policy forward and, to its inputs and its adapter, backward.
    """
    hidden, inner, layers, heads, kv_heads, vocab_size, _ = shape
    needs, span = build_loss(loss).needs, build_loss(loss).span
    cut = [cut_to_span(pair, span) for pair in pairs]
    tokens = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) - 2 for p in cut)
    responses = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in cut)
    kv = hidden // heads * kv_heads
    time_of = functools.partial(product_seconds, device=device)
    total = 0.0
    for n, m, count in ((hidden, hidden, 2), (hidden, kv, 2), (hidden, inner, 2), (inner, hidden, 1)):
        one_way = 2 * time_of(tokens, n, m) + time_of(tokens, m, n)  # reference, policy; and the gradient of the input
        down, up = time_of(tokens, n, rank), time_of(tokens, rank, m)
        adapter = down + up  # forward
        adapter += time_of(tokens, m, rank) + time_of(tokens, rank, n)  # gradient of the input
        adapter += time_of(n, tokens, rank) + time_of(rank, tokens, m)  # gradients of the two weights
        total += layers * count * (one_way + adapter)
    for pair in cut:
        prompt = len(pair.prompt_ids)
        for length in (len(pair.chosen_ids) - 1, len(pair.rejected_ids) - 1):
            visible = length * prompt + length**2 / 2 + prompt**2 / 4  # the prompt's own half, shared by both
            whole = (prompt + length) ** 2
            products = 8 * attention_seconds(heads, prompt + length, hidden // heads, device=device)
            total += layers * products * visible / whole  # 2 forward (twice: both models), 4 backward
    chunk = min(CHUNK_TOKENS, responses)
    to_logits, from_logits = time_of(chunk, hidden, vocab_size), time_of(chunk, vocab_size, hidden)
    # The reference's logits and its expected output embedding; or both models' logits and the policy's gradient.
    num_logits = 1 if needs == {"advantage"} else 2
    total += (num_logits * to_logits + from_logits) * responses / chunk
    if "state_baseline" in needs:
        total += 2 * time_of(responses, hidden, StateBaseline.WIDTH)
    return total


@functools.cache
def product_seconds(rows: int, inner: int, columns: int, device: torch.device) -> float:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, inner), (inner, columns)))
    return _median_seconds(lambda: left @ right, device)


@functools.cache
def attention_seconds(heads: int, length: int, size: int, device: torch.device) -> float:
    """One of the products of attention over a whole square, for all heads."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key = (torch.randn(heads, length, size, device=device, dtype=dtype) for _ in range(2))
    return _median_seconds(lambda: query @ key.transpose(1, 2), device)


def _median_seconds(product, device: torch.device, repeats: int = 3) -> float:
    product()
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        product()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds)
