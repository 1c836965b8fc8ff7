"""`tbpo eval`: figures that can be computed by hand, or from dense logits, and what a user sees of
it.
"""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import change_recipe, preference_rows, run_stage, write_jsonl, write_recipe
from hub_server import hub
from judge_server import chat_server
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tbpo_cli.config.recipe import Sample, load_recipe
from tbpo_cli.core import oracle
from tbpo_cli.core.types import sum_over_response
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import GateError, TbpoError
from tbpo_cli.evaluation.candidates import check_source
from tbpo_cli.evaluation.diversity import distinct, repetition, self_bleu, spaced, summarise
from tbpo_cli.evaluation.measures import decide, gate_faults, tasks_of
from tbpo_cli.evaluation.preference import calibration_error, reliability
from tbpo_cli.evaluation.stats import (
    figure,
    figure_of,
    jackknife_figure,
    normal_figure,
    rate_figure,
    ratio_figure,
)
from tbpo_cli.model.generate import generate
from tbpo_cli.runs.files import read_sealed, write_sealed

SCORER = "def score(prompt, completion):\n    return len(completion) + prompt.count('red')\n"
SHORT = (
    "align.max_steps=3",
    "align.learning_rate=1e-1",
    "sample.max_new_tokens=8",
    "eval.diversity_prompts=4",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, rows):
    """(recipe, run directory) of an evaluation with a scorer."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "scorer.py").write_text(SCORER)
    scorer = {"scorer": "python:./scorer.py:score"}
    recipe = write_recipe(folder / "tiny.toml", base, rows, judge=scorer)
    return recipe, run_stage(
        "eval", recipe, folder / "run", *SHORT, 'eval.opponents=["reference","chosen"]'
    )


SAME = (*SHORT, 'eval.opponents=["reference","chosen"]')


@pytest.fixture
def copied(whole, tmp_path):
    """(recipe, a copy of the run directory of its own)."""
    shutil.copytree(whole[1], tmp_path / "run")
    return whole[0], tmp_path / "run"


def read(run):
    return json.loads((run / "eval/results.json").read_text(encoding="utf-8"))


def kept(run, what):
    """(file, rows) of a kind of measurement, of the policy and of the reference.

    The reference is the model that has no weights of its own.
    """
    found = {}
    for path in (run / "eval/kept").glob(f"{what}-*.json"):
        content = read_sealed(path)
        name = "policy" if content["depends_on"]["weights"] else "reference"
        found[name] = (path, content["rows"])
    return found


def values(figures):
    return {name: figure["value"] for name, figure in figures.items()}


# Figures


def test_a_figure_whose_error_is_not_known_has_no_interval():
    assert normal_figure(3.0, None, 12) == {"value": 3.0, "low": None, "high": None, "n": 12}
    assert normal_figure(3.0, 0.0, 12)["low"] is None, "all of what was counted is the same"


@pytest.mark.parametrize("number", [1, 2, 5])
def test_of_few_values_no_interval_claims_to_be_certain(number):
    """The range of 5 values misses their median once in 16 times, so that no 95 % are known."""
    values = np.arange(number) + 0.25
    for found in (
        figure(values),
        figure_of(np.median, values),
        ratio_figure(values, np.ones(number)),
        jackknife_figure(0.5, values),
    ):
        assert (found["low"], found["high"], found["n"]) == (None, None, number)
    assert figure(np.full(40, 3.0))["low"] is None, "nothing says how far the mean would vary"


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([1], 0.2065, 1.0),  # Wilson: 1 / (1 + z²), z² = 3.8415
        ([0], 0.0, 0.7935),
        ([1, 1, 1], 0.4385, 1.0),  # 3 / (3 + z²)
        ([0.5] * 8, 0.2152, 0.7848),  # 1/2 ± z/2 / √(8 + z²)
        ([1] * 15 + [0] * 5, 0.5313, 0.8881),
    ],
)
def test_a_rate_has_the_interval_of_wilson_which_is_never_empty(values, low, high):
    found = rate_figure(values)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-4)
    shifted = rate_figure(np.array(values) * 2 - 1, -1)
    assert shifted["low"] == pytest.approx(2 * low - 1, abs=2e-4)
    assert shifted["value"] == pytest.approx(2 * found["value"] - 1)


def test_a_rate_with_many_ties_is_known_better_than_one_without():
    """m = 0.55, s² = 0.0235 of 36 ties and 4 wins: 40 · 0.2475/0.0235 = 421 as good as coins."""
    found = rate_figure([0.5] * 36 + [1.0] * 4)
    assert (found["low"], found["high"]) == pytest.approx((0.5022, 0.5969), abs=2e-3)


def test_a_model_that_says_nothing_is_not_the_most_diverse():
    """Texts that are the same have self-BLEU 100, empty ones as well; those without a common word
    have 0."""
    assert self_bleu(["", "", ""]) == 100 == self_bleu(["one cat", "one cat"])
    assert self_bleu(["", "one red cat sings"]) == 0
    assert self_bleu(["", "", "one red cat sings"]) == pytest.approx(100 / 3)


def test_a_figure_is_a_mean_with_the_interval_that_theory_gives():
    """1,000 draws of N(3, 2): the interval is 3.0… ± 1.96 · 2/√1000, within the noise of 1,000
    resamples.
    """
    draws = np.random.default_rng(0).normal(3, 2, 1000)
    found = figure(draws)
    half = 1.96 * draws.std() / math.sqrt(1000)
    assert found["value"] == pytest.approx(draws.mean()) and found["n"] == 1000
    assert found["low"] == pytest.approx(draws.mean() - half, abs=0.02)
    assert found["high"] == pytest.approx(draws.mean() + half, abs=0.02)
    assert figure(draws) == found


def test_a_ratio_weighs_pairs_by_their_tokens():
    """(2 + 6) / (1 + 3) = 2, though the mean of the ratios 2 and 2 … of 4/1 and 4/3 differs."""
    assert ratio_figure([2, 6], [1, 3])["value"] == 2
    assert ratio_figure([4, 4], [1, 3])["value"] == 2


def test_the_jackknife_of_a_mean_is_its_standard_error():
    sample = np.array([1.0, 4.0, 4.0, 7.0, 4.0, 4.0, 1.0, 7.0, 4.0])
    left_out = [np.delete(sample, index).mean() for index in range(9)]
    error = 1.959964 * sample.std(ddof=1) / 3
    assert jackknife_figure(4.0, left_out) == pytest.approx(
        {"value": 4.0, "low": 4 - error, "high": 4 + error, "n": 9}
    )


def test_the_calibration_error_is_the_gap_between_confidence_and_success():
    """σ(2) = 0.8808 in the bin 0.85–0.9, right 3 of 4; σ(0) = 0.5, half right: ECE = 4/5 · |0.75 −
    0.8808|.
    """
    margins = np.array([2.0, 2.0, 2.0, -2.0, 0.0])
    sure = 1 / (1 + math.exp(-2))
    assert calibration_error(margins) == pytest.approx(0.8 * abs(0.75 - sure))
    assert reliability(margins) == [
        {"predicted": 0.5, "observed": 0.5, "n": 1},
        {"predicted": pytest.approx(sure), "observed": 0.75, "n": 4},
    ]
    interval = figure_of(calibration_error, np.tile(margins, 2))
    assert interval["low"] <= interval["value"] <= interval["high"]


def test_self_bleu_and_distinct_and_repetition_of_texts_by_hand():
    """distinct-1 of "a b a" and "a c": 3 of 5; seq-rep-4 of 1 2 3 4 1 2 3 4: 4 of 5 differ."""
    assert self_bleu(["red cat dog bird tree"] * 3) == pytest.approx(100)
    assert self_bleu(["red cat", "blue dog"]) < self_bleu(["red cat runs", "red cat sings"])
    found = distinct([["a", "b", "a"], ["a", "c"]], 1)
    assert found["value"] == 0.6 and found["n"] == 2
    assert (
        distinct([["a", "b", "a"], ["a", "c"]], 2)["value"] == 1
        and distinct([["a"]], 2)["value"] == 0
    )
    assert distinct([["a", "b"], ["c", "d"]], 2)["low"] is None, "two texts say little"
    mixed = distinct([["a", "a", "a"], *([f"{n}", f"{n}'"] for n in range(5))], 1)
    assert mixed["value"] == 11 / 13 and mixed["high"] == 1.0, "no share is over 1"
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(0.2) and repetition([1, 1]) == 0


CHINESE = ["今天天气很好，我们去公园。", "今天天气不错，我们去公园玩。", "我不知道答案是什么。"]
JAPANESE = ["今日はとてもいい天気です。", "今日はいい天気ですね。", "答えはわかりません。"]


@pytest.mark.parametrize(("texts", "tokenize"), [(CHINESE, "zh"), (JAPANESE, "char")])
def test_in_scripts_without_spaces_each_character_is_a_word(texts, tokenize):
    """The self-BLEU is that of sacrebleu's own tokenizer for the script."""
    from sacrebleu import sentence_bleu

    both = [
        sentence_bleu(one, [other], tokenize=tokenize).score
        for one in texts
        for other in texts
        if one != other
    ]
    assert self_bleu(texts) == pytest.approx(np.mean(both))
    assert self_bleu(texts[:2]) > 5 * self_bleu(texts[1:]) > 0, "the first two are alike"
    assert self_bleu([f"red dog, {texts[0]}", f"red dog, {texts[0]}"]) == 100


def test_texts_in_scripts_with_spaces_keep_their_words():
    texts = [
        "The red dog runs — “fast”, 3.5 times.",
        "Ein süßer Hund läuft; он быстрый! 개가 뛴다 ①",
    ]
    assert [spaced(text) for text in texts] == texts
    apart = "ใช่是のｎ𠀀"
    assert spaced(apart).split() == [*apart]


def test_distinct_counts_characters_where_there_are_no_spaces():
    """Three of six characters are different; of 天天, 天气, 气。 and 天气, three of four."""
    samples = [
        {"prompt_id": name, "sample": 0, "completion": text, "token_ids": [1], "entropy": 0.0}
        | {"finish_reason": "stop"}
        for name, text in (("a", "天天气。"), ("b", "天气"))
    ]
    samples += [one | {"sample": 1} for one in samples]
    found = summarise(samples)
    assert values(found)["distinct_1"] == 0.5 and values(found)["distinct_2"] == 0.75


def test_the_interval_of_distinct_is_that_of_the_shares_without_each_text():
    """Ten texts with one word of their own and one to ten times "a": 11 of 65."""
    texts = [[str(number), *["a"] * number] for number in range(1, 11)]
    found = distinct(texts, 1)
    shares = np.array([10 / (65 - len(text)) for text in texts])
    error = 1.959964 * shares.std() * math.sqrt(9)
    assert found["value"] == pytest.approx(11 / 65)
    assert found["low"] == pytest.approx(11 / 65 - error)
    assert found["high"] == pytest.approx(11 / 65 + error)


def test_diversity_is_a_mean_over_samples_and_then_over_prompts():
    samples = [
        {"prompt_id": prompt, "sample": number, "completion": "Red cat." * length,
        "token_ids": [7] * length,
         "finish_reason": reason, "entropy": entropy}
        for prompt, number, length, reason, entropy in (
            ("a", 0, 1, "stop", 1.0), ("a", 1, 3, "length", 2.0), ("b", 0, 8, "stop", 0.0),
            ("b", 1, 8, "stop", 0.0),
        )
    ]  # fmt: skip
    found = values(figures := summarise(samples))
    assert (
        found["predictive_entropy"] == 0.75 and found["truncated"] == 0.25 and found["length"] == 5
    )
    assert found["repetition"] == pytest.approx((0 + 0.8) / 2), (
        "five 4-grams 7 7 7 7, one of them different"
    )
    assert found["distinct_1"] == pytest.approx(3 / (3 + 24)), (
        "red, cat and . of the first samples alone"
    )
    assert figures["length"]["n"] == 2 and found["length_p50"] == 5.5


def test_the_entropy_of_a_completion_is_that_of_the_whole_distribution(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = Sample(temperature=1.0, top_p=0.5, max_new_tokens=10)
    for completion, prompt in zip(
        generate(model, [[5, 6], [7]], [1, 2], settings, [2]), [[5, 6], [7]], strict=True
    ):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        logps = model(input_ids=ids).logits.detach()[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert completion.entropy == pytest.approx(
            float(-(logps.exp() * logps).sum(-1).mean()), rel=1e-4
        )


# The stage


def test_the_metrics_are_those_of_dense_logits(whole, base):
    """Both models' dense logits of every held-out pair, by transformers and peft alone, through
    core's oracle.
    """
    _, run = whole
    store = PairStore(run / "prepare/eval")
    plain = AutoModelForCausalLM.from_pretrained(base)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), run / "align/adapter"
    )
    sums = {
        name: []
        for name in ("margin", "kl", "reverse_kl", "entropy", "better", "tokens", "aligned")
    }
    for place in range(len(store)):
        pair, sides = store[place], []
        for response in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([[*pair.prompt_ids, *response]])
            logits = [
                model(input_ids=ids).logits.detach()[:, len(pair.prompt_ids) - 1 : -1]
                for model in (tuned, plain)
            ]
            tokens = torch.tensor([list(response)])
            sides.append(
                oracle.side_scores(*logits, tokens, torch.ones_like(tokens, dtype=torch.bool))
            )
        chosen, rejected = sides
        sums["margin"].append(0.1 * float(chosen.log_ratio.sum() - rejected.log_ratio.sum()))
        for name in ("kl", "reverse_kl", "entropy"):
            sums[name].append(
                sum(float(sum_over_response(getattr(side, name), side.mask)) for side in sides)
            )
        sums["tokens"].append(sum(side.mask.shape[1] for side in sides))
        length = pair.aligned_length
        sums["better"].append(
            int((chosen.advantage[:, :length] > rejected.advantage[:, :length]).sum())
        )
        sums["aligned"].append(length)
    found, total = values(read(run)["models"]["policy"]["preference"]["all"]), sum(sums["tokens"])
    assert found["margin"] == pytest.approx(np.mean(sums["margin"]), rel=1e-4)
    assert found["accuracy"] == np.mean(np.array(sums["margin"]) > 0)
    assert found["token_accuracy"] == pytest.approx(sum(sums["better"]) / sum(sums["aligned"]))
    for name in ("kl", "reverse_kl", "entropy"):
        assert found[name] == pytest.approx(sum(sums[name]) / total, rel=1e-4), name
    assert found["kl"] != pytest.approx(found["reverse_kl"], rel=1e-3), "two different directions"


def test_the_metrics_are_those_of_the_last_evaluation_in_training(whole):
    _, run = whole
    last = json.loads((run / "align/metrics.jsonl").read_text().splitlines()[-1])
    found = values(read(run)["models"]["policy"]["preference"]["all"])
    for name in found.keys() - {"ece"}:
        assert found[name] == pytest.approx(last[name], rel=1e-4, abs=1e-6), name


def test_the_reference_has_only_what_means_something_for_it(whole):
    _, run = whole
    reference = read(run)["models"]["reference"]["preference"]
    assert (
        list(reference["all"]) == ["entropy", "logps_chosen", "logps_rejected"]
        and reference["reliability"] == []
    )
    first = json.loads((run / "align/metrics.jsonl").read_text().splitlines()[0])
    assert values(reference["all"]) == pytest.approx(
        {name: first[name] for name in reference["all"]}, rel=1e-4
    )


def test_every_pair_is_in_one_bucket_of_its_length(whole):
    _, run = whole
    policy = read(run)["models"]["policy"]["preference"]
    buckets = policy["buckets"]
    assert (
        1 < len(buckets) <= 4 and sum(bucket["metrics"]["margin"]["n"] for bucket in buckets) == 8
    )
    ends = [end for bucket in buckets for end in (bucket["shortest"], bucket["longest"])]
    assert ends == sorted(ends)
    mean = (
        sum(
            bucket["metrics"]["margin"]["value"] * bucket["metrics"]["margin"]["n"]
            for bucket in buckets
        )
        / 8
    )
    assert mean == pytest.approx(policy["all"]["margin"]["value"])
    assert sum(each["n"] for each in policy["reliability"]) == 8


def test_scores_and_win_rates_are_those_of_the_samples(whole):
    _, run = whole
    results, score = read(run), {}
    exec(SCORER, score)
    samples = [json.loads(line) for line in (run / "sample/samples.jsonl").read_text().splitlines()]
    scores = {
        (sample["model"], sample["prompt_id"]): score["score"](
            sample["messages"][-1]["content"], sample["completion"]
        )
        for sample in samples
    }
    prompts = sorted({sample["prompt_id"] for sample in samples})
    for model in ("policy", "reference"):
        mean = np.mean([scores[model, prompt] for prompt in prompts])
        assert results["models"][model]["score"]["value"] == pytest.approx(mean)
    gaps = [scores["policy", prompt] - scores["reference", prompt] for prompt in prompts]
    against_reference, against_chosen = results["win_rates"]
    assert against_reference["raw"]["value"] == pytest.approx(
        np.mean([(gap > 0) + (gap == 0) / 2 for gap in gaps])
    )
    assert (against_reference["against"], against_chosen["against"]) == ("reference", "chosen")
    lines = [json.loads(line) for line in (run / "eval/verdicts.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and lines[0]["judge"] == "scorer.py:score"
    texts = {row["prompt"]: row["chosen"] for row in preference_rows(8, seed=1)}
    for line in lines[8:]:
        own = next(s for s in samples if s["prompt_id"] == line["prompt_id"])
        chosen = texts[own["messages"][-1]["content"]]
        assert line["scores"][1] == score["score"](own["messages"][-1]["content"], chosen)


def test_a_language_model_judges_beside_a_scorer_and_is_asked_nothing_twice(copied, monkeypatch):
    """It likes whatever stands first: all verdicts are inconsistent ties. The gate's win rate is
    the least of both judges' against both opponents.
    """
    recipe, run = copied
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    with chat_server(lambda body: "The first one. [[A]]") as server:
        sets = (
            *SAME,
            "eval.diversity_prompts=0",
            f"judge.endpoint={server.url}",
            "judge.model=judge-1",
        )
        run_stage("eval", recipe, run, *sets, restart=True)
        asked = len(server.requests)
        run_stage("eval", recipe, run, *sets, "eval.gate=win_rate >= 0", restart=True)
        assert len(server.requests) == asked > 0
    results = read(run)
    scorer, judge = (entry for entry in results["win_rates"] if entry["against"] == "reference")
    assert (scorer["judge"], judge["judge"]) == ("scorer.py:score", "judge-1")
    assert (
        judge["raw"]["value"] == 0.5
        and judge["inconsistent"]["value"] == 1
        and judge["prompt_tokens"] > 0
    )
    assert (
        results["gate"]["value"] == min(rate["raw"]["value"] for rate in results["win_rates"])
        and "scorer.py:score" in results["verdict"]
    )
    lines = [json.loads(line) for line in (run / "eval/verdicts.jsonl").read_text().splitlines()]
    assert any("The first one." in line["reason"] for line in lines if line["judge"] == "judge-1")
    assert (
        "a-key"
        not in (run / "eval/report.html").read_text() + (run / "eval/results.json").read_text()
    )


def test_a_scorer_that_fails_for_some_answers_leaves_them_out_and_the_evaluation_goes_on(
    copied, capsys
):
    """The scorer fails for one of the data's own answers: seven of eight are compared."""
    recipe, run = copied
    before = read(run)
    failing = preference_rows(8, seed=1)[0]["chosen"]
    fault = f"\n    if completion == {failing!r}:\n        raise ValueError('not that one')"
    code = SCORER.replace("(prompt, completion):", f"(prompt, completion):{fault}", 1)
    assert code != SCORER
    (recipe.parent / "scorer.py").write_text(code)
    try:
        run_stage("eval", recipe, run, *SAME)
    finally:
        (recipe.parent / "scorer.py").write_text(SCORER)
    assert "gives no mark to 1 of " in capsys.readouterr().err
    results = read(run)
    against_reference, against_chosen = results["win_rates"]
    assert against_reference == before["win_rates"][0]
    assert (against_chosen["raw"]["n"], against_chosen["unreadable"]) == (7, 1)
    lines = [json.loads(line) for line in (run / "eval/verdicts.jsonl").read_text().splitlines()]
    (failed,) = (line for line in lines if line["verdict"] is None)
    assert failed["scores"] is None and "not that one" in failed["reason"]


def test_diversity_follows_the_protocol(whole):
    _, run = whole
    rows = kept(run, "diversity")["policy"][1]
    assert len(rows) == 4 * 5 and max(len(row["token_ids"]) for row in rows) <= 128
    found = read(run)["models"]["policy"]["diversity"]
    assert found["predictive_entropy"]["n"] == 4 and 0 < found["predictive_entropy"][
        "value"
    ] < math.log(400)
    assert set(found) == {"predictive_entropy", "self_bleu", "distinct_1", "distinct_2",
    "distinct_3", "distinct_4",
                          "repetition", "truncated", "length", "length_p5", "length_p50",
                          "length_p95"}  # fmt: skip


def test_what_was_measured_is_not_measured_again_after_an_interruption(copied):
    recipe, run = copied
    before = read(run)
    part, rows = kept(run, "preference")["policy"]
    kept(run, "diversity")["reference"][0].unlink()
    for name in ("manifest.json", "results.json"):
        (run / "eval" / name).unlink()
    measured = read_sealed(part)
    write_sealed(part, measured | {"rows": [row | {"log_ratio": 1.0} for row in rows]})
    after = read(run_stage("eval", recipe, run, *SAME))
    assert after["models"]["policy"]["preference"]["all"]["margin"]["value"] == pytest.approx(
        0.1
    ), "β · 1: it was kept"
    assert after["models"]["reference"] == before["models"]["reference"]


def test_only_what_is_new_is_measured(copied, tmp_path, capsys):
    """An opponent, a length of the diversity and a scorer are added, taken away and added again."""
    recipe, run = copied
    before = read(run)
    shutil.copytree(run / "align/adapter", tmp_path / "twin")
    twin = f"eval.against=['{tmp_path / 'twin'}']"
    run_stage("eval", recipe, run, *SAME, twin)
    lines = capsys.readouterr().err
    assert "pairs, twin" in lines and "diversity, twin" in lines and "answers, twin" in lines
    for known in ("pairs, policy", "pairs, reference", "diversity, policy", "diversity, reference"):
        assert known not in lines
    assert read(run)["models"]["twin"]["preference"] == before["models"]["policy"]["preference"]
    assert read(run)["names"] == {"policy": "run"}
    (accuracy, *of_wins) = read(run)["tests"]
    assert (accuracy["against"], accuracy["difference"]["value"], accuracy["p"]) == ("twin", 0, 1)
    assert len(of_wins) == 5, "the policy against three, its twin against two"
    assert "run and twin cannot be told apart" in read(run)["verdict"]
    for sets in ((), (twin,), ("eval.gate=kl >= 0",)):
        run_stage("eval", recipe, run, *SAME, *sets)
        lines = capsys.readouterr().err
        assert "pairs, " not in lines and "diversity, " not in lines and "answers, " not in lines
        assert "scorer.py:score" not in lines, "each answer has its score already"
    again = read(run)
    assert again["win_rates"] == before["win_rates"] and again["verdict"] == before["verdict"]
    for name in ("policy", "reference"):
        assert again["models"][name]["preference"] == before["models"][name]["preference"]
        assert again["models"][name]["diversity"] == before["models"][name]["diversity"]
    run_stage("eval", recipe, run, *SAME, "eval.diversity_prompts=3")
    lines = capsys.readouterr().err
    assert "diversity, policy" not in lines and "pairs, " not in lines, "three are among the four"
    assert read(run)["models"]["policy"]["diversity"]["length"]["n"] == 3
    (recipe.parent / "scorer.py").write_text(SCORER.replace("'red'", "'blue'"))
    try:
        run_stage("eval", recipe, run, *SAME)
    finally:
        (recipe.parent / "scorer.py").write_text(SCORER)
    assert "pairs, " not in capsys.readouterr().err, "another scorer scores, and that is all"


def test_a_file_of_answers_is_an_opponent(copied, tmp_path, capsys):
    """AlpacaEval's format. By length the file's answers win: the scorer likes the longer one."""
    recipe, run = copied
    lines = [json.loads(line) for line in (run / "sample/samples.jsonl").read_text().splitlines()]
    prompts = sorted({line["messages"][-1]["content"] for line in lines})
    rows = [{"instruction": text, "output": "red " * 50, "generator": "b"} for text in prompts[:6]]
    folder = tmp_path / "baseline"
    folder.mkdir()
    (folder / "model_outputs.json").write_text(json.dumps(rows))
    answers = f"eval.answers=['{folder / 'model_outputs.json'}']"
    run_stage("eval", recipe, run, *SAME, answers, "eval.gate=win_rate.baseline <= 0")
    rate = next(rate for rate in read(run)["win_rates"] if rate["against"] == "baseline")
    assert (rate["losses"], rate["wins"], rate["raw"]["n"]) == (6, 0, 6)
    # Six losses have p = 2/64, and three tests are made.
    verdict = read(run)["verdict"]
    assert "baseline cannot be told apart (p = 0.0" in verdict
    assert "wins 0.0% of 6 prompts (95 %: 0.0 to 39.0)" in verdict
    printed = capsys.readouterr().err
    assert "answers 6 of 8 prompts" in " ".join(printed.split()) and "pairs, " not in printed
    assert read(run)["gate"]["passed"]
    rows = [row | {"instruction": "another"} for row in rows]
    (folder / "model_outputs.json").write_text(json.dumps(rows))
    with pytest.raises(TbpoError, match="none of 8 prompts is answered there"):
        run_stage("eval", recipe, run, *SAME, answers)


def test_answers_to_the_same_questions_are_an_opponent_by_their_ids(copied, tmp_path):
    """Arena-Hard 0.1: an answer has the id of its question. The scorer likes length."""
    recipe, run = copied
    questions = [{"question_id": f"q{n}", "turns": [{"content": f"red {n}"}]} for n in range(3)]
    prompts = write_jsonl(tmp_path / "question.jsonl", questions)
    said = [{"turns": [{"content": "red " * 50}]}]
    answers = [{"question_id": f"q{n}", "choices": said} for n in (2, 0)]
    answers = write_jsonl(tmp_path / "baseline.jsonl", answers)
    sets = (*SHORT, f"sample.prompts={prompts}", f"eval.answers=['{answers}']")
    run_stage("eval", recipe, run, *sets, "eval.opponents=[]", restart=True)
    (rate,) = read(run)["win_rates"]
    assert (rate["against"], rate["losses"], rate["raw"]["n"]) == ("baseline", 2, 2)


def test_other_runs_stand_beside_the_policy(copied, tmp_path):
    """The same adapter by its folder has the policy's figures; a run with β = 0.2 has its own loss,
    β and label.
    """
    recipe, run = copied
    other = run_stage(
        "align", recipe, tmp_path / "wide", *SHORT, "align.loss.name=dpo", "align.loss.beta=0.2"
    )
    shutil.copytree(run / "align/adapter", tmp_path / "same")
    shutil.copy(run / "recipe.toml", tmp_path / "same")  # as `tbpo push` publishes it
    against = f"eval.against=['{tmp_path / 'same'}', '{other}']"
    run_stage("eval", recipe, run, *SAME, against, restart=True)
    models = read(run)["models"]
    assert (
        list(models) == ["policy", "reference", "same", "wide"] and models["wide"]["loss"] == "dpo"
    )
    for what in ("preference", "diversity", "score"):
        assert models["same"][what] == models["policy"][what], what
    last = json.loads((other / "align/metrics.jsonl").read_text().splitlines()[-1])
    assert models["wide"]["preference"]["all"]["margin"]["value"] == pytest.approx(
        last["margin"], rel=1e-4
    )
    pairings = [(entry["model"], entry["against"]) for entry in read(run)["win_rates"]]
    assert pairings == [("policy", other) for other in ("reference", "chosen", "same", "wide")] + [
        (model, other) for model in ("same", "wide") for other in ("reference", "chosen")
    ]
    ties = next(entry for entry in read(run)["win_rates"] if entry["against"] == "same")
    assert ties["raw"]["value"] == 0.5 and ties["ties"] == 8, (
        "the same weights draw the same samples"
    )


def test_an_adapter_of_the_hub_stands_beside_the_policy(copied, tmp_path, executable):
    recipe, run = copied
    shutil.copytree(run / "align/adapter", tmp_path / "hub/models/org/tuned")
    sets = [part for one in (*SAME, "eval.diversity_prompts=0") for part in ("--set", one)]
    sources = ("org/tuned", "org/tuned@main")
    with hub(tmp_path / "hub") as (address, _):
        environment = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
        }
        done = executable(
            "eval",
            recipe,
            "--run-dir",
            run,
            *sets,
            "--restart",
            "--against",
            *sources,
            **environment,
        )
        assert done.returncode == 0, done.stderr
    models = read(run)["models"]
    for source in sources:
        found = models[source.removeprefix("org/")]
        assert found["source"] == source and found["preference"] == models["policy"]["preference"]


def test_processes_share_pairs_and_prompts(copied, tbpo):
    recipe, run = copied
    before = read(run)
    sets = [part for one in SAME for part in ("--set", one)]
    done = tbpo("eval", recipe, "--run-dir", run, *sets, "--restart", "--gpus", "2", "--cpu")
    assert done.returncode == 0, done.stderr
    after = read(run)
    for model in before["models"]:
        for what in ("preference", "diversity"):
            found, expected = (each["models"][model][what] for each in (after, before))
            found, expected = (values(figures.get("all", figures)) for figures in (found, expected))
            assert found == pytest.approx(expected, rel=1e-5), what


@pytest.mark.parametrize(
    "changes",
    [
        {"sft": {"batch_examples": 8, "max_steps": 2, "learning_rate": 1e-2}},
        {"model": {"lora": None}},
    ],
    ids=["sft", "full"],
)
def test_the_reference_is_the_one_of_alignment(base, rows, tmp_path, changes):
    """The SFT adapter after [sft]; without LoRA, a model of its own. Before it learns anything, KL
    = 0 and all tie.
    """
    align = {"max_steps": 1, "learning_rate": 1e-9}
    write_recipe(tmp_path / "r.toml", base, rows, align=align, **changes)
    against = f"eval.against=['{tmp_path / 'run'}']"
    run_stage("align", tmp_path / "r.toml", tmp_path / "run")
    (tmp_path / "scorer.py").write_text(SCORER)
    sets = (
        f"judge.scorer=python:{tmp_path / 'scorer.py'}:score",
        "sample.models=['policy']",
        "eval.diversity_prompts=0",
    )
    run_stage(
        "eval", tmp_path / "r.toml", tmp_path / "run", "sample.max_new_tokens=4", against, *sets
    )
    models, win_rates = read(tmp_path / "run")["models"], read(tmp_path / "run")["win_rates"]
    assert [(entry["ties"], entry["raw"]["value"]) for entry in win_rates] == [(8, 0.5)] * 3
    for name in ("policy", "run"):
        assert models[name]["preference"]["all"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    found, expected = (
        models[name]["preference"]["all"]["entropy"] for name in ("policy", "reference")
    )
    assert (
        found["value"] == pytest.approx(expected["value"], rel=1e-5)
        and models["policy"]["diversity"] == {}
    )


# The gate


def test_the_gate_makes_the_exit_code_and_decides_again(copied, tbpo):
    recipe, run = copied
    sets = [part for one in SAME for part in ("--set", one)]
    for gate, code in (("accuracy >= 0", 0), ("reference.entropy > 100", 4)):
        done = tbpo("eval", recipe, "--run-dir", run, *sets, "--set", f"eval.gate={gate}")
        assert done.returncode == code, done.stderr
        assert "up to date" in done.stderr and "reward accuracy" in done.stdout, (
            "it shows the same again"
        )
        assert (
            read(run)["gate"]["passed"] == (code == 0) and read(run)["gate"]["expression"] == gate
        )
        assert ("the gate failed: reference.entropy > 100 does not hold" in done.stderr) == (
            code == 4
        )
        assert gate.replace(">", "&gt;") in (run / "eval/report.html").read_text()


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ("acuracy > 0.5", "did you mean accuracy?"),
        ("win_rate > 0.5", "needs a judge: a table [judge]"),
        ("accuracy", "gate must be NAME > NUMBER"),
        ("accuracy > high", "gate must be NAME > NUMBER"),
        ("__import__('os') > 1", "is not: did you mean"),
        ("reference.accuracy > 0", "did you mean"),
        ("accuracy.hi > 0.5", "did you mean"),
    ],
)
def test_a_gate_that_is_none_is_a_fault_of_the_recipe(recipe_file, gate, expected):
    recipe = load_recipe(recipe_file, (f"eval.gate={gate}",))
    (fault,) = gate_faults(recipe, "my.toml")
    assert fault.what == "eval.gate is not possible" and fault.where == "my.toml, [eval] gate"
    assert expected in fault.expected


def test_gates_may_name_tasks_labels_and_parts_of_an_interval(recipe_file):
    sets = (
        "eval.suites=['open-llm-v1', 'x/letters.yaml']",
        "eval.against=['runs/dpo', 'b/align/adapter']",
    )
    for gate in ("gsm8k.low >= 0.3", "letters>1e-3", "dpo.kl < 0.1", "b.self_bleu.high != 3",
     "reference.mmlu<=1",
                 "length < -.5"):  # fmt: skip
        recipe = load_recipe(recipe_file, (*sets, f"eval.gate={gate}"))
        assert gate_faults(recipe, "my.toml") == []


def test_a_gate_reads_the_figure_that_it_names(whole):
    results = read(whole[1])
    against_reference, against_chosen = results["win_rates"]
    policy, reference = (results["models"][name] for name in ("policy", "reference"))
    for name, value in {
        "win_rate.chosen": against_chosen["raw"]["value"],
        "length_controlled_win_rate.chosen.high": against_chosen["length_controlled"]["high"],
        "policy.kl": policy["preference"]["all"]["kl"]["value"],
        "reference.entropy.low": reference["preference"]["all"]["entropy"]["low"],
        "reference.self_bleu": reference["diversity"]["self_bleu"]["value"],
        "score.n": 8,
    }.items():
        decided = {"expression": f"{name} >= {value!r}", "value": value, "passed": True}
        if "win_rate" in name:
            decided |= {"against": "chosen", "judge": against_chosen["judge"], "comparisons": 1}
        assert decide(f"{name} >= {value!r}", results) == decided
    least = min(rate["raw"]["value"] for rate in (against_reference, against_chosen))
    assert decide("win_rate > 0", results)["value"] == least
    other = decide("win_rate.other > 0", results)
    assert (other["value"], other["passed"], other["against"]) == (None, False, "other")


def test_a_failed_gate_is_raised_after_everything_is_written(copied):
    recipe, run = copied
    (run / "eval/manifest.json").unlink()
    with pytest.raises(GateError) as error:
        run_stage("eval", recipe, run, *SAME, "eval.gate=kl > 1000")
    assert (
        error.value.exit_code == 4
        and (run / "eval/manifest.json").exists()
        and read(run)["gate"]["passed"] is False
    )


def entry(against, judge, value, model="policy"):
    rate = None if value is None else {"value": value}
    return {"model": model, "against": against, "judge": judge, "raw": rate}


@pytest.mark.parametrize(
    ("gate", "passed", "of_whom", "value"),
    [
        ("win_rate > 0.5", False, ("chosen", "b"), 0.4),
        ("win_rate > 0.39", True, ("chosen", "b"), 0.4),
        ("win_rate < 0.65", False, ("reference", "b"), 0.7),
        ("win_rate == 0.6", False, ("chosen", "b"), 0.4),
        ("win_rate != 0.55", False, ("chosen", "a"), 0.55),
        ("win_rate.reference > 0.5", True, ("reference", "a"), 0.6),
        ("win_rate.chosen >= 0.5", False, ("chosen", "b"), 0.4),
        ("win_rate.mute > 0", False, ("mute", "a"), None),
    ],
)
def test_a_gate_that_names_no_opponent_holds_against_each_and_by_each_judge(
    gate, passed, of_whom, value
):
    rates = [
        entry("reference", "a", 0.6), entry("chosen", "a", 0.55),
        entry("reference", "b", 0.7), entry("chosen", "b", 0.4),
        entry("reference", "a", 0.0, "dpo"),
    ]  # fmt: skip
    results = {
        "models": {},
        "win_rates": [*rates, *([entry("mute", "a", None)] * ("mute" in gate))],
    }
    decided = decide(gate, results)
    assert (decided["passed"], decided["value"]) == (passed, value)
    assert (decided["against"], decided["judge"]) == of_whom
    assert decided["comparisons"] == (1 if "mute" in gate else 2 if "." in gate.split()[0] else 4)


def test_a_gate_does_not_hold_where_one_opponent_has_no_verdict():
    results = {
        "models": {},
        "win_rates": [entry("reference", "a", 0.9), entry("chosen", "a", None)],
    }
    decided = decide("win_rate > 0", results)
    assert (decided["passed"], decided["value"], decided["against"]) == (False, None, "chosen")


# What cannot be


def test_something_that_is_no_model_is_reported_before_anything_is_run(recipe_file, tmp_path, tbpo):
    done = tbpo("eval", recipe_file, "--against", tmp_path, "runs/dpo")
    assert done.returncode == 2 and "there is nothing to compare with" in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()
    for source in (str(tmp_path), "/no/such/run", "word"):
        with pytest.raises(TbpoError, match="there is nothing to compare with"):
            check_source(source)


def test_an_evaluation_starts_no_training(recipe_file, tmp_path, tbpo):
    done = tbpo("eval", recipe_file)
    assert done.returncode == 2 and "the run has no aligned policy" in done.stderr, done.stderr
    assert "fix: first: tbpo align" in done.stderr and not (tmp_path / "runs").exists()


def test_a_run_from_another_base_is_refused(copied, tmp_path, base, rows):
    recipe, run = copied
    shutil.copytree(base, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.norm.weight.data *= 1.5
    model.save_pretrained(tmp_path / "base")
    other = run_stage(
        "align", recipe, tmp_path / "other", *SHORT, f"model.base={tmp_path / 'base'}"
    )
    with pytest.raises(TbpoError, match="another base"):
        run_stage("eval", recipe, run, *SAME, f"eval.against=['{other}']", restart=True)


def test_an_adapter_of_another_shape_is_refused(copied, tmp_path):
    recipe, run = copied
    shutil.copytree(run / "align/adapter", tmp_path / "wide")
    config = json.loads((tmp_path / "wide/adapter_config.json").read_text())
    (tmp_path / "wide/adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(TbpoError, match=r"what eval\.against names cannot be loaded"):
        run_stage("eval", recipe, run, *SAME, f"eval.against=['{tmp_path / 'wide'}']", restart=True)


def test_another_function_of_the_same_file_is_another_scorer(whole):
    from tbpo_cli.runs.run_dir import RunDir
    from tbpo_cli.stages.chain import STAGES

    recipe, run = whole
    loaded = load_recipe(
        recipe, (*SAME, f"judge.scorer=python:{recipe.parent / 'scorer.py'}:other")
    )
    assert RunDir(run).changes(STAGES["eval"], loaded) == ['judge.scorer.name: "score" → "other"']


# Suites


def test_the_tasks_and_shots_are_those_of_the_first_open_llm_leaderboard():
    shots = {"hellaswag": 10, "arc_challenge": 25, "mmlu": 5, "truthfulqa_mc2": 0}
    shots |= {"winogrande": 5, "gsm8k": 5}
    assert dict(tasks_of("open-llm-v1")) == shots
    assert dict(tasks_of("gsm8k-chat")) == {"gsm8k_cot_llama": 8}
    assert dict(tasks_of("ifeval")) == {"ifeval": None}, "as many as the task itself says"


TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


PERPLEXITY = """
task: perplexity
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
"""


def test_the_real_harness_runs_a_local_task_on_the_adapter(copied, tmp_path):
    """Whose log-probability is higher, " cat" or " dog": by the harness, and by the merged model's
    own logits.
    """
    pytest.importorskip("lm_eval")
    recipe, run = copied
    questions = [
        {"question": f"one {number}", "choices": [" cat", " dog"], "label": number % 2}
        for number in range(6)
    ]
    task = tmp_path / "letters.yaml"
    task.write_text(TASK.format(data=write_jsonl(tmp_path / "letters.jsonl", questions)))
    texts = [{"text": f"one {word} and two"} for word in ("cat", "dog", "red")]
    other = tmp_path / "words.yaml"  # a file's name stands for its task
    other.write_text(PERPLEXITY.format(data=write_jsonl(tmp_path / "texts.jsonl", texts)))
    run_stage("eval", recipe, run, *SAME, f"eval.suites=['{task}', '{other}']", restart=True)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "align/adapter")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(load_recipe(recipe).model.base), run / "align/adapter"
    ).merge_and_unload()
    right = 0
    for row in questions:
        totals = []
        for choice in row["choices"]:
            context, ids = (
                tokenizer(row["question"])["input_ids"],
                tokenizer(row["question"] + choice)["input_ids"],
            )
            logps = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(ids[1:])[:, None]
            totals.append(float(logps.gather(1, targets)[len(context) - 1 :].sum()))
        right += int(np.argmax(totals)) == row["label"]
    found = read(run)["models"]["policy"]["suites"][str(task)]["letters"]
    assert (
        found["value"] == pytest.approx(right / 6)
        and found["n"] == 6
        and found["metric"] == "acc,none"
    )
    assert found["low"] <= found["value"] <= found["high"]
    unknown = read(run)["models"]["policy"]["suites"][str(other)]["words"]
    assert unknown["value"] > 1 and unknown["metric"] == "word_perplexity,none"
    assert unknown["low"] is None and unknown["high"] is None, "the harness knows no error of it"
    assert decide("words > 0", read(run))["passed"]
    assert not decide("words.low > 0", read(run))["passed"]
    write_jsonl(
        tmp_path / "letters.jsonl", [row | {"label": 1 - row["label"]} for row in questions]
    )
    run_stage("eval", recipe, run, *SAME, f"eval.suites=['{task}', '{other}']")
    changed = read(run)["models"]["policy"]["suites"][str(task)]["letters"]
    assert changed["value"] == pytest.approx(1 - right / 6), "rows of a task are inputs, too"


CHAT = """
task: gsm8k_cot_llama
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: generate_until
test_split: test
num_fewshot: 2
fewshot_config:
  sampler: first_n
  samples:
    - {{question: "two", answer: "2"}}
    - {{question: "red", answer: "cat"}}
doc_to_text: "{{{{question}}}}?"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs:
  until: []
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""


def test_a_chat_task_has_the_models_template_and_its_shots_as_turns(copied, tmp_path, monkeypatch):
    """What the harness asks the template for, and what it gives the model to go on from."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    rendered, asked = [], []
    render, generate_until = HFLM.apply_chat_template, HFLM._model_generate

    def recorded(self, messages, **options):
        rendered.append((messages, render(self, messages, **options)))
        return rendered[-1][1]

    def generated(self, context, **options):
        asked.append((self.tokenizer.batch_decode(context), options["eos_token_id"]))
        return generate_until(self, context=context, **options)

    monkeypatch.setattr(HFLM, "apply_chat_template", recorded)
    monkeypatch.setattr(HFLM, "_model_generate", generated)
    recipe, run = copied
    rows = [{"question": "one", "answer": "1"}]
    chat, plain = tmp_path / "gsm8k_cot_llama.yaml", tmp_path / "letters.yaml"
    chat.write_text(CHAT.format(data=write_jsonl(tmp_path / "rows.jsonl", rows)))
    question = [{"question": "one", "choices": [" cat", " dog"], "label": 0}]
    plain.write_text(TASK.format(data=write_jsonl(tmp_path / "letters.jsonl", question)))
    suites = f"eval.suites=['{chat}', '{plain}']"
    run_stage("eval", recipe, run, *SAME, suites, restart=True)
    turns = [("user", "two?"), ("assistant", "2"), ("user", "red?"), ("assistant", "cat")]
    for messages, _ in rendered:  # of the policy and of the reference; of the plain task none
        assert [(m["role"], m["content"]) for m in messages] == [*turns, ("user", "one?")]
    assert len(rendered) == len(asked) == 2
    assert all(given == [text] for (given, _), (_, text) in zip(asked, rendered, strict=True))
    assert asked[0][1] == [2], "the token at which the template ends an answer"
    found = read(run)["models"]["policy"]["suites"]
    assert found[str(chat)]["gsm8k_cot_llama"]["chat_template"] is True
    assert found[str(plain)]["letters"]["chat_template"] is False
    page = (run / "eval/report.html").read_text(encoding="utf-8")
    assert "gsm8k_cot_llama.yaml, with the chat template" in page
    assert "letters.yaml, without a chat template" in page


def test_ifeval_is_the_task_of_the_harness(base, rows, tmp_path, monkeypatch):
    """On rows of our own, in a folder of the data set's name: the answers that have no comma."""
    for package in ("lm_eval", "langdetect", "immutabledict", "nltk"):
        pytest.importorskip(package)
    long = shutil.copytree(base, tmp_path / "base")  # for answers of up to 1,280 tokens
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    recipe, run = write_recipe(tmp_path / "tiny.toml", long, rows), tmp_path / "run"
    kinds = {"red": "punctuation:no_comma", "one": "punctuation:no_comma"}
    kinds["red dog"] = "change_case:english_capital"
    held_out = [
        {"key": n, "prompt": text, "instruction_id_list": [kind], "kwargs": [{"end_phrase": None}]}
        for n, (text, kind) in enumerate(kinds.items())
    ]
    (tmp_path / "google/IFEval").mkdir(parents=True)
    write_jsonl(tmp_path / "google/IFEval/train.jsonl", held_out)
    monkeypatch.chdir(tmp_path)
    run_stage("eval", recipe, run, *SHORT, "eval.suites=['ifeval']", "eval.gate=ifeval >= 0")
    found = read(run)["models"]["policy"]["suites"]["ifeval"]["ifeval"]
    assert found["metric"] == "prompt_level_strict_acc,none" and found["n"] == 3
    assert found["chat_template"] is True and read(run)["gate"]["passed"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "align/adapter")
    model = AutoModelForCausalLM.from_pretrained(load_recipe(recipe).model.base)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True
        )["input_ids"]
        for row in held_out[:2]
    ]
    greedy = Sample(temperature=0.0, top_p=1.0, max_new_tokens=1280)
    answers = tokenizer.batch_decode(
        [list(one.token_ids) for one in generate(model, prompts, [0, 1], greedy, [2])],
        skip_special_tokens=True,
    )
    right = sum("," not in answer and bool(answer.strip()) for answer in answers)
    of_reference = read(run)["models"]["reference"]["suites"]["ifeval"]["ifeval"]
    assert right and of_reference["value"] == pytest.approx(right / 3)


def test_a_missing_harness_or_an_unknown_task_is_a_message(monkeypatch):
    from tbpo_cli.evaluation.suites import check_suites

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(TbpoError, match="which is not installed") as error:
            check_suites(["open-llm-v1"])
        assert error.value.fix == "pip install 'tbpo[suites]'"
    pytest.importorskip("lm_eval")
    check_suites(["open-llm-v1", "gsm8k"])
    with pytest.raises(TbpoError, match="no such suite or task: helaswag") as error:
        check_suites(["helaswag"])
    assert error.value.fix == "did you mean hellaswag?"


def test_the_held_out_prompts_are_meant_also_where_a_folder_is_called_eval(recipe_file, tmp_path):
    (tmp_path / "eval").mkdir()
    change_recipe(recipe_file, sample={"prompts": "eval"})
    assert load_recipe(recipe_file).sample.prompts == "eval"
