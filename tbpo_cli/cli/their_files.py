"""What stands in a config of another tool: YAML, JSON, a Python file, a shell script."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path
from typing import Any

import yaml

from tbpo_cli.config.other_tools import THEIRS
from tbpo_cli.errors import TbpoError

LORA_CONFIG = {"r": "lora_r", "target_modules": "lora_target_modules"}
# of peft's LoraConfig
PEFT_DEFAULTS = {"use_peft": True, "lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
# Default of a key that only SFTConfig has: by it, `convert` knows a training on demonstrations.
OF_SFT = {"dataset_text_field": "text"}
FIRST_ARGUMENTS = {"from_pretrained": "model_name_or_path", "load_dataset": "dataset_name"}


class Unread(str):
    """The source text of a Python value that is computed."""


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
    """The keyword arguments and dict entries of a Python file; `Unread` for other than values."""
    tree = ast.parse(text)
    found: dict[str, Any] = {}
    constants = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        pairs: list[tuple[Any, ast.expr]] = []
        is_config = False
        if isinstance(node, ast.Call):
            function = getattr(node.func, "id", getattr(node.func, "attr", ""))
            is_config = function.endswith(("Config", "Arguments"))
            names = LORA_CONFIG if function == "LoraConfig" else {}
            if function == "SFTConfig":
                found.update(OF_SFT)
            if function == "LoraConfig":
                found.update(PEFT_DEFAULTS)
            pairs = [(names.get(str(each.arg), each.arg), each.value) for each in node.keywords]
            if function in FIRST_ARGUMENTS and node.args:
                pairs.append((FIRST_ARGUMENTS[function], node.args[0]))
        elif isinstance(node, ast.Dict):
            pairs = [
                (getattr(key, "value", None), v)
                for key, v in zip(node.keys, node.values, strict=True)
            ]
        for name, value in pairs:
            if not isinstance(name, str):
                continue
            plain = constants.get(value.id, value) if isinstance(value, ast.Name) else value
            try:
                found[name] = ast.literal_eval(plain)
            except ValueError:
                if name not in found and (is_config or name in THEIRS):
                    found[name] = Unread(ast.unparse(value))
    return found


def _flags(text: str) -> dict[str, Any]:
    """The --name value pairs of a shell script."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    found: dict[str, Any] = dict(OF_SFT) if words[:2] == ["trl", "sft"] else {}
    for number, word in enumerate(words):
        if not word.startswith("--") or len(word) < 3:
            continue
        name, equals, value = word[2:].partition("=")
        following = words[number + 1] if number + 1 < len(words) else "--"
        if not equals:
            value = "true" if following.startswith("--") else following
        found[name.replace("-", "_")] = yaml.safe_load(value)
    return found
