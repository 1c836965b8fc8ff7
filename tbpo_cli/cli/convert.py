"""`tbpo init --from FILE`: a recipe from a config of TRL, axolotl or LLaMA-Factory."""

from __future__ import annotations

import ast
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import yaml

from tbpo_cli import console
from tbpo_cli.config.other_tools import THEIRS
from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.errors import TbpoError

# Their product is the batch of a step, on one GPU.
BATCHES = ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps")
ADAPTERS = {"use_peft": True, "adapter": "lora", "finetuning_type": "lora", "peft_config": True}


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
    converted = convert(read(source))
    target.write_text(tomli_w.dumps(converted.tables), encoding="utf-8")
    console.out.print(f"wrote {target}", markup=False)
    for title, lines in (("taken over", converted.moved), ("left out", converted.left)):
        console.out.print(f"{title}:" if lines else f"{title}: nothing", markup=False)
        for theirs, text in lines:
            console.out.print(f"  {theirs:<30} {text}", markup=False)
    try:
        load_recipe(target)
    except TbpoError as error:
        console.out.print(f"still to be mended in {target}:\n{error}", markup=False)
    console.say(f"next: tbpo show {target}")


def read(path: Path) -> dict[str, Any]:
    """The keys of a config: YAML, JSON, a Python file's keyword arguments, a script's flags."""
    expected = "a config in YAML or JSON, a Python file, or a script with --flags"
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".py":
            found = _keywords(text)
        elif path.suffix in {".sh", ".bash"}:
            found = _flags(text)
        else:
            found = yaml.safe_load(text)  # JSON is YAML, too
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise TbpoError(f"the config cannot be read: {reason}", str(path), expected) from None
    if not isinstance(found, dict) or not found:
        raise TbpoError("there is no config in the file", str(path), expected)
    return {str(key): value for key, value in found.items()}


def _keywords(text: str) -> dict[str, Any]:
    """The keyword arguments and dict entries of a Python file that are plain values."""
    found: dict[str, Any] = {}
    for node in ast.walk(ast.parse(text)):
        pairs: list[tuple[Any, ast.expr]] = []
        if isinstance(node, ast.Call):
            pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
            is_lora = getattr(node.func, "id", getattr(node.func, "attr", "")) == "LoraConfig"
            names = {"r": "lora_r", "target_modules": "lora_target_modules"}
            if is_lora:
                found["use_peft"] = True
                pairs = [(names.get(str(name), name), value) for name, value in pairs]
        elif isinstance(node, ast.Dict):
            pairs = [
                (getattr(key, "value", None), v)
                for key, v in zip(node.keys, node.values, strict=True)
            ]
        for name, value in pairs:
            if isinstance(name, str):
                try:
                    found[name] = ast.literal_eval(value)
                except ValueError:
                    continue  # not a plain value
    return found


def _flags(text: str) -> dict[str, Any]:
    """The --name value pairs of a shell script."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    found: dict[str, Any] = {}
    for number, word in enumerate(words):
        if not word.startswith("--") or len(word) < 3:
            continue
        name, equals, value = word[2:].partition("=")
        following = words[number + 1] if number + 1 < len(words) else "--"
        if not equals:
            value = "true" if following.startswith("--") else following
        found[name.replace("-", "_")] = yaml.safe_load(value)
    return found


def convert(theirs: dict[str, Any]) -> Converted:
    """Their config in our words."""
    converted = Converted()
    is_sft = theirs.get("stage") == "sft" or _is_axolotl_sft(theirs)
    for name, value in theirs.items():
        if value is not None and name not in BATCHES:
            _convert_key(name, value, is_sft, converted)
    sizes = [int(theirs[name]) for name in BATCHES if name in theirs]
    if sizes:
        batch = sizes[0] if len(sizes) == 1 else sizes[0] * sizes[1]
        names = " × ".join(name for name in BATCHES if name in theirs)
        key = "sft.batch_examples" if is_sft else "align.batch_pairs"
        converted.put(names, key, batch)
        converted.left.append((names, f"on several GPUs, multiply {key} by their number"))
    if any(theirs.get(name) == value for name, value in ADAPTERS.items()):
        converted.tables.setdefault("model", {}).setdefault("lora", {})
    elif "lora" in converted.tables.get("model", {}) and theirs.get("finetuning_type") == "full":
        del converted.tables["model"]["lora"]
    return converted


def _is_axolotl_sft(theirs: dict[str, Any]) -> bool:
    return "base_model" in theirs and "rl" not in theirs


def _convert_key(name: str, value: Any, is_sft: bool, converted: Converted) -> None:
    """Puts one of their keys into `converted`."""
    known = THEIRS.get(name)
    if known is None:
        converted.left.append((name, "no counterpart"))
        return
    if not known.ours:
        converted.left.append((name, known.note))
        return
    key = known.ours
    if is_sft:
        key = key.replace("align.", "sft.", 1)
    value = _number(value)
    if isinstance(value, str | int | bool) and value in known.values:
        value = known.values[value]
    elif known.ours == "align.loss.name":
        converted.left.append((name, f"there is no loss {value!r}; tbpo losses lists them"))
        return
    if value is None:
        return
    if key in {"data.train", "data.eval"}:
        value = _sources(value)
    elif key == "data.train.config":
        converted.left.append((name, "a table [[data.train]] with path and config"))
        return
    elif key in {"data.eval_fraction", "align.warmup", "sft.warmup"} and not 0 <= value < 1:
        converted.left.append((name, f"{key} is a share, from 0 to 1"))
        return
    elif key == "model.lora.target_modules" and isinstance(value, str) and "," in value:
        value = [part.strip() for part in value.split(",")]
    elif key == "run.trackers":
        value = [value] if isinstance(value, str) else value
    elif key in {"model.lora.alpha", "align.epochs", "sft.epochs"}:
        value = float(value)
    converted.put(name, key, value)


def _number(value: Any) -> Any:
    """5e-7 is a text in YAML 1.1."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _sources(value: Any) -> Any:
    """Data sets as we name them: a path, or tables with path, config and split."""
    if isinstance(value, str):
        paths = [part.strip() for part in value.split(",")]
        return paths[0] if len(paths) == 1 else paths
    tables = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict):
            names = {"path": "path", "name": "config", "split": "split", "revision": "revision"}
            tables.append(
                {ours: each[theirs] for theirs, ours in names.items() if each.get(theirs)}
            )
        else:
            tables.append({"path": str(each)})
    return tables
