"""Rows: from local files or Hub data sets, one at a time, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tbpo_cli.errors import TbpoError
from tbpo_cli.recipe import Source

ROWS_AT_A_TIME = 1000  # that are looked at, and worked on, together
Numbered = Iterator[tuple[int, Any]]  # contents of rows, each with the row's number


@dataclass(frozen=True)
class Row:
    """One row of a source. `number` counts from 1; in a text file it is the line."""

    source: str
    number: int
    content: Any


def read_rows(source: Source, split: str, key: str) -> Iterator[Row]:
    """The rows of a source, in order, never all in memory.

    Args:
        source: its path is a file whose ending is in READERS, a folder that `datasets` saved, or the id of a Hub data
            set.
        split: of a Hub data set or a saved folder, if the source names none.
        key: the recipe key that names the source, for messages.

    Raises:
        TbpoError: for a source that cannot be read, with the file and the line.
    """
    path, number, split = Path(source.path), 0, source.split or split
    if path.is_file() and path.suffix not in READERS:
        kinds, fix = f"one of {', '.join(READERS)}", "convert the file, or rename it if its ending is wrong"
        raise TbpoError(f"{key} is of an unknown kind", source.path, kinds, fix)
    try:
        for number, content in READERS[path.suffix](path) if path.is_file() else _read_dataset(source, split):
            yield Row(source.path, number, content)
    except TbpoError:
        raise
    except Exception as error:  # whatever `datasets` and the Hub raise is about the source that was named
        raise TbpoError(
            f"{key} cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            f"{source.path}{f', after row {number}' if number else ''}",
            f"a local file, a folder, or a Hub data set with the split {split!r}",
            f"check {key} in the recipe",
        ) from error


def _read_text(path: Path, parse: Callable[[Iterator[bytes]], Iterator[Any]], expected: str) -> Numbered:
    """What `parse` makes of the lines, each with the number of the last line that it took."""
    number = 0

    def lines() -> Iterator[bytes]:
        nonlocal number
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                number += 1
                yield line

    try:
        for content in parse(lines()):
            yield number, content
    except (ValueError, RecursionError, csv.Error) as error:
        what, where = f"the line cannot be read: {error}", f"{path}, line {number}"
        raise TbpoError(what, where, f"{expected}, in UTF-8", "mend or remove that line") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what, where = f"the compressed file is damaged: {error}", f"{path}, after line {number}"
        raise TbpoError(what, where, "a whole .gz file", "copy or download it again") from None


def _parse_jsonl(lines: Iterator[bytes]) -> Iterator[Any]:
    """Not by `datasets`, which wants the same columns of the same types in all rows, and names no line."""
    return (json.loads(line) for line in lines if line.strip())


def _parse_csv(lines: Iterator[bytes]) -> Iterator[dict[str, str]]:
    """Every field is text, as it stands; `datasets` would make a number of 007, and nothing of NA."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line.decode("utf-8-sig") for line in lines), strict=True)
    names = next(reader, [])
    for fields in reader:
        if len(fields) != len(names):
            raise csv.Error(f"{len(fields)} fields, but the first line names {len(names)}")
        yield dict(zip(names, fields, strict=True))


def _parse_txt(lines: Iterator[bytes]) -> Iterator[str]:
    return (line.decode().rstrip("\r\n") for line in lines if line.strip())


def _read_columnar(path: Path) -> Numbered:
    import datasets

    rows = datasets.load_dataset(path.suffix.removeprefix("."), data_files=str(path), split="train", streaming=True)
    return enumerate(rows, 1)


_read_jsonl = partial(_read_text, parse=_parse_jsonl, expected="one JSON object a line")
READERS: dict[str, Callable[[Path], Numbered]] = {  # by the ending of a file
    ".jsonl": _read_jsonl,
    ".gz": _read_jsonl,
    ".csv": partial(_read_text, parse=_parse_csv, expected="rows with as many fields as the first line"),
    ".txt": partial(_read_text, parse=_parse_txt, expected="a prompt a line"),
    **dict.fromkeys((".json", ".parquet", ".arrow"), _read_columnar),
}


def _read_dataset(source: Source, split: str) -> Numbered:
    """A folder that `datasets` saved, or a Hub data set, downloaded once."""
    import datasets

    if not Path(source.path).is_dir():
        rows = datasets.load_dataset(source.path, source.config, split=split, revision=source.revision)
    else:
        rows = datasets.load_from_disk(source.path)
        rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
    return enumerate(rows, 1)
