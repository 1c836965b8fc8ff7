"""What one can watch of a training: curves.svg, trackers, the line of each step, and the bar."""

import importlib.util
import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import change_recipe, preference_rows, run_stage, write_jsonl

from tbpo_cli.config.recipe import Align
from tbpo_cli.errors import TbpoError
from tbpo_cli.report.charts import curves
from tbpo_cli.report.pages import write_page
from tbpo_cli.train.run import num_evaluated

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def drawn(folder, lines):
    write_page(folder / "curves.svg", "curves.svg", panels=curves(lines))
    return (folder / "curves.svg").read_text(encoding="utf-8")


def test_curves_have_a_panel_a_metric_with_labelled_axes_and_every_finite_value(tmp_path):
    lines = [
        {"split": "train", "step": step, "loss": 1 / step, "kl": math.nan} for step in range(1, 6)
    ]
    lines += [{"split": "eval", "step": step, "loss": 0.5, "accuracy": 0.75} for step in (0, 5)]
    svg = drawn(tmp_path, lines)
    root = ElementTree.fromstring(svg)
    assert {
        "loss",
        "nats",
        "reward accuracy",
        "share of pairs",
        "optimizer step",
        "0",
        "5",
        "1.0",
        "0.2",
    } <= set(texts(svg))
    assert "reward" not in texts(svg), "no panel without a value"
    loss = root.findall(f".//{SVG}g")[0]
    points = [line.get("points").split() for line in loss.iter(f"{SVG}polyline")]
    assert [len(line) for line in points] == [5, 2]
    heights = [float(point.split(",")[1]) for point in points[0]]
    assert heights == sorted(heights), "a falling loss goes down the page"
    assert "nan" not in svg and texts(drawn(tmp_path, [])) == []


def test_a_training_draws_its_curves_and_says_how_it_goes(recipe_file, tmp_path, capsys):
    run = run_stage("align", recipe_file, tmp_path / "run")
    svg = (run / "align/curves.svg").read_text()
    assert {"loss", "nats", "KL from the reference", "log-probability", "nats a token"} <= set(
        texts(svg)
    )
    said = capsys.readouterr().err
    assert "rows are shared_prompt: every prompt is read once" in said
    (last,) = (line for line in said.splitlines() if line.startswith("align 6/6"))
    assert all(word in last for word in ("loss ", "accuracy ", "KL ", "tokens/s", "s left"))


def test_the_line_of_a_step_says_what_was_done_and_what_it_cost(trained):
    lines = [
        json.loads(line) for line in (trained / "run/align/metrics.jsonl").read_text().splitlines()
    ]
    for line in (line for line in lines if line["split"] == "train"):
        assert (
            line["pairs"] == 8
            and line["tokens"] > 8 * 20
            and line["learning_rate"] >= 0
            and line["grad_norm"] > 0
        )
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"])
        assert 0.1 < line["peak_memory_gb"] < 20


def evaluated(run):
    """{step: held-out pairs that were measured after it}"""
    lines = [json.loads(line) for line in (run / "align/metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["pairs"] for line in lines if line["split"] == "eval"}


@pytest.mark.parametrize(("eval_pairs", "between"), [("auto", 64), ("all", 70), (5, 5), (1000, 70)])
def test_measurements_between_the_first_and_the_last_read_a_bounded_part_that_is_said(
    recipe_file, tmp_path, capsys, eval_pairs, between
):
    """70 held-out pairs; "auto": a tenth of 2 steps of 8 pairs, and never fewer than 64."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", preference_rows(70, seed=3))
    change_recipe(
        recipe_file,
        data={"eval": str(held_out)},
        align={"max_steps": 3, "eval_every": 1, "eval_pairs": eval_pairs},
    )
    run = run_stage("align", recipe_file, tmp_path / "run")
    assert evaluated(run) == {0: 70, 1: between, 2: between, 3: 70}
    said = f"{between} of the 70 held-out pairs are measured every 1 steps"
    assert (said in capsys.readouterr().err) == (between < 70)


def test_the_part_of_the_held_out_pairs_grows_with_what_is_trained_on_in_between():
    """A tenth of 100 or 1,000 steps of 32 pairs, of 2,000 held-out ones."""
    assert num_evaluated(Align(eval_every=100, batch_pairs=32), 2000) == 320
    assert num_evaluated(Align(eval_every=1000, batch_pairs=32), 2000) == 2000


def test_sft_draws_its_curves_too(recipe_file, tmp_path):
    change_recipe(recipe_file, sft={"batch_examples": 8, "max_steps": 2})
    run = run_stage("sft", recipe_file, tmp_path / "run")
    assert "nats" in texts((run / "sft/curves.svg").read_text())


def test_tensorboard_gets_every_line(recipe_file, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_stage("align", recipe_file, tmp_path / "run", 'run.trackers=["tensorboard"]')
    accumulator = EventAccumulator(str(run / "align/logs/tiny")).Reload()
    lines = [json.loads(line) for line in (run / "align/metrics.jsonl").read_text().splitlines()]
    for split in ("train", "eval"):
        expected = [(line["step"], line["loss"]) for line in lines if line["split"] == split]
        got = [(event.step, event.value) for event in accumulator.Scalars(f"{split}/loss")]
        assert got == [(step, pytest.approx(loss)) for step, loss in expected]


def test_a_tracker_that_is_not_installed_names_the_command_that_installs_it(recipe_file, tmp_path):
    (missing, *_) = [
        name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is None
    ]
    with pytest.raises(TbpoError, match=f"pip install {missing}"):
        run_stage("align", recipe_file, tmp_path / "run", f'run.trackers=["{missing}"]')
