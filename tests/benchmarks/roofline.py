"""The time that a step's floating-point operations take as bare matrix products."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from statistics import median

import torch

from tbpo_cli.batch.batches import cut_to_span
from tbpo_cli.core import build_loss
from tbpo_cli.core.baseline import StateBaseline
from tbpo_cli.core.head import CHUNK_TOKENS
from tbpo_cli.data.tokens import TokenizedPair


def roofline(
    shape: tuple, rank: int, loss: str, pairs: Sequence[TokenizedPair], device: torch.device
) -> tuple[float, float]:
    """(seconds, FLOPs) of the products that a LoRA step needs: frozen head, reference computed.

    Each prompt once, each response cut to what the loss reads, nothing computed twice. Attention
    counts what is visible. The reference goes forward, the policy forward and, to its inputs and
    its adapter, backward.
    """
    hidden, inner, layers, heads, kv_heads, vocab_size, _ = shape
    needs, span = build_loss(loss).needs, build_loss(loss).span
    cut = [cut_to_span(pair, span) for pair in pairs]
    tokens = sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) - 2 for p in cut)
    responses = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in cut)
    kv = hidden // heads * kv_heads
    products: list[tuple[float, tuple[int, ...]]] = []  # how often, (batch, rows, inner, columns)
    for n, m, count in (
        (hidden, hidden, 2),
        (hidden, kv, 2),
        (hidden, inner, 2),
        (inner, hidden, 1),
    ):
        each = [
            (2, (1, tokens, n, m)),
            (1, (1, tokens, m, n)),
        ]  # reference and policy; the gradient of the input
        each += [(1, (1, tokens, n, rank)), (1, (1, tokens, rank, m))]  # the adapter
        each += [(1, (1, tokens, m, rank)), (1, (1, tokens, rank, n))]  # the gradient of its input
        each += [(1, (1, n, tokens, rank)), (1, (1, rank, tokens, m))]  # those of its weights
        products += [(layers * count * times, product) for times, product in each]
    for pair in cut:
        prompt = len(pair.prompt_ids)
        for length in (len(pair.chosen_ids) - 1, len(pair.rejected_ids) - 1):
            visible = (
                length * prompt + length**2 / 2 + prompt**2 / 4
            )  # the prompt's own part is shared by both
            square = prompt + length
            products.append(
                (8 * layers * visible / square**2, (heads, square, hidden // heads, square))
            )
    chunks = responses / (chunk := min(CHUNK_TOKENS, responses))
    # The reference's logits and its expected output embedding; or both models' logits and the
    # policy's gradient.
    num_logits = 1 if needs == {"advantage"} else 2
    products += [
        (num_logits * chunks, (1, chunk, hidden, vocab_size)),
        (chunks, (1, chunk, vocab_size, hidden)),
    ]
    if "state_baseline" in needs:
        products.append((2, (1, responses, hidden, StateBaseline.WIDTH)))
    seconds = sum(times * product_seconds(product, device) for times, product in products)
    return seconds, sum(2 * times * math.prod(product) for times, product in products)


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations a second of one large product."""
    size = 8192 if device.type == "cuda" else 1536
    return 2 * size**3 / product_seconds((1, size, size, size), device)


@functools.cache
def product_seconds(product: tuple[int, ...], device: torch.device) -> float:
    batch, rows, inner, columns = product
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.randn(batch, rows, inner, device=device, dtype=dtype)
    right = torch.randn(batch, columns, inner, device=device, dtype=dtype).transpose(1, 2)
    left, right = (left[0], right[0]) if batch == 1 else (left, right)
    seconds = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])
