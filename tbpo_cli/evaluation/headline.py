"""The results of an evaluation in words: against whom the policy is better, and at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tbpo_cli.console import counted

Json = dict[str, Any]

MANY_FLIPS = 0.2  # of the comparisons, whose verdict changes with the order
LEVEL = 0.05  # of all tests together, after Holm's correction

OPPONENTS = {"reference": "its reference", "chosen": "the preferred answers of the data"}


def names_of(run: str, loss: str, others: Sequence[str]) -> dict[str, str]:
    """What the policy is called in words: by its run, where there are others beside it.

    Args:
        run: the name of its run directory.
        loss: that it was trained with.
        others: the names of the other models.
    """
    if not others:
        return {"policy": "policy"}
    return {"policy": run if run not in (*others, *OPPONENTS) else f"{run} ({loss})"}


def headline(results: Json) -> str:
    """A sentence for each opponent, with the 95 % interval, and one for what it cost.

    The policy beats, or loses to, whom both the interval and the test, corrected for the number of
    tests, tell apart from it.
    """
    models = results["models"]
    others = [name for name in models if name not in ("policy", "reference")]
    own = results["names"]["policy"] if others else results["loss"]
    accuracy = models["policy"]["preference"]["all"]["accuracy"]
    judged = [rate for rate in results["win_rates"] if rate["model"] == "policy"]
    tests = [test for test in results["tests"] if test["measure"] == "accuracy"]
    if judged:  # by the first judge
        rates = [rate for rate in judged if rate["judge"] == judged[0]["judge"]]
        sentences = [_of_win_rate(own, rate, results["tests"]) for rate in rates]
    else:
        share = f"{accuracy['value']:.1%} of {counted(accuracy['n'], 'held-out pair')}"
        sentences = [f"{own} prefers the chosen response of {share} ({_interval(accuracy)})"]
        sentences += [_of_accuracy(own, test, len(results["tests"])) for test in tests]
    return ". ".join([*sentences, _cost(models)])


def _of_win_rate(own: str, rate: Json, tests: Sequence[Json]) -> str:
    opponent = OPPONENTS.get(rate["against"], rate["against"])
    raw = rate["raw"]
    if raw is None:
        return f"{rate['judge']} gave no verdict on {own} against {opponent}{_noise(rate)}"
    share = f"{raw['value']:.1%} of {counted(raw['n'], 'prompt')} ({_interval(raw)})"
    share = f"{share}, by {rate['judge']}{_noise(rate)}"
    asked = ("policy", rate["against"], f"win rate, by {rate['judge']}")
    test = next(one for one in tests if (one["model"], one["against"], one["measure"]) == asked)
    doubt = _doubt(test, len(tests))
    if raw["low"] > 0.5 and not doubt:
        return f"{own} beats {opponent}: it wins {share}"
    if raw["high"] < 0.5 and not doubt:
        return f"{own} loses to {opponent}: it wins {share}"
    return f"{own} and {opponent} cannot be told apart{doubt}: {own} wins {share}"


def _doubt(test: Json, num_tests: int) -> str:
    """The p-value of a test in brackets; "" if it is under LEVEL."""
    if test["p_holm"] < LEVEL:
        return ""
    of_all = "" if num_tests == 1 else f" after Holm's correction for {num_tests} tests"
    return f" (p = {test['p_holm']:.2g}{of_all})"


def _noise(rate: Json) -> str:
    """What speaks against the judge's verdicts, in brackets; "" if nothing does."""
    said = []
    if rate.get("unread"):
        share = f"{rate['unread'] / rate['asked']:.1%}"
        said.append(f"whose answer to {share} of {counted(rate['asked'], 'question')} is unread")
    flips = rate.get("inconsistent")
    if flips and flips["value"] > MANY_FLIPS:
        said.append(f"whose verdict changes with the order on {flips['value']:.1%}")
    return f" ({' and '.join(said)})" if said else ""


def _of_accuracy(own: str, test: Json, num_tests: int) -> str:
    difference = test["difference"]
    points = f"{100 * difference['value']:+.1f} points ({_interval(difference)})"
    doubt = _doubt(test, num_tests)
    if difference["low"] > 0 and not doubt:
        return f"it is right more often than {test['against']}: {points}"
    if difference["high"] < 0 and not doubt:
        return f"it is right less often than {test['against']}: {points}"
    return f"{own} and {test['against']} cannot be told apart{doubt}: {points}"


def _cost(models: Json) -> str:
    """How far the policy has moved, and what became of its answers."""
    policy = models["policy"]
    reference = models["reference"]
    kl = policy["preference"]["all"]["kl"]["value"]
    entropy = [one["preference"]["all"]["entropy"]["value"] for one in (reference, policy)]
    parts = [
        f"KL from the reference {kl:z.4f} nats a token",
        f"entropy {entropy[0]:.3f} → {entropy[1]:.3f}",
    ]
    for name, words, form in (
        ("length", "mean length", "{:.1f}"),
        ("self_bleu", "self-BLEU", "{:.1f}"),
    ):
        if name in policy["diversity"]:
            before, after = (
                form.format(one["diversity"][name]["value"]) for one in (reference, policy)
            )
            parts.append(f"{words} {before} → {after}")
    return "Cost: " + ", ".join(parts)


def _interval(figure: Json) -> str:
    return f"95 %: {100 * figure['low']:.1f} to {100 * figure['high']:.1f}"
