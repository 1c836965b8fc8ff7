"""`tbpo eval` with a language model as judge: a server on loopback, asked by the command itself."""

import html
import json
import re
from collections import Counter

import pytest
from conftest import WORDS, write_jsonl
from judge_server import chat_completion, chat_server

REPEATS = 3
THEIRS = "the answer of the file, which says [[A]] and [[B]]"
CASES = ("wins", "loses", "flips", "unread", "cut", "noisy", "ties")
PROMPTS = {case: f"{case} {word}" for case, word in zip(CASES, WORDS, strict=False)}


def judge_of(asked):
    """A judge whose answer to each prompt is known; in a noisy case the first repeat differs.

    Args:
        asked: counts the requests by their content.
    """

    def answer(body):
        content = body["messages"][0]["content"]
        if content == "Say yes.":  # whether the server answers at all
            return "yes"
        case = next(case for case, prompt in PROMPTS.items() if prompt in content)
        repeat = asked[content]
        asked[content] += 1
        first = content.split("[Answer of A]\n")[1]
        is_policy_first = not first.startswith("the answer of the file")
        for_policy, for_file = ("[[A]]", "[[B]]") if is_policy_first else ("[[B]]", "[[A]]")
        if case == "unread":  # it quotes both answers, one of which holds labels
            return f"I cannot say: {first}"
        if case == "cut":
            return chat_completion("At first sight [[A]]", finish_reason="length")
        noisy = for_policy if repeat == 0 else for_file
        said = {"wins": for_policy, "loses": for_file, "flips": "[[A]]", "ties": "[[C]]"}
        return f"Because of {case}. {said.get(case, noisy)}"

    return answer


@pytest.fixture
def evaluated(trained, finished, tmp_path, tbpo):
    """Runs the command with the judge; gives results, report, verdicts and the server's counts."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p} for p in PROMPTS.values()])
    rows = [{"instruction": prompt, "output": THEIRS} for prompt in PROMPTS.values()]
    (tmp_path / "theirs.json").write_text(json.dumps(rows))
    asked = Counter()

    def run(*more, code=0):
        sets = {
            "sample.prompts": prompts,
            "sample.max_new_tokens": 6,
            "eval.answers": "['theirs.json']",
            "eval.opponents": "[]",
            "eval.diversity_prompts": 0,
            "judge.endpoint": server.url,
            "judge.model": "judge-1",
            "judge.repeats": REPEATS,
            "judge.concurrency": 1,
            "judge.body": "{temperature = 1.0}",
            "judge.price_per_million": "[1.0, 2.0]",
        }
        flags = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
        where = ("eval", trained / "tiny.toml", "--run-dir", finished)
        done = tbpo(*where, *flags, *more)
        assert done.returncode == code, done.stderr
        if code:
            return done.stderr
        folder = finished / "eval"
        warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING: judge")]
        page = html.unescape(re.sub("<[^>]*>", " ", (folder / "report.html").read_text()))
        return (
            json.loads((folder / "results.json").read_text()),
            re.sub(r"\s+", " ", page),
            [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()],
            asked,
            warnings,
        )

    with chat_server(judge_of(asked)) as server:
        run.server = server
        yield run


def test_repeats_flips_unread_and_cut_answers_are_in_the_figures_and_on_the_page(evaluated):
    """1, 0, ½ (flips), ⅓ (noisy), ½ (tie): 7/15 of 5 prompts; 1 of 5 flips; ⅓ of one unlike."""
    results, page, lines, asked, warnings = evaluated()
    (rate,) = results["win_rates"]
    assert (rate["model"], rate["against"], rate["judge"]) == ("policy", "theirs", "judge-1")
    assert rate["raw"]["value"] == pytest.approx(7 / 15) and rate["raw"]["n"] == 5
    assert rate["raw"]["low"] < 0.2 and rate["raw"]["high"] > 0.75, "five prompts say little"
    assert (rate["wins"], rate["ties"], rate["losses"], rate["unreadable"]) == (1, 2, 2, 2)
    assert rate["inconsistent"]["value"] == pytest.approx(1 / 5)
    assert (rate["asked"], rate["unread"]) == (42, 12), "two cases of both orders and all repeats"
    assert "by judge-1 (whose answer to 28.6% of 42 questions is unread)" in results["verdict"]
    (warning,) = warnings
    assert "judge-1 gave no verdict that can be read to 28.6% of its questions" in warning
    assert rate["unlike_repeats"]["value"] == pytest.approx(1 / 15)
    requests = len(CASES) * 2 * REPEATS
    assert sum(asked.values()) == requests
    tokens = (rate["prompt_tokens"], rate["completion_tokens"])
    assert tokens == (100 * requests, 10 * requests)
    assert rate["cost"] == pytest.approx(requests * (100 * 1 + 10 * 2) / 1e6)
    values = {case: line["verdict"] for case, line in zip(CASES, lines, strict=True)}
    assert values.pop("noisy") == pytest.approx(1 / 3)
    assert values == {"wins": 1, "loses": 0, "flips": 0.5, "unread": None, "cut": None, "ties": 0.5}
    by_case = dict(zip(CASES, lines, strict=True))
    assert by_case["flips"]["consistent"] is False and by_case["wins"]["consistent"] is True
    assert "(cut off: length)" in by_case["cut"]["reason"]
    (test,) = results["tests"]
    said = (
        f"cannot be told apart (p = {test['p_holm']:.2g}): tbpo_a wins 46.7% of 5 prompts (95 %: "
    )
    assert said in results["verdict"]
    for shown in (
        "policy – theirs, by judge-1",
        "46.7%",
        "20.0%",
        "6.7%",
        "no verdict against theirs, by judge-1",
        "ties with theirs, by judge-1, not in both orders: 1. Because of flips. [[A]]",
        "0.33 of a win against theirs, by judge-1",
        "wins against theirs, by judge-1: 1. Because of wins.",
        "8 held-out pairs, 7 prompts.",
    ):
        assert shown in page, shown


def test_another_start_asks_for_cut_answers_alone(evaluated):
    """And with more repeats for these only."""
    evaluated()
    *_, asked, _ = evaluated("--restart")
    first = len(CASES) * 2 * REPEATS
    assert sum(asked.values()) == first + 2 * REPEATS
    results, *_, asked, _ = evaluated("--restart", "--set", f"judge.repeats={REPEATS + 1}")
    assert sum(asked.values()) == first + 2 * REPEATS + 2 * (REPEATS + 1) + (len(CASES) - 1) * 2
    (rate,) = results["win_rates"]
    assert rate["raw"]["value"] == pytest.approx((1 + 0 + 1 / 2 + 1 / 4 + 1 / 2) / 5)


ONCE = ("--set", "judge.repeats=1")


@pytest.mark.parametrize(
    "answer",
    [
        "no idea",
        None,
        "<think>maybe [[A]] or",
        chat_completion("thinking [[A]] seems", finish_reason="length"),
    ],
)
def test_a_judge_that_says_nothing_of_all_is_an_error_and_passes_no_gate(evaluated, answer):
    evaluated.server.answer = lambda body: answer
    stderr = evaluated(*ONCE, "--set", "eval.gate=win_rate > 0.4", code=2)
    assert "judge-1 gave no verdict on any of 7 comparisons" in stderr
    assert "[[A]], [[B]] or [[C]]" in stderr and "judge.template" in stderr


def test_a_judge_that_looks_at_the_position_alone_is_a_warning_and_in_the_headline(evaluated):
    evaluated.server.answer = lambda body: "I think [[A]]"
    results, *_, warnings = evaluated(*ONCE)
    (warning,) = warnings
    assert "changes its verdict with the order of the two answers on 100.0%" in warning
    assert "(whose verdict changes with the order on 100.0%)" in results["verdict"]


def test_a_gate_on_a_win_rate_holds_against_each_opponent_and_says_which_is_the_least(evaluated):
    """The file's answers always win, the reference ties: the gate fails, unless it names that."""

    def answer(body):
        _, _, answers = body["messages"][0]["content"].partition("[Answer of A]\n")
        is_file_first, start = answers.startswith(THEIRS[:10]), f"\n{THEIRS[:10]}"
        return "[[A]]" if is_file_first else "[[B]]" if start in answers else "[[C]]"

    evaluated.server.answer = answer
    more = ("--set", "eval.opponents=['reference']", "--set")
    stderr = evaluated(*ONCE, *more, "eval.gate=win_rate > 0.4", code=4)
    assert "measured 0 against theirs, by judge-1, the least of 2 comparisons" in stderr
    _, page, *_ = evaluated(*ONCE, *more, "eval.gate=win_rate.reference > 0.4")
    assert "Gate win_rate.reference > 0.4: 0.5 against reference, by judge-1, passed." in page


def test_opponents_that_the_judge_is_mute_about_take_no_part_in_tests(evaluated):
    """It speaks of the file's answers alone: the other opponent has no rate, and no p-value."""

    def said(body):
        return "[[C]]" if THEIRS.split(",")[0] in body["messages"][0]["content"] else "Hm."

    evaluated.server.answer = said
    results, *_, warnings = evaluated(*ONCE, "--set", "eval.opponents=['reference']")
    rates = {rate["against"]: rate["raw"] and rate["raw"]["value"] for rate in results["win_rates"]}
    assert rates == {"reference": None, "theirs": 0.5}
    assert [test["against"] for test in results["tests"]] == ["theirs"]
    assert "judge-1 gave no verdict on tbpo_a against its reference (whose" in results["verdict"]
    assert len(warnings) == 1
