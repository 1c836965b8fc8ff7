"""A recipe: frozen dataclasses whose fields are the TOML keys, and reading it from its file."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter

from tbpo_cli.config.choosing import Choose
from tbpo_cli.config.evaluation import Eval, Push, Sample
from tbpo_cli.config.judging import Judge
from tbpo_cli.config.keys import hint_for_unknown, may_be_absent
from tbpo_cli.config.loss import complete_loss
from tbpo_cli.config.rounds import Rounds
from tbpo_cli.config.toml import apply_overrides, not_finite, read_toml, resolve_paths
from tbpo_cli.config.training import Align, Data, Lora, Model, Run, Sft, Source, Sources, Training
from tbpo_cli.config.validate import place, table, validate
from tbpo_cli.errors import TbpoError, gather

__all__ = [
    "Align",
    "Choose",
    "Data",
    "Eval",
    "Judge",
    "Lora",
    "Model",
    "Push",
    "Recipe",
    "Rounds",
    "Run",
    "Sample",
    "Sft",
    "Source",
    "Sources",
    "Training",
    "load_recipe",
    "sources",
]

# (stage, whether an adapter is trained): the default learning rate.
# align, all weights: 1e-6, as in the DPO paper (arXiv 2305.18290) and TRL's DPOConfig.
# sft, all weights: 2e-5, as in Zephyr (arXiv 2310.16944) and TRL's SFTConfig.
# An adapter takes ten times as much, whatever the size of the model: "LoRA Without Regret"
# (Schulman et al., Thinking Machines, 2025), TRL's page on PEFT; 2e-4 for sft is also QLoRA's
# (arXiv 2305.14314).
DEFAULT_RATES = {
    ("align", True): 1e-5,
    ("align", False): 1e-6,
    ("sft", True): 2e-4,
    ("sft", False): 2e-5,
}


@table
class Recipe:
    """A whole recipe. `sft = None` means that there is no SFT stage, `rounds = None` that the pairs
    are those of the rows.
    """

    run: Run
    model: Model
    data: Data
    choose: Choose = field(default_factory=Choose)
    judge: Judge | None = None
    rounds: Rounds | None = None
    sft: Sft | None = None
    align: Align = field(default_factory=Align)
    sample: Sample = field(default_factory=Sample)
    eval: Eval = field(default_factory=Eval)
    push: Push = field(default_factory=Push)

    def __post_init__(self) -> None:
        if self.rounds is not None and self.sft is not None:
            what = "cannot stand beside [rounds]: name what an SFT run made as model.adapter"
            raise ValueError(f"sft {what}, or as model.base")
        if self.rounds is not None and self.align.start is not None:
            what = "align.start cannot stand beside [rounds], which begin from the reference"
            raise ValueError(f"{what}: name that as model.adapter, or as model.base")
        if self.rounds is not None and self.rounds.endpoint and self.model.lora is None:
            raise ValueError("rounds.endpoint needs [model.lora]: a server loads adapters only")
        judges = self.judge.named if self.judge is not None else ()
        if self.rounds is not None and len(judges) != 1:
            found = f"[judge] names {len(judges)}: {', '.join(judges)}"
            wanted = found if judges else "a table [judge]"
            raise ValueError(f"rounds needs one judge, whose marks choose: {wanted}")
        for name, stage in (("sft", self.sft), ("align", self.align)):
            if stage is None:
                continue
            if self.model.quantization is not None and stage.sharding == "fsdp":
                what = "cannot be fsdp where model.quantization is given"
                raise ValueError(f"{name}.sharding {what}")
            if stage.learning_rate is None:
                rate = DEFAULT_RATES[name, self.model.lora is not None]
                object.__setattr__(self, name, replace(stage, learning_rate=rate))

    @property
    def training_stages(self) -> tuple[str, ...]:
        """The names of the training stages that the recipe has, in order."""
        return ("align",) if self.sft is None else ("sft", "align")

    @property
    def judge_of_eval(self) -> Judge | None:
        """Who judges for `tbpo eval`: [eval.judge], else [judge]."""
        return self.judge if self.eval.judge is None else self.eval.judge

    @property
    def table_of_judge(self) -> str:
        """The name of the table that `judge_of_eval` is."""
        return "judge" if self.eval.judge is None else "eval.judge"

    @property
    def same_judges(self) -> tuple[str, ...]:
        """The judges of `tbpo eval` that also choose the training pairs, by their keys."""
        if self.rounds is None or self.judge is None or self.judge_of_eval is None:
            return ()
        return tuple(
            f"{self.table_of_judge}.{kind}" for kind in self.judge.in_common(self.judge_of_eval)
        )

    @property
    def two_sigma_answers(self) -> int | None:
        """The answers to a prompt in rounds, if choose.pairs = "best_two_sigma" chooses of them."""
        if self.rounds is None or self.choose.pairs != "best_two_sigma":
            return None
        return self.rounds.answers

    def settings(self) -> dict[str, Any]:
        """{"table.key": value} with every default; keys without a value are left out."""
        return _flatten(_plain(self))

    def to_toml(self) -> str:
        """The resolved recipe as TOML; loading it gives this recipe again."""
        import tomli_w

        return tomli_w.dumps(_plain(self))


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads, completes and checks a recipe.

    Args:
        path: the TOML file; relative paths in it are relative to it.
        overrides: "table.key=value" each; the value is TOML, else text. Relative paths are
            relative to the current folder.

    Raises:
        TbpoError: with every fault that the recipe has.
    """
    hint = partial(hint_for_unknown, Recipe)
    raw = read_toml(path)
    resolve_paths(raw, path.parent)
    faults = apply_overrides(raw, overrides, partial(may_be_absent, Recipe), hint)
    if isinstance(raw.setdefault("run", {}), dict):
        raw["run"].setdefault("name", path.stem)
    if isinstance(align := raw.setdefault("align", {}), dict):
        align["loss"], loss_faults = complete_loss(align.get("loss", {}), str(path), hint)
        if loss_faults:
            del align["loss"]  # the other keys are checked all the same
        faults += loss_faults
    recipe, recipe_faults = validate(Recipe, raw, str(path), (), hint)
    gather(_placed(faults + recipe_faults, str(path), overrides))
    gather(not_finite(raw))
    return cast(Recipe, recipe)


def _placed(faults: list[TbpoError], path: str, overrides: tuple[str, ...]) -> list[TbpoError]:
    """Faults, of which those of keys that --set has given are where that is."""
    given = [override.partition("=")[0].strip() for override in overrides]
    at = {
        place(path, tuple(key.split("."))): key for name in given for key in (name, f"{name}.name")
    }
    overriding: dict[str, Any] = {}
    apply_overrides(overriding, overrides, partial(may_be_absent, Recipe))
    # The keys of the tables that --set has given whole, as in align.loss={name = "dpo", beta = 1}.
    inner = {
        place(path, tuple(key.split("."))): (name, key)
        for key in _flatten(overriding)
        for name in given
        if key.startswith(f"{name}.")
    }
    placed = []
    for fault in faults:
        name = key = at.get(fault.where, "")
        name, key = (name, key) if key else inner.get(fault.where, ("", ""))
        if key:
            fault = replace(fault, where=f"--set {name}", fix=_as_option(fault.fix, key))
        placed.append(fault)
    return placed


def _as_option(fix: str, key: str) -> str:
    """What to do about a key that --set has given; a line of a recipe in the form of --set."""
    line = fix.removeprefix("without quotes: ")
    name, is_line, text = line.partition(" = ")
    if is_line and key.rpartition(".")[2] == name:
        with suppress(ValueError):
            value = json.loads(text)
            return f"--set {shlex.quote(f'{key}={value if isinstance(value, str) else text}')}"
    return fix.replace("it there, or give", "it:")


def sources(path: Path, overrides: tuple[str, ...] = ()) -> dict[str, str]:
    """{"table.key": "file" or "--set"} of the keys of a recipe that do not have their default."""
    raw = read_toml(path)
    overriding: dict[str, Any] = {}
    resolve_paths(raw, path.parent)
    apply_overrides(overriding, overrides, partial(may_be_absent, Recipe))
    for tables in (raw, overriding):
        align = tables.get("align")
        if isinstance(align, dict) and isinstance(align.get("loss"), str):
            align["loss"] = {"name": align["loss"]}
    return dict.fromkeys(_flatten(raw), "file") | dict.fromkeys(_flatten(overriding), "--set")


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Nested dicts and lists of what TOML has: keys without a value are left out."""
    adapter = TypeAdapter(Recipe)
    return cast(dict[str, Any], adapter.dump_python(recipe, mode="json", exclude_none=True))


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"table.key": value}; the n-th table of a list is "table.key.n", from 1."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value, 1)}
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
