"""Ways to attend over a row of several sequences, [prompt | chosen | rejected] a pair.

    python tests/benchmarks/attention.py                                          # on a CPU
    python tests/benchmarks/attention.py --heads 32 --key-heads 8 --size 64       # on a CUDA device

The row holds UltraFeedback-like pairs, cut to their aligned length, as TBPO reads them. Ways: `one
by one`, a call of torch's fused attention a sequence; `one kernel`, FlashAttention for sequences of
many lengths (CUDA); `flex`, compiled FlexAttention with a block mask (CUDA: on a CPU it has no
backward pass), the mask made anew for each row but not counted; `dense mask`, one call of the fused
attention with a mask of row × row; `padded`, a causal row a response. Writes
results/attention.{json,md}.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from common import about_lengths, make_store, write_results
from torch import Tensor, nn

from tbpo_cli.batch.batches import cut_to_span
from tbpo_cli.batch.layouts import collate
from tbpo_cli.batch.packing import Sequences, segments_of
from tbpo_cli.model.attention import in_one_kernel, one_by_one

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = (
    torch.device("cuda" if ON_GPU else "cpu"),
    torch.bfloat16 if ON_GPU else torch.float32,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=16 if ON_GPU else 4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--key-heads", type=int, default=6)
    parser.add_argument("--size", type=int, default=64, help="of a head")
    parser.add_argument("--repeats", type=int, default=20 if ON_GPU else 5)
    of = parser.parse_args()
    store = make_store(Path(tempfile.mkdtemp()), of.pairs, 2048 if ON_GPU else 1024, 1000)
    pairs = [cut_to_span(store[number], "aligned") for number in range(of.pairs)]
    row, padded = collate(pairs, "shared_prompt"), collate(pairs, "padded")
    states = random_states(of, (1, row.input_ids.shape[1]))
    rows = [states, random_states(of, padded.input_ids.shape)]
    ways = ways_for(row.sequences, of.heads // of.key_heads, states)
    expected, table = (
        None,
        ["| way | ms, median | slowest | times `one by one` |", "|---|---|---|---|"],
    )
    found = []
    for name, (which, attend) in ways.items():
        seconds, result = timed(attend, rows[which], of.repeats)
        if which == 0:
            expected = result if expected is None else expected
            torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
        found.append({"way": name, "seconds": seconds})
        ratio = median(seconds) / median(found[0]["seconds"])
        table.append(
            f"| {name} | {1e3 * median(seconds):.1f} | {1e3 * max(seconds):.1f} | {ratio:.2f} |"
        )
        print(table[-1], flush=True)
    where = torch.cuda.get_device_name() if ON_GPU else "CPU"
    dtype = str(DTYPE).removeprefix("torch.")
    about = f"{where}, {dtype}; {of.heads} heads, {of.key_heads} of keys, of {of.size}."
    about += f" {about_lengths(store)} One row of {states[0].shape[2]:,} tokens, one layer."
    write_results(
        "attention", "Attention over several sequences a row", found, "\n".join([about, "", *table])
    )


def random_states(of: argparse.Namespace, shape: torch.Size) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    sizes = [
        (shape[0], heads, shape[1], of.size) for heads in (of.heads, of.key_heads, of.key_heads)
    ]
    return [
        torch.randn(size, generator=generator, device=DEVICE, dtype=DTYPE).requires_grad_()
        for size in sizes
    ]


def ways_for(
    sequences: Sequences, group: int, states: list[Tensor]
) -> dict[str, tuple[int, Callable[..., Tensor]]]:
    """{name: (0: one row, 1: padded rows; query, key, value → (rows, L, heads, head size))}."""
    module, visible, gqa = nn.Module(), visible_in(sequences), {"enable_gqa": group > 1}
    module.num_key_value_groups = group
    ways: dict[str, tuple[int, Callable[..., Tensor]]] = {
        "one by one": (0, lambda *qkv: one_by_one(module, *qkv, sequences)),
        "dense mask": (0, lambda *qkv: sdpa(*qkv, attn_mask=visible, **gqa)),
        "padded": (1, lambda *qkv: sdpa(*qkv, is_causal=True, **gqa)),
    }
    if ON_GPU:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        length = states[0].shape[2]
        mask = create_block_mask(
            lambda b, h, q, k: visible[q, k], None, None, length, length, device=DEVICE
        )
        flex = torch.compile(flex_attention, dynamic=False)
        segments = segments_of(sequences).to("cuda")
        ways["one kernel"] = (0, lambda *qkv: in_one_kernel(*qkv, segments, None))
        ways["flex"] = (0, lambda *qkv: flex(*qkv, block_mask=mask, **gqa).transpose(1, 2))
    return ways


def sdpa(*states: Tensor, **options) -> Tensor:
    return F.scaled_dot_product_attention(*states, **options).transpose(1, 2)


def visible_in(sequences: Sequences) -> Tensor:
    """(L, L) bool: whether the token of a row sees that of a column."""
    numbers = torch.arange(len(sequences.lengths)).repeat_interleave(
        torch.tensor(sequences.lengths)
    )
    prefixes = torch.tensor(sequences.continues)[numbers]
    own, prefix = numbers[:, None] == numbers, prefixes[:, None] == numbers
    return ((own | prefix) & torch.ones(own.shape).tril().bool()).to(DEVICE)


def timed(
    attend: Callable[..., Tensor], states: list[Tensor], repeats: int
) -> tuple[list[float], Tensor]:
    """Seconds of each repeat after two of warm-up, and the result."""
    seconds = []
    for _ in range(repeats + 2):
        if ON_GPU:
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = attend(*states)
        torch.autograd.grad(result.sum(), states)
        if ON_GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[2:], result.detach()


if __name__ == "__main__":
    main()
