"""`tbpo init --from FILE`: a recipe from a config of TRL, axolotl or LLaMA-Factory."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from tbpo_cli import console
from tbpo_cli.cli.their_files import Unread, read
from tbpo_cli.config.other_tools import (
    AXOLOTL,
    CPO_NAMES,
    DEFAULTS,
    DEFAULTS_BY_LOSS,
    FACTORY,
    LONG,
    LORA_DEFAULTS,
    LOSS_NAMES,
    NOT_OFFERED,
    REFUSED,
    SFT_DEFAULTS,
    SFT_KEYS,
    THEIRS,
    TRL,
    Theirs,
)
from tbpo_cli.config.recipe import Recipe, load_recipe
from tbpo_cli.core.losses import LOSSES
from tbpo_cli.errors import TbpoError

# Their product is the batch of a step, on one GPU.
BATCHES = ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps")
STAGES = ("dpo", "sft")  # of LLaMA-Factory, that have a table here
LOSS_KEYS = ("loss_type", "pref_loss", "rl", "rlhf")
SOURCE_KEYS = {
    "path": "path",
    "name": "config",
    "split": "split",
    "revision": "revision",
    "weight": "weight",
}


@dataclass
class Converted:
    """A config in our words.

    Args:
        tables: of the recipe.
        moved: (their key, our key and value) of what was taken over.
        left: (their key, why) of what has no counterpart.
    """

    tables: dict[str, Any] = field(default_factory=dict)
    moved: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def put(self, theirs: str, key: str, value: Any) -> None:
        """Sets our key."""
        *names, last = key.split(".")
        table = self.tables
        for name in names:
            table = table.setdefault(name, {})
        table[last] = value
        self.moved.append((theirs, f"{key} = {json.dumps(value, ensure_ascii=False)}"))


def write(source: Path, target: Path) -> None:
    """Writes the recipe, and says what was taken over, what was not, and what it still lacks.

    Raises:
        TbpoError: if `source` cannot be read as a config, or `target` is there already.
    """
    if target.exists():
        fix = f"move it away, or tbpo init NAME --from {source}"
        raise TbpoError(f"{target} is there already", str(target.absolute()), "another name", fix)
    found = read(source)
    ours = is_our_recipe(found)
    converted = Converted(found) if ours else convert(found)
    if not ours and not set(found) & set(THEIRS):
        what = "no key of the config is known"
        expected = "a config of TRL, axolotl, LLaMA-Factory"
        raise TbpoError(what, str(source), expected, "tbpo init lists recipes to begin with")
    target.write_text(tomli_w.dumps(without_nothing(converted.tables)), encoding="utf-8")
    console.out.print(f"wrote {target}", markup=False)
    if ours:
        console.out.print(f"{source} is a recipe already: all its keys are kept", markup=False)
    else:
        for title, lines in (("taken over", converted.moved), ("left out", converted.left)):
            console.out.print(f"{title}:" if lines else f"{title}: nothing", markup=False)
            for theirs, text in lines:
                console.out.print(f"  {theirs:<30} {text}", markup=False)
    try:
        load_recipe(target)
    except TbpoError as error:
        console.out.print(f"still to be mended in {target}:\n{error}", markup=False)
        console.say(f"next: mend {target} as said above, then: tbpo show {target}")
        return
    console.say(f"next: tbpo show {target}")


def is_our_recipe(found: dict[str, Any]) -> bool:
    """Whether a file holds our tables, in YAML or JSON."""
    names = {each.name for each in fields(Recipe)}
    return set(found) <= names and any(isinstance(value, dict) for value in found.values())


def without_nothing(value: Any) -> Any:
    """Without keys that have no value: TOML has no word for it."""
    if isinstance(value, dict):
        return {key: without_nothing(each) for key, each in value.items() if each is not None}
    return [without_nothing(each) for each in value] if isinstance(value, list) else value


def tool_of(theirs: dict[str, Any]) -> str:
    """Whose config it is, by the keys that only one of them has."""
    if "base_model" in theirs:
        return AXOLOTL
    only = {name for name, each in THEIRS.items() if each.tool == FACTORY} | {"stage"}
    return FACTORY if only & set(theirs) - {"dataset", "revision"} else TRL


def convert(theirs: dict[str, Any]) -> Converted:
    """Their config in our words.

    1. Their keys, and the defaults that hold where they are left out.
    2. The loss, whose name decides what beta is called.
    3. Every other key, one by one: it is taken over, or listed with the reason.
    4. The batch of a step, from their two sizes.

    Raises:
        TbpoError: for a training that is none of preferences or demonstrations.
    """
    converted = Converted()
    for name in ("stage", *LOSS_KEYS):
        if (method := str(theirs.get(name)).lower()) in REFUSED:
            what = f"{method} is not offered"
            expected = "a training of pairs or demonstrations"
            raise TbpoError(what, f"{name}: {method}", expected, NOT_OFFERED[method])
    tool = tool_of(theirs)
    is_dpo = "pref_loss" in theirs or (tool == TRL and not SFT_KEYS & set(theirs))
    stage = str(theirs.get("stage", "dpo" if is_dpo else "sft"))
    is_sft = stage == "sft" and "rl" not in theirs and "rlhf" not in theirs
    full = {**defaults_of(tool, theirs, is_sft), **theirs}
    loss = "" if is_sft else _convert_loss(full, stage, converted)
    for name, value in full.items():
        if name not in BATCHES and name not in LOSS_KEYS:
            before = len(converted.moved)
            listed = len(converted.left)
            _convert_key(name, value, is_sft, loss, converted)
            if name not in theirs:  # a default that the loss does not read is not listed
                del converted.left[listed:]
                text = f"{name}, their default"
                converted.moved[before:] = [(text, ours) for _, ours in converted.moved[before:]]
    sizes = [
        int(full[name])
        for name in BATCHES
        if isinstance(full.get(name), int | float | str) and str(full[name]).isdigit()
    ]
    if sizes:
        names = " × ".join(name for name in BATCHES if name in full)
        key = "sft.batch_examples" if is_sft else "align.batch_pairs"
        converted.put(names, key, math.prod(sizes))
        converted.left.append((names, f"on several GPUs, multiply {key} by their number"))
    for name in BATCHES:
        if name in full and not str(full[name]).isdigit():
            converted.left.append((name, f"{full[name]} is no number: set the batch by hand"))
    if theirs.get("adapter") == "qlora":
        converted.put("adapter", "model.quantization", "nf4")
    if "cutoff_len" in full:
        converted.put("cutoff_len", "data.overlong", "truncate")
    if not has_adapter(tool, theirs) and converted.tables.get("model", {}).pop("lora", None):
        converted.moved = [each for each in converted.moved if "model.lora." not in each[1]]
        why = "it trains all weights without an adapter: there is no table [model.lora]"
        converted.left += [(name, why) for name in theirs if _is_lora_key(name)]
    elif has_adapter(tool, theirs):
        converted.tables.setdefault("model", {}).setdefault("lora", {})
    return converted


def has_adapter(tool: str, theirs: dict[str, Any]) -> bool:
    """Whether their config trains an adapter; LLaMA-Factory's default is one."""
    if tool == FACTORY:
        return str(theirs.get("finetuning_type", "lora")) == "lora"
    return any(theirs.get(name) in ("lora", "qlora", True) for name in ("use_peft", "adapter"))


def _is_lora_key(name: str) -> bool:
    return name in THEIRS and THEIRS[name].ours.startswith("model.lora.")


def defaults_of(tool: str, theirs: dict[str, Any], is_sft: bool) -> dict[str, Any]:
    """Their values of keys that the config leaves out, by their names."""
    found = dict(DEFAULTS[tool])
    if is_sft:
        found |= SFT_DEFAULTS[tool]
    elif tool == TRL:
        found |= DEFAULTS_BY_LOSS.get(str(theirs.get("loss_type")), {})
    if has_adapter(tool, theirs):
        found |= LORA_DEFAULTS[tool]
    if tool == FACTORY and "lora_alpha" not in theirs and has_adapter(tool, theirs):
        found["lora_alpha"] = 2 * int(theirs.get("lora_rank", found["lora_rank"]))
    if "warmup_steps" in theirs:
        found.pop("warmup_ratio", None)
    if theirs.get("max_steps", -1) not in (-1, None):
        found.pop("num_train_epochs", None)
        found.pop("num_epochs", None)
    return found


def _convert_loss(full: dict[str, Any], stage: str, converted: Converted) -> str:
    """Puts the loss, and returns our name of it; dpo where it has no counterpart."""
    name = next((each for each in LOSS_KEYS if full.get(each) not in (None, "rlhf")), "")
    given = full.get(name, "sigmoid")
    if stage not in STAGES:
        name = "stage"
        given = stage
    parts = list(given) if isinstance(given, list | tuple) else [given]
    losses = [each for each in parts if each != "sft"] or parts
    names = CPO_NAMES if "cpo_alpha" in full else LOSS_NAMES
    ours = names.get(str(losses[0]).lower()) if len(losses) == 1 else None
    if ours is None:
        why = f"there is no loss {given!r}, and dpo stands in its place; tbpo losses lists all"
        converted.left.append((name, why))
    converted.put(name or "its default loss", "align.loss.name", ours or "dpo")
    if ours and len(parts) == 2:
        weights = full.get("loss_weights") or [1.0, 1.0]
        share = weights[parts.index("sft")] / weights[parts.index(losses[0])]
        converted.put(name, "align.loss.sft_weight", float(share))
    for other in LOSS_KEYS:
        if other in full and other != name:
            converted.left.append((other, f"align.loss.name has it from {name}"))
    return ours or "dpo"


def _convert_key(name: str, value: Any, is_sft: bool, loss: str, converted: Converted) -> None:
    """Puts one of their keys into `converted`, or says why not."""
    known = THEIRS.get(name)
    key = known.ours if known else ""
    if is_sft:
        key = key.replace("align.", "sft.", 1)
    own = {each.name for each in fields(LOSSES[loss])} if loss else set()
    if key == "align.loss.beta" and "beta" not in own and "lam" in own:
        key = "align.loss.lam"
    why = _why_not(known, key, name, _number(value), loss)
    if why:
        converted.left.append((name, why))
        return
    assert known is not None
    value = _number(value)
    if isinstance(value, str | int | bool) and value in known.values:
        if "8bit" in str(value):
            converted.left.append((name, f"{value}: the optimizer's state has 32 bits here"))
        value = known.values[value]
    if key in {"data.train", "data.eval"}:
        for each in value if isinstance(value, list) else []:
            unread = set(each) - {*SOURCE_KEYS, "data_files"} if isinstance(each, dict) else ()
            why = "no counterpart: the format of rows is recognised"
            converted.left += [(f"{name}.{field}", f"{each[field]}: {why}") for field in unread]
            if isinstance(each, dict) and each.get("data_files") and not _is_of_files(each):
                why = f"all files of {each.get('path')} are read; name files to read only those"
                converted.left.append((f"{name}.data_files", f"{each['data_files']}: {why}"))
        value = _sources(value)
    elif key == "model.lora.target_modules" and isinstance(value, str) and "," in value:
        value = [part.strip() for part in value.split(",")]
    elif key == "run.trackers":
        value = [value] if isinstance(value, str) else value
    elif key in {"model.lora.alpha", "align.epochs", "sft.epochs"}:
        value = float(value)
    converted.put(name, key, value)


def _why_not(known: Theirs | None, key: str, name: str, value: Any, loss: str) -> str:
    """Why a key of theirs is not taken over; "" if it is."""
    if isinstance(value, Unread):
        return f"{value} is no plain value: set {key or 'it'} by hand"
    if known is None:
        return "no counterpart"
    if not known.ours:
        return known.note
    if value is None:
        return f"nothing is set; {key} has its default (tbpo show names it)"
    if isinstance(value, str | int | bool) and known.values.get(value, value) is None:
        return f"{value}: already so"
    if key == "data.overlong" and value not in known.values:
        return f"{value}: {LONG}"
    if key == "data.train.config":
        return f"{value}: a table [[data.train]] with path and config"
    *table, last = key.split(".")
    if table == ["align", "loss"] and last not in {each.name for each in fields(LOSSES[loss])}:
        return f"{loss} has no key {last}"
    is_number = isinstance(value, int | float)
    if key.endswith((".eval_fraction", ".warmup")) and not (is_number and 0 <= value < 1):
        return f"{value}: {key} is a share, from 0 to 1"
    if key.endswith("_every") and is_number and (value < 1 or value != int(value)):
        return f"{value} is a share of the steps; {key} is a number of steps"
    return ""


def _number(value: Any) -> Any:
    """5e-7 is a text in YAML 1.1."""
    if isinstance(value, str):
        try:
            return type(value)(value) if isinstance(value, Unread) else float(value)
        except ValueError:
            return value
    return value


def _is_of_files(source: dict[str, Any]) -> bool:
    """Whether a data set of axolotl is the files of `data_files`, and its path their type."""
    types = ("json", "csv", "parquet", "arrow", "text")
    return source.get("path") in types and bool(source.get("data_files"))


def _sources(value: Any) -> Any:
    """Data sets as we name them: a path, or tables with path, config and split."""
    if isinstance(value, str):
        paths = [part.strip() for part in value.split(",")]
        return paths[0] if len(paths) == 1 else paths
    tables = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict):
            table = {SOURCE_KEYS[key]: each[key] for key in SOURCE_KEYS if each.get(key)}
            files = each["data_files"] if _is_of_files(each) else table.get("path")
            listed = files if isinstance(files, list) else [files]
            tables += [{**table, "path": file} for file in listed if file]
        else:
            tables.append({"path": str(each)})
    return tables
