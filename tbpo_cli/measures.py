"""What `tbpo eval` measures, by name, and the gate on one of these figures that decides the exit code."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbpo_cli.recipe import Eval

NUM_GRAMS, PERCENTILES = 4, (5, 50, 95)
# name: (what a person reads, how it is written)
COMPARING = {  # a model with the reference, which has none of these itself
    "accuracy": ("reward accuracy", "{:.1%}"),
    "margin": ("reward margin, nats", "{:.3f}"),
    "token_accuracy": ("token accuracy", "{:.1%}"),
    "ece": ("calibration error (ECE)", "{:.3f}"),
    "kl": ("KL(ref ‖ model), nats/token", "{:.4f}"),
    "reverse_kl": ("KL(model ‖ ref), nats/token", "{:.4f}"),
}
OWN = {
    "entropy": ("entropy, nats/token", "{:.3f}"),
    "logps_chosen": ("log p of chosen tokens", "{:.3f}"),
    "logps_rejected": ("log p of rejected tokens", "{:.3f}"),
}
PREFERENCE = COMPARING | OWN
DIVERSITY = {
    "predictive_entropy": ("predictive entropy, nats", "{:.3f}"),
    "self_bleu": ("self-BLEU", "{:.1f}"),
    **{f"distinct_{n}": (f"distinct-{n}", "{:.3f}") for n in range(1, NUM_GRAMS + 1)},
    "repetition": ("repeated 4-grams", "{:.1%}"),
    "truncated": ("cut at 128 tokens", "{:.1%}"),
    "length": ("mean length, tokens", "{:.1f}"),
    **{f"length_p{q}": (f"length, {q}th percentile", "{:.0f}") for q in PERCENTILES},
}
SCORE = {"score": ("score of the completions", "{:.3f}")}
MEASURES = PREFERENCE | DIVERSITY | SCORE
WIN_RATES = {"win_rate": "raw", "length_controlled_win_rate": "length_controlled"}

# name: (task of lm-eval, shots) each. Source: arXiv 2605.12288; they are the tasks of the first Open LLM Leaderboard.
SUITES = {
    "open-llm-v1": (
        ("hellaswag", 10), ("arc_challenge", 25), ("mmlu", 5), ("truthfulqa_mc2", 0), ("winogrande", 5), ("gsm8k", 5),
    )
}  # fmt: skip

COMPARISONS = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
GATE = re.compile(rf"\s*(\S+?)\s*({'|'.join(COMPARISONS)})\s*([-+.\deE]+)\s*")
PARTS = (".low", ".high", ".n")


def labels(sources: Sequence[str]) -> list[str]:
    """What models of `eval.against` are called: by their runs' names, or their paths where that would not tell them."""
    paths = [Path(source) for source in sources]
    names = [(path.parents[1] if path.parent.name == "align" else path).name for path in paths]
    return names if len({*names, "policy", "reference", "chosen"}) == len(names) + 3 else list(sources)


def check_gate(settings: Eval) -> None:
    """Raises ValueError if `eval.gate` is no condition, or is one on what the recipe does not measure."""
    found = GATE.fullmatch(settings.gate)
    if not found or not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", found[3]):
        raise ValueError("gate must be NAME > NUMBER (or >=, <, <=, ==, !=), as in win_rate > 0.5")
    name, names = found[1], _possible_names(settings)
    if name in names or any(name.removesuffix(part) in names for part in PARTS):
        return
    if name.partition(".")[0] in (*WIN_RATES, *SCORE) and not settings.judged:
        raise ValueError(f"gate must name what is measured; {name} needs a scorer, a reward_model or a judge")
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.3) or ["accuracy"]
    raise ValueError(f"gate must name what is measured, and {name} is not: did you mean {near[0]}?")


def decide(gate: str, results: dict[str, Any]) -> dict[str, Any] | None:
    """{"expression", "value", "passed"} of a checked gate, None for an empty one.

    NAME is that of a figure (`kl`, `reference.entropy`, `win_rate.chosen`, …), and may end in .low, .high or .n. What
    the results do not have has the value None, and does not pass.
    """
    if (match := GATE.fullmatch(gate)) is None:
        return None
    name, comparison, bound = match.groups()
    known, (owner, _, part) = _figures(results), name.rpartition(".")
    figure = known.get(name) or known.get(owner) or {}
    value = figure.get("value" if name in known else part)
    return {
        "expression": gate.strip(),
        "value": value,
        "passed": value is not None and COMPARISONS[comparison](value, float(bound)),
    }


def _figures(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every figure of the results by its names."""
    known: dict[str, dict[str, Any]] = {}
    for entry in reversed([entry for entry in results["win_rates"] if entry["model"] == "policy"]):
        for name, key in WIN_RATES.items():
            known |= {name: entry[key], f"{name}.{entry['against']}": entry[key]}
    for model, entry in results["models"].items():
        tasks = {task: figure for suite in entry["suites"].values() for task, figure in suite.items()}
        own = {**entry["preference"]["all"], **entry["diversity"], "score": entry["score"], **tasks}
        known |= {f"{model}.{name}": figure for name, figure in own.items()} | (own if model == "policy" else {})
    return known


def _possible_names(settings: Eval) -> list[str]:
    """What `_figures` will know."""
    own = [*OWN, *(DIVERSITY if settings.diversity_prompts else ()), *(SCORE if settings.judged else ())]
    for suite in settings.suites:
        own += [task for task, _ in SUITES.get(suite, ((Path(suite).stem, None),))]
    others = labels(settings.against)
    names = [*COMPARING, *own, *(f"reference.{name}" for name in own)]
    names += [f"{model}.{name}" for model in ("policy", *others) for name in (*COMPARING, *own)]
    if settings.judged:
        names += [*WIN_RATES, *(f"{rate}.{other}" for rate in WIN_RATES for other in (*settings.opponents, *others))]
    return names
