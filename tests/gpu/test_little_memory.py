"""Memory that runs out: the work goes on with less at once and gives the same result.

What is left to a process, on a GPU by torch's allocator, on the CPU by a count of tensors' bytes,
is more than one sequence takes and less than all of them do.
"""

import numpy as np
import pytest
from conftest import preference_rows, run_stage, write_jsonl, write_recipe
from devices import DEVICES, in_a_process
from little_memory import evaluate, sample, train, write_wide_base


@pytest.fixture(scope="module")
def wide(tmp_path_factory, base):
    """(recipe, run directory with prepared pairs) of a base with wide layers."""
    folder = tmp_path_factory.mktemp("wide")
    files = [
        write_jsonl(folder / f"{name}.jsonl", preference_rows(count, seed))
        for seed, (name, count) in enumerate({"train": 40, "eval": 8}.items())
    ]
    align = {"batch_pairs": 12, "max_steps": 1, "layout": "padded"}
    lora = {"r": 2, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    wide_base = write_wide_base(folder / "base", base)
    recipe = write_recipe(folder / "wide.toml", wide_base, files, model={"lora": lora}, align=align)
    return recipe, run_stage("prepare", recipe, folder / "run")


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_goes_on_with_fewer_tokens_at_a_time_and_learns_the_same(wide, tmp_path, device):
    (whole, said_of_whole), (cut, said) = (
        in_a_process(train, device, num_bytes, *wide, tmp_path / str(num_bytes))
        for num_bytes in (None, 350_000_000)
    )
    assert "out of memory" not in said_of_whole
    assert "out of memory: the same step again with max_tokens_per_device" in said
    assert whole.keys() == cut.keys() and any(weight.any() for weight in whole.values())
    for name, weight in whole.items():
        np.testing.assert_allclose(cut[name], weight, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_too_little_memory_for_the_optimizers_moments_is_an_error_that_names_a_way_out(
    wide, tmp_path, device
):
    """All weights are trained: 6.3 million, 25 MB for gradients and 50 MB for moments, and as much
    again for the optimizer's step.
    """
    full = ("model.lora=none",)
    said, _ = in_a_process(train, device, 100_000_000, *wide, tmp_path / "align", *full)
    assert "the optimizer's moments" in said and "[model.lora]" in said


PROMPTS = [[5 + number] * (10 + number % 7) for number in range(64)]


@pytest.mark.parametrize("device", DEVICES)
def test_sampling_goes_on_with_fewer_prompts_at_a_time_and_says_the_same(wide, device):
    recipe, _ = wide
    (whole, said_of_whole), (cut, said) = (
        in_a_process(sample, device, num_bytes, recipe, PROMPTS)
        for num_bytes in (None, 150_000_000)
    )
    assert "out of memory" not in said_of_whole
    assert "out of memory: sampling goes on with" in said
    assert cut == whole and len({*whole}) > 32


@pytest.mark.parametrize("device", DEVICES)
def test_an_evaluation_goes_on_with_fewer_tokens_at_a_time_and_measures_the_same(wide, device):
    (whole, said_of_whole), (cut, said) = (
        in_a_process(evaluate, device, num_bytes, *wide) for num_bytes in (None, 150_000_000)
    )
    assert "out of memory" not in said_of_whole and "out of memory" in said
    assert len(whole) == 8
    np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_prompt_that_does_not_fit_alone_is_an_error_that_names_a_smaller_number(wide, device):
    recipe, _ = wide
    said, _ = in_a_process(sample, device, 20_000_000, recipe, [[5] * 400])
    assert said.startswith("error: out of memory") and "sample.max_new_tokens" in said
