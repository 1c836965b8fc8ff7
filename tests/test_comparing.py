"""Several models in one report: what is said of them, tests for all of them, and their names."""

import numpy as np
import pytest

from tbpo_cli.evaluation.headline import headline, names_of
from tbpo_cli.evaluation.paired import holm, paired_tests, sign_flip_p


def figure(value, spread=0.05, n=40):
    return {"value": value, "low": value - spread, "high": value + spread, "n": n}


def model(accuracy, kl, entropy, length, bleu):
    return {
        "preference": {
            "all": {"accuracy": figure(accuracy), "kl": figure(kl), "entropy": figure(entropy)}
        },
        "diversity": {"length": figure(length), "self_bleu": figure(bleu)},
    }


def win_test(against, judge, p):
    measure = f"win rate, by {judge}"
    return {"model": "policy", "against": against, "measure": measure, "p_holm": p}


def results(*rates, others=(), tests=()):
    models = {"policy": model(0.7, 0.12, 1.5, 80, 20.0), "reference": model(0, 0, 1.75, 60, 12.5)}
    models |= {name: model(0.6, 0.05, 1.6, 70, 15.0) for name in others}
    win_rates = [
        {"model": "policy", "against": against, "judge": judge, "raw": raw}
        for against, judge, raw in rates
    ]
    names = names_of("mine", "tbpo_a", list(others))
    found = {"loss": "tbpo_a", "models": models, "names": names}
    return found | {"win_rates": win_rates, "tests": list(tests)}


COST = (
    "Cost: KL from the reference 0.1200 nats a token, entropy 1.750 → 1.500, "
    "mean length 60.0 → 80.0, self-BLEU 12.5 → 20.0"
)


def test_the_headline_says_of_each_opponent_who_is_better_and_what_it_cost():
    rates = [
        ("reference", "fair", figure(0.7)), ("chosen", "fair", figure(0.3)),
        ("dpo", "fair", figure(0.52)), ("sft", "fair", None), ("reference", "other", figure(0.9)),
    ]  # fmt: skip
    tests = [
        win_test(against, judge, 0.3 if against == "dpo" else 0.001) for against, judge, _ in rates
    ]
    assert headline(results(*rates, others=("dpo", "sft"), tests=tests)) == (
        "mine beats its reference: it wins 70.0% of 40 prompts (95 %: 65.0 to 75.0), by fair. "
        "mine loses to the preferred answers of the data: "
        "it wins 30.0% of 40 prompts (95 %: 25.0 to 35.0), by fair. "
        "mine and dpo cannot be told apart (p = 0.3 after Holm's correction for 5 tests): "
        "mine wins 52.0% of 40 prompts (95 %: 47.0 to 57.0), by fair. "
        f"fair gave no verdict on mine against sft. {COST}"
    )


def test_an_interval_beyond_a_half_is_no_victory_where_the_corrected_test_sees_none():
    """One of many opponents is beaten by chance."""
    rates = [("reference", "fair", figure(0.56)), ("chosen", "fair", figure(0.44))]
    tests = [win_test(against, "fair", 0.06) for against, _, _ in rates]
    said = headline(results(*rates, tests=tests))
    assert "beats" not in said and "loses" not in said
    assert said.count("cannot be told apart (p = 0.06 after Holm's correction for 2 tests)") == 2


def test_without_a_judge_the_held_out_pairs_decide():
    tests = [
        {"against": name, "measure": "accuracy", "difference": figure(value), "p_holm": p}
        for name, value, p in (("dpo", 0.1, 0.01), ("sft", -0.1, 0.04), ("twin", 0.01, 1.0))
    ]
    assert headline(results(others=("dpo", "sft", "twin"), tests=tests)) == (
        "mine prefers the chosen response of 70.0% of 40 held-out pairs (95 %: 65.0 to 75.0). "
        "it is right more often than dpo: +10.0 points (95 %: 5.0 to 15.0). "
        "it is right less often than sft: -10.0 points (95 %: -15.0 to -5.0). "
        "mine and twin cannot be told apart (p = 1 after Holm's correction for 3 tests): "
        f"+1.0 points (95 %: -4.0 to 6.0). {COST}"
    )
    assert headline(results()).startswith("tbpo_a prefers the chosen response of 70.0%")


def test_a_run_bears_its_name_where_there_are_others():
    assert names_of("mine", "dpo", []) == {"policy": "policy"}
    assert names_of("mine", "dpo", ["yours"]) == {"policy": "mine"}
    assert names_of("mine", "dpo", ["mine"]) == {"policy": "mine (dpo)"}
    assert names_of("reference", "dpo", ["mine"]) == {"policy": "reference (dpo)"}


def test_p_values_of_several_tests_are_corrected_after_holm():
    """3 · 0.01; then 2 · 0.03; 1 · 0.04 is no smaller than that before it."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_the_p_value_of_a_difference_is_the_share_of_signs_that_do_as_well():
    """Of 2^8 draws of signs two are as far from zero as eight equal ones."""
    assert sign_flip_p(np.ones(8)) == pytest.approx(2 / 256, abs=0.003)
    assert sign_flip_p(np.array([1.0, -1.0] * 4)) == 1.0
    assert sign_flip_p(np.zeros(5)) == 1.0


def test_models_are_compared_on_the_same_pairs_and_prompts():
    """Right on 3 of 4 and on 1 of 4 pairs: +1/2. Two samples a prompt: (1 + 1)/2 and (0 + 1)/2."""
    pairs = {
        "policy": [{"pair": n, "log_ratio": value} for n, value in enumerate((1, 1, 1, -1))],
        "dpo": [
            {"pair": n, "log_ratio": value} for n, value in ((3, 0.0), (2, -1), (1, 2), (0, -3))
        ],
    }
    lines = [
        {"model": "policy", "against": "dpo", "judge": "j", "prompt_id": prompt, "verdict": value}
        for prompt, value in (("a", 1.0), ("a", 1.0), ("b", 0.0), ("b", 1.0), ("b", None))
    ]
    accuracy, wins = paired_tests(pairs, lines)
    assert (accuracy["model"], accuracy["against"]) == ("policy", "dpo")
    assert accuracy["difference"]["value"] == 0.5 and accuracy["difference"]["n"] == 4
    assert wins["measure"] == "win rate, by j" and wins["difference"]["value"] == 0.25
    assert wins["difference"]["n"] == 2
    assert [accuracy["p_holm"], wins["p_holm"]] == holm([accuracy["p"], wins["p"]])
