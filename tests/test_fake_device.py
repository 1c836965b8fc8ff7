"""A whole step on a device that is not there: what is left on the CPU is an error."""

from concurrent.futures import ProcessPoolExecutor

import pytest
from conftest import write_recipe
from fake_device import step, transfers
from one_step import TRAINED
from process import FORKS

from tbpo_cli.batch.layouts import LAYOUTS
from tbpo_cli.core import LOSSES


@pytest.fixture(scope="module")
def run(call):
    """Runs a step in a process that has the device; returns the error, in words."""
    return lambda *case: call(step, *case)


@pytest.fixture(scope="module")
def call(tmp_path_factory, base, rows):
    """Calls a function with a recipe, and more, in a process that has the device."""
    recipe = write_recipe(tmp_path_factory.mktemp("fake") / "tiny.toml", base, rows)
    with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
        yield lambda function, *case: pool.submit(function, recipe, *case).result()


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_of_a_step_is_left_on_the_cpu(run, name, trained):
    assert run(name, trained, "float32", "shared_prompt") == ""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", ["tbpo_a", "tbpo_q", "dpo"])
def test_nor_of_a_step_in_half_precision(run, name, trained, layout):
    """Of full fine-tuning the weights stay in fp32: autocast casts nothing on that device."""
    assert run(name, trained, "bfloat16", layout) == ""


@pytest.mark.parametrize("left", ["batch", "weight", "baseline"])
def test_a_tensor_that_is_left_there_is_found(run, left):
    error = run("tbpo_q", "adapter", "float32", "shared_prompt", left)
    assert "pretended" in error and "cpu" in error


def test_a_batch_with_the_log_probabilities_of_the_reference_is_one_transfer(call):
    """And its scores and their loss need no other."""
    assert call(transfers) == (1, 0)
