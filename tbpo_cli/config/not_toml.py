"""What is wrong with a file that is not TOML, in the words of who wrote it."""

from __future__ import annotations

import json
import re
from pathlib import Path

# How a faulty line begins; what is wrong with it, what is expected, and what to write.
OF_A_LINE = (
    (r"(\[+[\w.]+)$", "a heading without its closing bracket", "[table]", "write {0}]"),
    (r"([\w.]+)\s*=\s*(\.\d\S*)$", "a number that begins with a point", "0.5", "write {0} = 0{1}"),
    (
        r"([\w.]+)\s*=\s*(\d+)\.(e\S+)$",
        "a point that no digit follows",
        "1e-5 or 1.0e-5",
        "write {0} = {1}{2}",
    ),
    (
        r"([\w.]+)\s*=\s*([\d.]+)\s*%",
        "a share in percent",
        "a share from 0 to 1",
        "write {0} = {1} / 100, as 0.1 for 10 %",
    ),
    (
        r"([\w.]+)\s*=\s*([^,;]+)[,;]\s*(#.*)?$",
        "a comma or semicolon at the end of a line",
        "key = value, one a line",
        "write {0} = {1}",
    ),
    (
        r"([\w.]+)\s*=\s*(\"[^\"]*)$",
        "a text without its closing quotes",
        'key = "text"',
        'write {0} = {1}"',
    ),
    (r"([\w.]+)\s+(['\"\d].*)$", "a key without =", "key = value", "write {0} = {1}"),
    (
        r"([\w.]+)\s*=\s*(\S+)\s+([\w.]+\s*=.*)$",
        "two keys on one line",
        "key = value, one a line",
        "write {0} = {1}, and {2} on a line of its own",
    ),
    (
        r"([\w.]+\s*=\s*\[.*['\"])\s+['\"]",
        "a list without commas",
        '["a", "b"]',
        "put a comma between its entries",
    ),
    (
        r"(from|import|tbpo|pip|python)\s",
        "a line of Python or of a shell",
        "key = value lines under [table] headings",
        "remove it; tbpo init writes a recipe to begin with",
    ),
)

# The key of a table that its value alone is taken for.
FIRST_KEYS = {"model": "base", "data": "train", "align.loss": "name"}


def explain(text: str, error: str, path: Path) -> tuple[str, str, str]:
    """What is wrong with a faulty recipe, what is expected, and what to write.

    Args:
        text: of the file.
        error: tomllib's message, which ends with the line.
        path: of the file.
    """
    line = _line_of(text, error)
    value = line.partition("=")[2].strip()
    convert = f"tbpo init NAME --from {path} writes it as TOML, as NAME.toml"
    table = 'a line [model], then base = "…"'
    if _is_json(text):
        return "the recipe is JSON, not TOML", table, convert
    if re.match(r"\s*(- )?[\w.-]+\s*:(\s|$)", line) and "=" not in line.partition(":")[0]:
        return "the recipe is YAML, not TOML", table, convert
    if line.startswith("[") and (above := _value_above(text, line)):
        name, value = above
        what = f"{line.strip()} is a table, and {name} = {value} above it is a value"
        key = FIRST_KEYS.get(name)
        fix = f"write {key} = {value} under [{name}]" if key else f"write its keys under [{name}]"
        return what, f"only the table [{name}]", f"remove {name} = {value}, and {fix}"
    if "twice" in error or "overwrite" in error:
        what = f"{line.strip()} is there twice" if line else "a table or a key is there twice"
        return (
            what,
            "every table and every key once",
            "put the keys of both into one, or remove one",
        )
    if value.split("#")[0].strip() in {"True", "False"}:
        what = f"{value} is Python's word, not TOML's"
        return what, "true or false", f"write {value.lower()}"
    if value.split("#")[0].strip().lower() in {"none", "null", "nil", "~"}:
        return "TOML has no word for nothing", "a value", "leave the line out"
    if "\\" in value and value.startswith('"'):
        expected = "single quotes around a text with backslashes"
        fix = f"write {line.partition('=')[0].strip()} = '{value.strip(chr(34))}'"
        return "a backslash in double quotes has a meaning of its own", expected, fix
    for pattern, what, expected, fix in OF_A_LINE:
        if found := re.match(pattern, line.strip()):
            return what, expected, fix.format(*found.groups())
    if value and re.match(r"[A-Za-z/.~“‘]", value):
        return "a text without quotes", 'key = "text"', f'write "{value.strip("“”‘’")}"'
    expected = "key = value lines under [table] headings"
    return "the recipe is not valid TOML", expected, "mend that line"


def _line_of(text: str, error: str) -> str:
    """The line that the message of an error names."""
    number = re.search(r"at line (\d+)", error)
    lines = text.splitlines()
    if number is None or int(number[1]) > len(lines):
        return ""
    return lines[int(number[1]) - 1]


def _value_above(text: str, line: str) -> tuple[str, str] | None:
    """The first value above a table's heading whose key is a part of the heading.

    Returns:
        (the table's name, the value), as ("model", '"org/model"') of [model.lora].
    """
    parts = re.findall(r"[\w-]+", line)
    found = None
    for above in text.partition(line)[0].splitlines():
        key, equals, value = (part.strip() for part in above.partition("="))
        last = key.split(".")[-1]
        if equals and last in parts:
            found = ".".join(parts[: parts.index(last) + 1]), value
    return found


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
