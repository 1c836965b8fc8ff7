"""A step on each device has the losses and gradients of the plainest one.

That is: on the CPU, in fp32, padded, one pair at a time.
"""

import pytest
import torch
from conftest import write_recipe
from devices import DEVICES
from one_step import TRAINED, collated, losses_and_gradients, make_pairs, make_scorer

from tbpo_cli.batch.layouts import LAYOUTS
from tbpo_cli.core import LOSSES, build_loss
from tbpo_cli.model.layout import apply_layout

# Numbers of a small model are rounded to 2⁻⁸ each in bf16, to 2⁻¹¹ in TF32.
TOLERANCE = {("cpu", "float32"): 1e-4, ("cuda", "float32"): 1e-2}
TOLERANCE_IN_BF16 = 0.06
STEEP = {"dpop": 0.2, "wpo": 0.2}  # 50 times a difference, and weights that are exponentials


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base, rows):
    return write_recipe(tmp_path_factory.mktemp("steps") / "tiny.toml", base, rows)


@pytest.fixture(scope="module")
def plainest(recipe):
    known = {}

    def find(name, trained):
        if (name, trained) not in known:
            loss = build_loss(name)
            scorer = make_scorer(recipe, loss, trained, "float32", "cpu")
            batches = [collated([pair], loss, "padded", "cpu") for pair in make_pairs(300)]
            known[name, trained] = losses_and_gradients(scorer, loss, batches)
        return known[name, trained]

    return find


def assert_as_plain(found, wanted, tolerance):
    """Losses within the tolerance, and all gradients together within as much of their norm."""
    losses, gradients = found
    assert gradients.keys() == wanted[1].keys()
    for pair, value in wanted[0].items():
        assert losses[pair] == pytest.approx(value, rel=tolerance, abs=tolerance)
    whole = torch.cat([gradient.flatten() for gradient in wanted[1].values()])
    own = torch.cat([gradients[name].flatten() for name in wanted[1]])
    assert whole.norm() > 1e-3
    assert (own - whole).norm() / whole.norm() < tolerance


def step(recipe, name, trained, dtype, layout, device, checkpointing=False):
    loss = build_loss(name)
    scorer = make_scorer(recipe, loss, trained, dtype, device)
    apply_layout(scorer.policy.models, layout)
    if checkpointing:
        scorer.policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = collated(make_pairs(300), loss, layout, device)
    return losses_and_gradients(scorer, loss, [batch])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_in_every_precision(recipe, plainest, name, trained, dtype, device):
    found = step(recipe, name, trained, dtype, "shared_prompt", device)
    in_bf16 = STEEP.get(name, TOLERANCE_IN_BF16)
    tolerance = TOLERANCE.get((device, dtype), in_bf16)
    assert_as_plain(found, plainest(name, trained), tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "shared_prompt"])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", ["tbpo_a", "tbpo_q", "dpo"])
def test_every_layout_in_half_precision_with_and_without_activation_checkpointing(
    recipe, plainest, name, trained, layout, checkpointing, device
):
    found = step(recipe, name, trained, "bfloat16", layout, device, checkpointing)
    assert_as_plain(found, plainest(name, trained), TOLERANCE_IN_BF16)
