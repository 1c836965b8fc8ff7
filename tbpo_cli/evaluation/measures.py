"""What `tbpo eval` measures, by name, and the gate on one of these figures that decides the exit
code.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.config.validate import fault
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.answers import distinct_names, names_of_answers

NUM_GRAMS, PERCENTILES = 4, (5, 50, 95)
# name: (what a person reads, how it is written)
COMPARING = {  # a model with the reference, which has none of these itself
    "accuracy": ("reward accuracy", "{:.1%}"),
    "margin": ("reward margin, nats", "{:.3f}"),
    "token_accuracy": ("token accuracy", "{:.1%}"),
    "ece": ("calibration error (ECE)", "{:.3f}"),
    "kl": ("KL(ref ‖ model), nats/token", "{:z.4f}"),
    "reverse_kl": ("KL(model ‖ ref), nats/token", "{:z.4f}"),
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

# name: (task of lm-eval, shots) each. Source: arXiv 2605.12288; they are the tasks of the first
# Open LLM Leaderboard.
SUITES = {
    "open-llm-v1": (
        ("hellaswag", 10),
        ("arc_challenge", 25),
        ("mmlu", 5),
        ("truthfulqa_mc2", 0),
        ("winogrande", 5),
        ("gsm8k", 5),
    ),
    "gsm8k-chat": (("gsm8k_cot_llama", 8),),
}
# Tasks of lm-eval whose published setting is a chat: the model's template, shots as turns before
# the question. `ifeval`: arXiv 2311.07911; the others: arXiv 2407.21783, which names them so.
CHAT_TASKS = frozenset(
    {
        "ifeval",
        "leaderboard_ifeval",
        "gsm8k_cot_llama",
        "gsm8k_platinum_cot_llama",
        "arc_challenge_chat",
        "asdiv_cot_llama",
    }
)

# sign: (whether it holds of a value and a bound, by how much)
COMPARISONS: dict[str, tuple[Callable[[float, float], bool], Callable[[float, float], float]]] = {
    ">=": (operator.ge, lambda value, bound: value - bound),
    "<=": (operator.le, lambda value, bound: bound - value),
    "==": (operator.eq, lambda value, bound: -abs(value - bound)),
    "!=": (operator.ne, lambda value, bound: abs(value - bound)),
    ">": (operator.gt, lambda value, bound: value - bound),
    "<": (operator.lt, lambda value, bound: bound - value),
}
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
GATE = re.compile(rf"\s*(\S+?)(?:\.(low|high|n))?\s*({'|'.join(COMPARISONS)})\s*({NUMBER})\s*")


def tasks_of(suite: str) -> tuple[tuple[str, int | None], ...]:
    """(task, shots) of an entry of `eval.suites`; None for the task's own number of shots."""
    return SUITES.get(suite, ((suite, None),))


def is_chat(task: str) -> bool:
    """Whether a task, or the task in a YAML file of its name, is run as a chat."""
    return Path(task).stem in CHAT_TASKS


def setting_of(suite: str) -> str:
    """How a suite is run, in words."""
    has_template = all(is_chat(task) for task, _ in tasks_of(suite))
    return f"{'with the' if has_template else 'without a'} chat template"


def labels(sources: Sequence[str]) -> list[str]:
    """What models of `eval.against` are called: by their runs' names, with the folders above where
    these are not distinct.
    """
    paths = [Path(source) for source in sources]
    runs = [path.parents[1] if path.parent.name == "align" else path for path in paths]
    return distinct_names(sources, runs)


def gate_faults(recipe: Recipe, path: str) -> list[TbpoError]:
    """What is wrong with `eval.gate`: it is no condition, or is one on what the recipe does not
    measure.

    Args:
        path: of the recipe, for messages.
    """
    expected = _gate_fault(recipe) if recipe.eval.gate else ""
    if not expected:
        return []
    return [fault("eval.gate is not possible", path, ("eval", "gate"), expected)]


def _gate_fault(recipe: Recipe) -> str:
    """What is expected of a gate in place of the one that is given; "" if it is right."""
    settings = recipe.eval
    is_judged = recipe.judge_of_eval is not None
    if not (found := GATE.fullmatch(settings.gate)):
        return "gate must be NAME > NUMBER (or >=, <, <=, ==, !=), as in win_rate > 0.5"
    tasks = [Path(task).stem for suite in settings.suites for task, _ in tasks_of(suite)]
    own = [
        *OWN,
        *(DIVERSITY if settings.diversity_prompts else ()),
        *(SCORE if is_judged else ()),
        *tasks,
    ]
    others = labels(settings.against)
    figures = dict.fromkeys(("policy", "reference", *others), dict.fromkeys((*COMPARING, *own)))
    figures["reference"] = dict.fromkeys(own)
    of_files = names_of_answers(settings.answers, others)
    opponents = (*settings.opponents, *of_files, *others) if is_judged else ()
    names = _named(figures, {other: dict.fromkeys(WIN_RATES) for other in opponents})
    name = found[1]
    if name in names:
        return ""
    if name.partition(".")[0] in (*WIN_RATES, *SCORE) and not is_judged:
        return f"gate must name what is measured; {name} needs a judge: a table [judge]"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.3) or ["accuracy"]
    return f"gate must name what is measured, and {name} is not: did you mean {near[0]}?"


def decide(gate: str, results: dict[str, Any]) -> dict[str, Any] | None:
    """{"expression", "value", "passed"} of a checked gate, None for an empty one.

    It names a figure (`kl`, `reference.entropy`, `win_rate.chosen`, …), or its .low, .high or .n.
    What the results do not have has the value None, and does not pass. A win rate must meet it
    against every opponent, if none is named, by every judge: the value is the one that is furthest
    from that, "against" and "judge" say whose it is, and "comparisons" among how many.
    """
    if (match := GATE.fullmatch(gate)) is None:
        return None
    name, part, comparison, bound = match.groups()
    holds, margin = COMPARISONS[comparison]
    rate, _, against = name.partition(".")
    decided: dict[str, Any] = {"expression": gate.strip()}
    if rate in WIN_RATES:
        found = [
            ((entry[WIN_RATES[rate]] or {}).get(part or "value"), entry)
            for entry in results["win_rates"]
            if entry["model"] == "policy" and against in ("", entry["against"])
        ]
        missing = {"against": against or "any opponent", "judge": ""}
        value, entry = min(
            found,
            key=lambda each: -math.inf if each[0] is None else margin(each[0], float(bound)),
            default=(None, missing),
        )
        of_whom = {"against": entry["against"], "judge": entry["judge"], "comparisons": len(found)}
    else:
        value = (_figures(results).get(name) or {}).get(part or "value")
        of_whom = {}
    passed = value is not None and holds(value, float(bound))
    return decided | {"value": value, "passed": passed} | of_whom


def _figures(results: dict[str, Any]) -> dict[str, Any]:
    """The figures of models by all their names."""
    figures = {}
    for model, entry in results["models"].items():
        tasks = {
            task: figure for suite in entry["suites"].values() for task, figure in suite.items()
        }
        figures[model] = {
            **entry["preference"]["all"],
            **entry["diversity"],
            "score": entry["score"],
            **tasks,
        }
    return _named(figures, {})


def _named(
    models: dict[str, dict[str, Any]], win_rates: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Figures by all their names: MODEL.NAME, or NAME of the policy; RATE.OPPONENT, or RATE against
    all of them.
    """
    named = {
        f"{model}.{name}": figure
        for model, figures in models.items()
        for name, figure in figures.items()
    }
    named |= {
        f"{name}.{other}": figure
        for other, rates in win_rates.items()
        for name, figure in rates.items()
    }
    return named | models["policy"] | next(iter(win_rates.values()), {})
