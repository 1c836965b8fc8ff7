"""How many operations a training step asks a device for, and how many bytes they read and write.

    python tests/benchmarks/counted.py       # some three minutes, without any device

The step is run on tensors of shapes alone ("meta"), forward and backward: no time is measured.
Counted are torch's operations that make or change tensors, each about one kernel on a GPU (views
are left out), and the bytes of their tensors, each read or written once. Attention is a call for
each sequence, as where there is no varlen kernel. The step has four pairs of UltraFeedback-like
lengths, LoRA (r 16), bf16. The results/counted.{json,md}
are written anew after each row.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from common import about_lengths, write_results
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_step import LOSSES, PAIRS, SHAPES, the_recipe, the_store

from tbpo_cli.batch.batches import cut_to_span
from tbpo_cli.batch.layouts import collate
from tbpo_cli.core import StateBaseline
from tbpo_cli.model.layout import apply_layout
from tbpo_cli.model.load import load_policy
from tbpo_cli.model.scoring import Scorer

META = torch.device("meta")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_")


class Counter(TorchDispatchMode):
    """Counts operations, those that are matrix products, and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.products = self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = func.is_view or func._schema.name in ("aten::detach", "aten::empty_like")
        if not is_view and not func._schema.name.startswith("aten::_unsafe_view"):
            leaves = tree_leaves((args, kwargs, result))
            tensors = {id(each): each for each in leaves if isinstance(each, torch.Tensor)}
            self.operations += 1
            self.products += func._schema.name.removeprefix("aten::") in PRODUCTS
            self.num_bytes += sum(each.numel() * each.element_size() for each in tensors.values())
        return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = ["qwen2.5-0.5b", "llama-3.2-1b", "llama-3-8b", "mistral-7b"]
    parser.add_argument("--shapes", nargs="*", default=shapes, choices=list(SHAPES))
    parser.add_argument("--name", default="counted", help="of the files under results/")
    arguments = parser.parse_args()
    torch.autocast = lambda *_, **__: nullcontext()  # it does not know that device, and is off
    store = the_store(0)
    rows = []
    lines = [
        "| shape | loss | operations forward | backward | matrix products | GB read and written |",
        "|---|---|---|---|---|---|",
    ]
    for shape in arguments.shapes:
        for loss in LOSSES:
            rows.append(counted(shape, loss, store))
            row = rows[-1]
            lines.append(
                f"| {shape} | {loss} | {row['forward']:,} | {row['backward']:,} "
                f"| {row['products']:,} | {row['gb']:,.0f} |"
            )
            print(lines[-1], flush=True)
            table = "\n".join([about_lengths(store), "", *lines])
            write_results(arguments.name, "A step, counted", rows, table)


def counted(shape: str, name: str, store) -> dict:
    with tempfile.TemporaryDirectory() as folder, META:
        recipe = the_recipe(shape, name, 1, Path(folder))
        policy = load_policy(recipe, META, None, True, META)
    for each in policy.model.modules():  # as a GPU would have them
        for weights in (each._parameters, each._buffers):
            for key, weight in weights.items():
                if weight is not None and weight.is_floating_point() and not weight.requires_grad:
                    kept = weight.to(torch.bfloat16)
                    is_parameter = isinstance(weight, torch.nn.Parameter)
                    weights[key] = torch.nn.Parameter(kept, False) if is_parameter else weight
    apply_layout(policy.models, "shared_prompt")
    loss = recipe.align.loss
    baseline = None
    if "state_baseline" in loss.needs:
        baseline = StateBaseline(SHAPES[shape][0]).to(META)
    scorer = Scorer.of(policy, baseline)
    pairs = [cut_to_span(store[number], loss.span) for number in range(PAIRS)]
    batch = collate(pairs, "shared_prompt").to(META)
    policy.train()
    with Counter() as forward:
        total = loss(scorer.score(batch, loss.needs)).per_pair.sum()
    with Counter() as backward:
        total.backward()
    return {
        "shape": shape,
        "loss": name,
        "forward": forward.operations,
        "backward": backward.operations,
        "products": forward.products + backward.products,
        "gb": (forward.num_bytes + backward.num_bytes) / 1e9,
    }


if __name__ == "__main__":
    main()
