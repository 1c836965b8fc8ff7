"""How many operations a training step asks a device for, and how many bytes they read and write.

    python tests/benchmarks/counted.py       # some four minutes, without any device

The step is run on tensors of shapes alone ("meta"), forward and backward: no time is measured.
Counted are torch's operations that make or change tensors, each about one kernel on a GPU (views
are left out), and the bytes of their tensors, each read or written once. torch's RMSNorm and varlen
attention are one operation each, forward and backward, as on a GPU. The step has four pairs of
UltraFeedback-like lengths, LoRA (r 16), bf16. `fused` are the layers as this project computes them,
`plain` those of transformers and peft. The results/counted.{json,md} are written anew after each
row.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from common import about_lengths, write_results
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_step import LOSSES, PAIRS, SHAPES, the_recipe, the_store

from tbpo_cli.batch.batches import cut_to_span
from tbpo_cli.batch.layouts import collate
from tbpo_cli.batch.packing import segments_of
from tbpo_cli.core import StateBaseline
from tbpo_cli.model.attention import in_one_kernel
from tbpo_cli.model.fused import cast_once
from tbpo_cli.model.layout import apply_layout
from tbpo_cli.model.load import load_policy
from tbpo_cli.model.scoring import Scorer

META = torch.device("meta")
NOTHING = ("aten::detach", "aten::empty_like", "aten::new_empty")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_")
WAYS = {  # what takes the place of a function that fuses layers
    "plain": {
        "tbpo_cli.model.base.fuse_norms": lambda model: None,
        "tbpo_cli.model.base.fuse_rotary": lambda model: None,
        "tbpo_cli.model.load.fuse_lora": lambda model: [],
    },
    "fused": {},
}


@torch.library.custom_op("counted::rms_norm", mutates_args=())
def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("shapes alone")


@torch.library.custom_op("counted::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("shapes alone")


_rms_norm.register_fake(lambda x, weight: torch.empty_like(x))
_rms_norm_backward.register_fake(lambda grad, x, weight: torch.empty_like(x))
_rms_norm.register_autograd(
    lambda ctx, grad: (_rms_norm_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def one_norm(x, shape, weight, eps=None):
    """torch's RMSNorm, whose weight is frozen, which is several operations on "meta"."""
    return _rms_norm(x, weight)


def one_kernel(module, query, key, value, sequences, scaling=None, **options):
    """The attention that a GPU takes."""
    return in_one_kernel(query, key, value, segments_of(sequences).to(META), scaling)


class Counter(TorchDispatchMode):
    """Counts operations, those that are matrix products, and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.products = self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = func.is_view or func._schema.name in NOTHING
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
        "| shape | loss | way | operations forward | backward | matrix products "
        "| GB read and written |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, loss, way in itertools.product(arguments.shapes, LOSSES, WAYS):
        rows.append(counted(shape, loss, way, store))
        row = rows[-1]
        lines.append(
            f"| {shape} | {loss} | {way} | {row['forward']:,} | {row['backward']:,} "
            f"| {row['products']:,} | {row['gb']:,.0f} |"
        )
        print(lines[-1], flush=True)
        table = "\n".join([about_lengths(store), "", *lines])
        write_results(arguments.name, "A step, counted", rows, table)


def counted(shape: str, name: str, way: str, store) -> dict:
    with ExitStack() as replaced, tempfile.TemporaryDirectory() as folder, META:
        for place, other in WAYS[way].items():
            replaced.enter_context(mock.patch(place, other))
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
    norm = mock.patch.object(F, "rms_norm", one_norm)
    kernel = mock.patch("tbpo_cli.model.attention.one_by_one", one_kernel)
    with norm, kernel, ExitStack() as step:
        with Counter() as forward:
            step.enter_context(cast_once(policy.fused))
            total = loss(scorer.score(batch, loss.needs)).per_pair.sum()
        with Counter() as backward:
            total.backward()
    return {
        "shape": shape,
        "loss": name,
        "way": way,
        "forward": forward.operations,
        "backward": backward.operations,
        "products": forward.products + backward.products,
        "gb": (forward.num_bytes + backward.num_bytes) / 1e9,
    }


if __name__ == "__main__":
    main()
