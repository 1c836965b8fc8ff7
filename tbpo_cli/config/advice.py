"""What to write in place of wrong values and tables that are often met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Names of [judge] endpoint elsewhere.
ADDRESSES = ("url", "base_url", "api_base", "server", "address", "host")

_TRAINING = "a training is the table [align] (of preferences) or [sft] (of demonstrations)"
_ADAPTER = "the adapter is the table [model.lora]"
_ROWS = 'the rows are named in the table [data]: train = "FILE or Hub data set"'

# Tables of other tools and of guesses: where their keys belong.
TABLES = {
    **dict.fromkeys(("training", "train", "trainer", "training_args", "optimizer"), _TRAINING),
    **dict.fromkeys(("dpo", "preference", "alignment"), "it is the table [align]"),
    **dict.fromkeys(("peft", "peft_config", "lora", "lora_config", "adapter"), _ADAPTER),
    **dict.fromkeys(("dataset", "datasets"), _ROWS),
    **dict.fromkeys(("evaluation",), "it is the table [eval]"),
    **dict.fromkeys(("generation", "sampling"), "it is the table [sample]"),
    **dict.fromkeys(("hub",), "it is the table [push]"),
    **dict.fromkeys(("loss",), "it is the table [align.loss]"),
}

Advice = tuple[str, str]  # what is expected, and what to write
_NUMBER_OF_PAIRS = (
    "for a number of pairs, divide it by all pairs, or name rows of their own: data.eval"
)


def _of_lora(given: Any) -> Advice | None:
    expected = "a table [model.lora]; without one, all weights are trained"
    if given is True:
        return expected, "write a line [model.lora] below the keys of [model], and remove lora"
    return (expected, "remove the line") if given is False else None


def _of_eval_fraction(given: Any) -> Advice | None:
    if isinstance(given, bool) or not isinstance(given, int | float) or given < 1:
        return None
    expected = "a share of the prompts below 1, such as 0.05"
    return expected, f"eval_fraction = 0.05; {_NUMBER_OF_PAIRS}"


def _of_warmup(given: Any) -> Advice | None:
    if isinstance(given, bool) or not isinstance(given, int | float) or given <= 1:
        return None
    expected = "a share of the steps from 0 to 1, such as 0.05, not a number of steps"
    percent = f"for {given:g} %, warmup = {given / 100:g}; " if given <= 100 else ""
    steps = f"for {given:g} steps, {given:g} divided by all steps, which tbpo show counts"
    return expected, percent + steps


OF_VALUES: dict[str, Callable[[Any], Advice | None]] = {
    "model.lora": _of_lora,
    "data.eval_fraction": _of_eval_fraction,
    "align.warmup": _of_warmup,
    "sft.warmup": _of_warmup,
}


def advice_on(key: str, given: Any) -> Advice | None:
    """What is expected of a key and what to write, if its wrong value is one often met."""
    return OF_VALUES[key](given) if key in OF_VALUES else None
