"""The column `weight`: a step's loss is Σ w L / Σ w over all of its pairs."""

import json
import shutil
from decimal import Decimal

import pytest
import torch
from conftest import preference_rows, run_stage, write_jsonl
from process import Process
from safetensors.torch import load_file

from tbpo_cli.batch.batches import cut_to_span
from tbpo_cli.batch.layouts import collate
from tbpo_cli.config.recipe import Data, Source
from tbpo_cli.core import PairScores, SideScores, build_loss
from tbpo_cli.data.formats import recognise, to_pairs
from tbpo_cli.data.pairs import RejectedRow
from tbpo_cli.data.selection import read_otherwise
from tbpo_cli.data.sources import Row, read_rows
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.tokens import TokenizedPair
from tbpo_cli.errors import TbpoError
from tbpo_cli.train.group import ONE
from tbpo_cli.train.metrics import average, measure, pair_weights

EXACT = ("model.lora.dropout=0.0", "align.log_every=1000", "align.eval_every=1000")
OUT_OF_RANGE = (10**400, 10**21, 1e39, 1e38, 9e-21, 1e-40, 1e-50, -1e-30)
ONE_STEP = ("align.max_steps=2", "align.warmup=0", "data.dedup=false")


def pair_of(**columns):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", **columns}
    (pair,) = to_pairs(
        Row("rows.jsonl", 1, row), "prompt", Data(train=(Source("rows.jsonl"),))
    ).pairs
    return pair


def train(recipe_file, folder, rows, *sets, stage="align"):
    path = write_jsonl(folder.parent / f"{folder.name}.jsonl", rows)
    return run_stage(stage, recipe_file, folder, f"data.train={path}", *EXACT, *ONE_STEP, *sets)


def adapter(run, stage="align"):
    return load_file(run / stage / "adapter/adapter_model.safetensors")


def assert_same_weights(run, other, stage="align"):
    ours, theirs = adapter(run, stage), adapter(other, stage)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6)


def losses(run, stage="align"):
    lines = map(json.loads, (run / stage / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_a_row_without_the_column_weighs_1_and_another_what_it_says():
    assert pair_of().weight == 1 and pair_of(weight=0).weight == 0
    assert pair_of(weight=2.5).weight == 2.5


@pytest.mark.parametrize(
    "weight", [None, -1, -0.5, "2", True, float("nan"), float("inf"), *OUT_OF_RANGE]
)
def test_a_weight_that_is_none_is_a_reason_to_reject_the_row(weight):
    with pytest.raises(RejectedRow) as rejected:
        pair_of(weight=weight)
    assert rejected.value.reason == "bad_weight"
    assert repr(weight)[:40] in rejected.value.detail
    assert "not 0, or a number from 1e-20 to 1e+20" in rejected.value.detail
    assert len(rejected.value.detail) < 120


def test_weights_of_columnar_files_and_of_the_ends_of_the_range_are_numbers():
    weights = [Decimal("2.50"), Decimal(0), 1e20, 1e-20, 0]
    assert [pair_of(weight=weight).weight for weight in weights] == [2.5, 0, 1e20, 1e-20, 0]


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_a_weight_in_a_file_of_texts_is_the_number_that_its_text_says(tmp_path, ending, delimiter):
    path = tmp_path / f"rows.{ending}"
    said = ["0.5", "2", "1e-3", "0", "", "x", "-1", "nan", "1" + 400 * "0"]
    lines = [("prompt", "chosen", "rejected", "weighs")]
    lines += [(f"p{number}", "b", "c", weight) for number, weight in enumerate(said)]
    path.write_text("".join(delimiter.join(line) + "\n" for line in lines))
    source = Source(str(path))
    data = Data(train=(source,), columns={"weight": "weighs"})
    found = [outcome(row, "prompt", data) for row in read_rows(source, "train", "data.train")]
    assert found == [0.5, 2.0, 0.001, 0.0] + 5 * ["bad_weight"]


def outcome(row, name, data):
    """The weight of the pair of a row, or the reason why it is rejected."""
    try:
        return to_pairs(row, name, data).pairs[0].weight
    except RejectedRow as rejected:
        return rejected.reason


def outcomes_of_labelled(*rows):
    """By the number of a row: its outcome. A row is (label, columns), of one prompt."""
    data = Data(train=(Source("rows.jsonl"),))
    contents = [
        {"prompt": "a", "completion": f"{label} {number}", "label": label, **columns}
        for number, (label, columns) in enumerate(rows)
    ]
    rows = [Row("rows.jsonl", number, content) for number, content in enumerate(contents, 1)]
    name, found = recognise(lambda: iter(rows), data)
    return name, {row.number: outcome(row, name, data) for row in found}


@pytest.mark.parametrize("labels", [(True, False), (False, True)])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"weight": 3}, {"weight": 3.0}, {2: 3.0}),
        ({}, {"weight": 1}, {2: 1.0}),
        ({"weight": 7.0}, {}, {1: "unpaired", 2: "unpaired"}),
        ({}, {"weight": 7.0}, {1: "unpaired", 2: "unpaired"}),
        ({"weight": -1}, {"weight": 0.5}, {1: "bad_weight", 2: "unpaired"}),
        ({"weight": 0.5}, {"weight": None}, {1: "unpaired", 2: "bad_weight"}),
        ({"weight": "x"}, {}, {1: "bad_weight", 2: "unpaired"}),
    ],
)
def test_two_labelled_completions_make_a_pair_only_if_both_weigh_the_same(
    labels, first, second, expected
):
    name, found = outcomes_of_labelled((labels[0], first), (labels[1], second))
    assert (name, found) == ("unpaired", expected)


def test_a_labelled_completion_pairs_with_the_one_of_its_weight_in_any_order():
    rows = [(True, {"weight": 7}), (True, {}), (False, {"weight": 1})]
    assert outcomes_of_labelled(*rows)[1] == {1: "unpaired", 3: 1.0}
    assert outcomes_of_labelled(*rows[::-1])[1] == {2: 1.0, 3: "unpaired"}


def test_a_completion_without_a_counterpart_of_its_weight_says_which_it_seeks():
    row = {"prompt": "a", "completion": "b", "label": True, "weight": 7.0}
    with pytest.raises(RejectedRow, match=r"labelled bad, of the same weight \(7\)"):
        to_pairs(Row("rows.jsonl", 1, row), "unpaired", Data(train=(Source("rows.jsonl"),)))


def test_unpaired_rows_that_an_earlier_version_weighed_by_one_of_two_are_read_anew():
    def said(name, reading):
        return read_otherwise({"counts": [{"format": name}], "reading": reading})

    assert ["the weight of one of two rows" in line for line in said("unpaired", 1)] == [True]
    assert said("unpaired", 2) == said("prompt", 1) == said("winner", 1) == []


def test_weights_are_kept_with_the_pairs_and_bad_ones_reported(recipe_file, tmp_path):
    weights = [0.0, 2.0, 0.1, 1.0]
    rows = [row | {"weight": w} for row, w in zip(preference_rows(4, seed=3), weights, strict=True)]
    rows += [row | {"weight": -1} for row in preference_rows(1, seed=4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = run_stage(
        "prepare", recipe_file, tmp_path / "run", f"data.train={path}",
        "data.max_reject_fraction=0.5",
    )  # fmt: skip
    store = PairStore(run / "prepare/train")
    assert store.weights.tolist() == [store[n].weight for n in range(4)] == weights
    (reject,) = map(json.loads, (run / "prepare/rejects.jsonl").read_text().splitlines())
    assert (reject["row"], reject["reason"]) == (5, "bad_weight")
    assert "sum of the weights of all pairs" in (run / "prepare/report.html").read_text()


@pytest.mark.parametrize("span", ["response", "aligned", "aligned_and_chosen", "chosen"])
def test_a_batch_has_the_weights_of_its_pairs_on_every_device(span):
    pairs = [TokenizedPair(str(w), [1, 2], [3, 4, 5], [6, 7], w) for w in (0.1, 0.0, 3.75)]
    batch = collate([cut_to_span(pair, span) for pair in pairs], "packed")
    expected = torch.tensor([0.1, 0.0, 3.75])
    assert torch.equal(batch.pair_weights, expected)
    assert torch.equal(batch.to(torch.device("cpu", 0)).pair_weights, expected), "bit by bit"


def test_metrics_are_weighted_means():
    """Three pairs of one token; the second one weighs nothing, the third three times the first."""
    mask = torch.ones(3, 1, dtype=torch.bool)

    def side(*log_ratios):
        column = torch.tensor([*log_ratios])[:, None]
        return SideScores(mask, logps=column, log_ratio=column, kl=-column)

    weights = torch.tensor([1.0, 0.0, 3.0])
    scores = PairScores(side(1.0, 50.0, -2.0), side(0.5, 9.0, 1.0), weights)
    loss = build_loss("dpo", beta=1.0)
    output = loss(scores)
    values = average([measure(scores, output, loss)], ONE)
    per_pair = output.per_pair.tolist()
    assert values["loss"] == pytest.approx((per_pair[0] + 3 * per_pair[2]) / 4)
    assert values["reward_chosen"] == pytest.approx((1.0 - 6.0) / 4)
    assert values["margin"] == pytest.approx((0.5 - 9.0) / 4)
    assert values["accuracy"] == values["token_accuracy"] == pytest.approx(1 / 4)
    assert values["logps_rejected"] == pytest.approx((0.5 + 3.0) / 4)
    assert values["kl"] == pytest.approx(-(1.5 - 3.0) / 8)
    assert pair_weights(scores, build_loss("sft")).tolist() == [1.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("name", "layout", "max_tokens"),
    [
        ("tbpo_a", "shared_prompt", 2048),
        ("tbpo_a", "padded", 60),
        ("dpo", "packed", 60),
        ("tbpo_q", "shared_prompt", 60),
    ],
)
def test_a_pair_of_weight_2_is_that_pair_twice_in_every_layout_and_micro_batch(
    recipe_file, tmp_path, name, layout, max_tokens
):
    first, second, third = preference_rows(3, seed=7)
    sets = (f"align.loss.name={name}", f"align.layout={layout}")
    sets += (f"align.max_tokens_per_device={max_tokens}",)
    rows = [first | {"weight": 2}, second, third | {"weight": 0}]
    weighted = train(recipe_file, tmp_path / "weighted", rows, "align.batch_pairs=3", *sets)
    rows = [first, first, second]
    twice = train(recipe_file, tmp_path / "twice", rows, "align.batch_pairs=3", *sets)
    plain = train(recipe_file, tmp_path / "plain", [first, second], "align.batch_pairs=2", *sets)
    assert losses(weighted) == pytest.approx(losses(twice), rel=1e-5, abs=1e-6)
    assert_same_weights(weighted, twice)
    with pytest.raises(AssertionError):
        assert_same_weights(weighted, plain)


def test_sft_weighs_demonstrations_by_their_tokens_and_weights(recipe_file, tmp_path):
    first, second = preference_rows(2, seed=8)
    sets = ("sft.batch_examples=3", "sft.max_steps=2", "sft.warmup=0")
    rows = [first | {"weight": 0.5}, second | {"weight": 0.25}, second | {"weight": 0}]
    weighted = train(recipe_file, tmp_path / "weighted", rows, *sets, stage="sft")
    rows = [first, first, second]
    twice = train(recipe_file, tmp_path / "twice", rows, *sets, stage="sft")
    assert losses(weighted, "sft") == pytest.approx(losses(twice, "sft"), rel=1e-5)
    assert_same_weights(weighted, twice, "sft")


def test_a_step_whose_pairs_all_weigh_0_has_loss_0(recipe_file, tmp_path):
    rows = [row | {"weight": number} for number, row in enumerate(preference_rows(2, seed=9))]
    run = train(recipe_file, tmp_path / "run", rows, "align.batch_pairs=1")
    found = sorted(losses(run))
    assert found[0] == 0 and found[1] > 0.1


@pytest.mark.parametrize("stage", ["align", "sft"])
def test_a_training_whose_pairs_all_weigh_0_is_refused(recipe_file, tmp_path, stage, capsys):
    rows = [row | {"weight": 0} for row in preference_rows(2, seed=9)]
    sets = ["sft.max_steps=2"] if stage == "sft" else []
    with pytest.raises(TbpoError, match="all pairs to train on have the weight 0"):
        train(recipe_file, tmp_path / "run", rows, *sets, stage=stage)
    shown = " ".join(capsys.readouterr().err.split())
    assert "WARNING: all pairs of train have the weight 0: there will be nothing to learn" in shown
    assert "all pairs of eval" not in shown


def test_held_out_pairs_that_all_weigh_0_are_said_in_place_of_an_empty_table(
    recipe_file, tmp_path, capsys
):
    held_out = [row | {"weight": 0} for row in preference_rows(2, seed=10)]
    path = write_jsonl(tmp_path / "eval.jsonl", held_out)
    train(recipe_file, tmp_path / "run", preference_rows(2, seed=9), f"data.eval={path}")
    out = capsys.readouterr()
    shown = " ".join((out.out + out.err).split())
    assert "WARNING: all pairs of eval have the weight 0: there will be no figures" in shown
    assert "the held-out pairs all have the weight 0: there are no figures of them" in shown


def test_the_first_of_repeated_comparisons_is_kept_and_other_weights_are_counted(
    recipe_file, tmp_path
):
    row, other = preference_rows(2, seed=9)
    weighted = [row | {"weight": weight} for weight in (0, 5, 0)] + [other, other]
    path = write_jsonl(tmp_path / "rows.jsonl", weighted)
    run = run_stage("prepare", recipe_file, tmp_path / "run", f"data.train={path}")
    assert PairStore(run / "prepare/train").weights.tolist() == [0, 1]
    counts = json.loads((run / "prepare/manifest.json").read_text())["counts"]
    (noted,) = (count["noted"] for count in counts if count["key"] == "data.train")
    assert (noted["duplicate"], noted["other_weight"]) == (3, 1)


def test_two_processes_and_a_resumed_run_divide_by_the_same_sum_of_weights(recipe_file, tmp_path):
    rows = preference_rows(40, seed=5)
    rows = [row | {"weight": number % 4 / 2} for number, row in enumerate(rows)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    sets = (f"data.train={path}", *EXACT, "align.max_steps=4", "align.checkpoint_every=2")
    alone = run_stage("align", recipe_file, tmp_path / "alone", *sets)
    flags = [part for one in sets for part in ("--set", one)]
    two = tmp_path / "two"
    done = Process(
        "align", recipe_file, "--run-dir", two, *flags, "--cpu", "--gpus", "2", cwd=tmp_path
    ).finish()
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(alone), rel=1e-5)
    assert_same_weights(alone, two)
    (two / "align/manifest.json").unlink()
    shutil.rmtree(two / "align/checkpoints/step-4")
    resumed = run_stage("align", recipe_file, two, *sets)
    assert losses(resumed) == pytest.approx(losses(alone), rel=1e-5)
    assert_same_weights(alone, resumed)
