"""Rows: from local files or Hub data sets, one at a time, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbpo_cli.config.recipe import Source
from tbpo_cli.errors import TbpoError

ROWS_AT_A_TIME = 1000  # that are looked at, and worked on, together
COLUMNS = (".json", ".parquet", ".arrow")
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
        source: its path is a file with an ending of TEXT or COLUMNS, a folder that `datasets`
            saved, or the id of a Hub data set.
        split: of a Hub data set or a saved folder, if the source names none.
        key: the recipe key that names the source, for messages.

    Raises:
        TbpoError: for a source that cannot be read, with the file and the line.
    """
    path, number, split = Path(source.path), 0, source.split or split
    if path.is_file() and path.suffix not in (*TEXT, *COLUMNS):
        kinds, fix = (
            f"one of {', '.join((*TEXT, *COLUMNS))}",
            "convert the file, or rename it if its ending is wrong",
        )
        raise TbpoError(f"{key} is of an unknown kind", source.path, kinds, fix)
    is_text = path.is_file() and path.suffix in TEXT
    try:
        for number, content in _read_text(path) if is_text else _read_dataset(source, split):
            yield Row(source.path, number, content)
    except TbpoError:
        raise
    except (
        Exception
    ) as error:  # whatever `datasets` and the Hub raise is about the source that was named
        raise TbpoError(
            f"{key} cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            f"{source.path}{f', after row {number}' if number else ''}",
            f"a local file, a folder, or a Hub data set with the split {split!r}",
            f"check {key} in the recipe",
        ) from error


def _read_text(path: Path) -> Numbered:
    """Each row with the number of the last line that it took."""
    (parse, expected), number = TEXT[path.suffix], 0

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
    """A JSON value a line.

    Not by `datasets`, which wants the same columns of the same types in all rows, and does not
    say in which line a fault is.
    """
    return (json.loads(line) for line in lines if line.strip())


def _parse_csv(lines: Iterator[bytes]) -> Iterator[dict[str, str]]:
    """Every field is text, as it stands: `datasets` would read 007 as a number and NA as null."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line.decode("utf-8-sig") for line in lines), strict=True)
    names = next(reader, [])
    for fields in reader:
        if len(fields) != len(names):
            raise csv.Error(f"{len(fields)} fields, but the first line names {len(names)}")
        yield dict(zip(names, fields, strict=True))


def _parse_txt(lines: Iterator[bytes]) -> Iterator[str]:
    return (line.decode().rstrip("\r\n") for line in lines if line.strip())


JSONL = (_parse_jsonl, "one JSON object a line")
TEXT: dict[
    str, tuple[Callable[[Iterator[bytes]], Iterator[Any]], str]
] = {  # by the ending of a file
    ".jsonl": JSONL,
    ".gz": JSONL,
    ".csv": (_parse_csv, "rows with as many fields as the first line"),
    ".txt": (_parse_txt, "a prompt a line"),
}


def _read_dataset(source: Source, split: str) -> Numbered:
    """A file of one of COLUMNS, a folder that `datasets` saved, or a Hub data set."""
    import datasets

    path = Path(source.path)
    if path.is_file():
        rows = datasets.load_dataset(
            path.suffix[1:], data_files=source.path, split="train", streaming=True
        )
    elif path.is_dir():
        rows = datasets.load_from_disk(source.path)
        rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
    else:
        rows = datasets.load_dataset(
            source.path, source.config, split=split, revision=source.revision
        )
    return enumerate(map(_without_nested_nulls, rows), 1)


def _without_nested_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of columns, where messages have no members that are null.

    A columnar file gives every message all the keys that another one has.
    """
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nulls(value) for key, value in content.items() if value is not None}
    return [_without_nulls(item) for item in content] if isinstance(content, list) else content
