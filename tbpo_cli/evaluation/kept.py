"""What was measured once: rows in a file that is named by the hash of what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbpo_cli.runs.files import read_sealed, write_sealed

Json = dict[str, Any]
Rows = list[Json]
Key = tuple[str, int]  # id of a prompt, number of the sample

KEPT = "kept"  # the folder of these files in that of a stage
# Keys that say how many prompts and samples there are; a single answer depends on none of them.
NUMBERS = ("sample.num_samples", "sample.max_prompts")


@dataclass(frozen=True)
class Kept:
    """Rows that stay as long as what they depend on is the same.

    Args:
        what: the method of `Measurer` that measures them.
        depends_on: all that could change the rows.
    """

    what: str
    depends_on: Json

    def path(self, folder: Path) -> Path:
        """Its file in a folder of measurements."""
        return folder / f"{self.what}-{digest(self.depends_on)}.json"

    def read(self, folder: Path) -> Rows:
        """The rows; none if it was not made. Raises TbpoError if the file is damaged."""
        rows: Rows = read_sealed(self.path(folder)).get("rows", [])
        return rows

    def write(self, folder: Path, rows: Iterable[Json]) -> None:
        """Keeps the rows."""
        write_sealed(self.path(folder), {"depends_on": self.depends_on, "rows": [*rows]})

    def known(self, *folders: Path) -> dict[Key, Json]:
        """The completions in some folders that depend on the same, but for how many there are.

        Raises:
            TbpoError: if a file is damaged.
        """
        own = digest(without_numbers(self.depends_on))
        found: dict[Key, Json] = {}
        for path in (path for each in folders for path in sorted(each.glob(f"{self.what}-*.json"))):
            content = read_sealed(path)
            if digest(without_numbers(content["depends_on"])) == own:
                found |= {(row["prompt_id"], row["sample"]): row for row in content["rows"]}
        return found


def without_numbers(depends_on: Json) -> Json:
    """What a single completion depends on."""
    left = {name: value for name, value in depends_on.items() if name != "prompts"}
    if "sample" in left:
        settings = left["sample"]["settings"]
        of_one = {name: value for name, value in settings.items() if name not in NUMBERS}
        left["sample"] = left["sample"] | {"settings": of_one}
    return left


def digest(depends_on: Json) -> str:
    """16 hex digits that name what something depends on."""
    text = json.dumps(depends_on, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
