"""Rows: from local files or Hub data sets, one at a time, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tbpo_cli.config.recipe import Source
from tbpo_cli.errors import TbpoError

ROWS_AT_A_TIME = 1000  # that are looked at, and worked on, together
COLUMNS = (".parquet", ".arrow")
LISTS = ("data", "rows", "examples", "instances", "train")  # of rows, in a JSON file of one object
DELIMITERS = ",;\t|"
Numbered = Iterator[tuple[int, Any]]  # contents of rows, each with the row's number


class Field(str):
    """A field of a .csv or .tsv file: these formats have no numbers, so its text may mean one."""

    __slots__ = ()


@dataclass(frozen=True)
class Row:
    """One row of a source. `number` counts from 1; in a text file it is the line."""

    source: str
    number: int
    content: Any

    def named(self, error: TbpoError) -> TbpoError:
        """An error that was met with this row, which also says so."""
        return replace(error, where=f"{error.where}; met in {self.source}, row {self.number}")


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
    path = Path(source.path)
    number = 0
    split = source.split or split
    if path.is_file() and path.suffix not in (*TEXT, *COLUMNS):
        kinds = f"one of {', '.join((*TEXT, *COLUMNS))}"
        fix = "convert the file, or rename it if its ending is wrong"
        raise TbpoError(f"{key} is of an unknown kind", source.path, kinds, fix)
    is_text = path.is_file() and path.suffix in TEXT
    try:
        for number, content in _read_text(path) if is_text else _read_dataset(source, split):
            yield Row(source.path, number, content)
    except TbpoError:
        raise
    except Exception as error:  # all that `datasets` and the Hub raise is about the source
        said = next(iter(str(error).splitlines()), "")
        raise TbpoError(
            f"{key} cannot be read: {type(error).__name__}: {said}",
            f"{source.path}{f', after row {number}' if number else ''}",
            f"a local file, a folder, or a Hub data set with the split {split!r}",
            f"check {key} in the recipe",
        ) from error


def _read_text(path: Path) -> Numbered:
    """Each row with the number of the last line that it took; in a JSON file, with its place."""
    parse, expected = TEXT[path.suffix]
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                number += 1
                yield _decoded(line, path, number)

    try:
        for place, content in enumerate(parse(lines()), 1):
            yield (place if path.suffix == ".json" else number), content
    except (ValueError, RecursionError, csv.Error) as error:
        what = f"the line cannot be read: {error}"
        where = f"{path}, line {number}"
        raise TbpoError(what, where, f"{expected}, in UTF-8", "mend or remove that line") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = f"the compressed file is damaged: {error}"
        where = f"{path}, after line {number}"
        raise TbpoError(what, where, "a whole .gz file", "copy or download it again") from None


def _decoded(line: bytes, path: Path, number: int) -> str:
    """A line of a file as text. Raises TbpoError, if it is not in UTF-8."""
    has_zeros = number == 1 and b"\0" in line
    other = "UTF-16" if has_zeros or line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
    with suppress(UnicodeDecodeError):
        if not other:
            return line.decode("utf-8-sig")
    raise TbpoError(
        f"the file is in {other}, not in UTF-8" if other else "the line is not in UTF-8",
        f"{path}, line {number}",
        "text in UTF-8",
        f"iconv -f {other or 'WINDOWS-1252'} -t UTF-8 {path} > {path.stem}-utf8{path.suffix}"
        + ("" if other else ", if that is what it is in"),
    )


def _parse_jsonl(lines: Iterator[str]) -> Iterator[Any]:
    """A JSON value a line.

    Not by `datasets`, which wants the same columns of the same types in all rows, and does not
    say in which line a fault is.
    """
    for number, line in enumerate(lines):
        if number == 0 and line.strip() in ("[", "{"):
            raise ValueError("it begins a list over several lines: is this a .json file?")
        if line.strip():
            yield json.loads(line)


def _parse_json(lines: Iterator[str]) -> Iterator[Any]:
    """A list of rows, an object with such a list or of columns, or a JSON value a line."""
    text = "".join(lines)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from (json.loads(line) for line in text.splitlines() if line.strip())
        return
    if isinstance(content, dict):
        lists = [content[name] for name in LISTS if isinstance(content.get(name), list)]
        content = lists[0] if lists else _rows_of_columns(content) or [content]
    if not isinstance(content, list):
        raise ValueError(f"it is {type(content).__name__}, not a list of rows")
    yield from content


def _rows_of_columns(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an object of columns, each a list of texts or numbers, or pandas' table of them
    by row number; none if it is another kind of object.
    """
    lists = {
        name: list(values.values())
        if isinstance(values, dict) and all(key.isdigit() for key in values)
        else values
        for name, values in columns.items()
    }
    is_table = len(lists) > 1 and all(
        isinstance(values, list)
        and (values is not columns[name] or not any(isinstance(one, dict) for one in values))
        for name, values in lists.items()
    )
    if not is_table or len({*map(len, lists.values())}) != 1:
        return []
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _parse_csv(lines: Iterator[str]) -> Iterator[dict[str, Field]]:
    """Every field is text, as it stands: `datasets` would read 007 as a number and NA as null."""
    csv.field_size_limit(2**31 - 1)
    first = next(lines, "")
    # The character that cuts the line with the names into the most fields.
    delimiter = max(DELIMITERS, key=lambda each: len(next(csv.reader([first], delimiter=each), [])))
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    names = [name.strip() for name in next(reader, [])]
    if twice := {name for name in names if name and names.count(name) > 1}:
        raise csv.Error(f"the first line names {min(twice)!r} twice")
    for fields in reader:
        if len(fields) != len(names):
            raise csv.Error(f"{len(fields)} fields, but the first line names {len(names)}")
        yield dict(zip(names, map(Field, fields), strict=True))


def _parse_txt(lines: Iterator[str]) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in lines if line.strip())


JSONL = (_parse_jsonl, "one JSON object a line")
TEXT: dict[str, tuple[Callable[[Iterator[str]], Iterator[Any]], str]] = {  # by the ending of a file
    ".jsonl": JSONL,
    ".gz": JSONL,
    ".json": (_parse_json, "a list of JSON objects"),
    ".csv": (_parse_csv, "rows with as many fields as the first line"),
    ".tsv": (_parse_csv, "rows with as many fields as the first line"),
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
