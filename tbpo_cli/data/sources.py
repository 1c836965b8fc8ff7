"""Rows: from local files or Hub data sets, one at a time, each with the place it came from."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbpo_cli.errors import TbpoError
from tbpo_cli.recipe import Source

DATASETS_BUILDERS = {".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


@dataclass(frozen=True)
class Row:
    """One row of a source. `number` counts from 1; in a text file it is the line."""

    source: str
    number: int
    content: Any


def read_rows(source: Source, split: str, key: str) -> Iterator[Row]:
    """The rows of a source, in order, never all in memory.

    Args:
        source: its path is a .jsonl[.gz], .json, .parquet, .csv or .arrow file, a folder that `datasets` saved, or the
            id of a Hub data set.
        split: of a Hub data set or a saved folder, if the source names none.
        key: the recipe key that names the source, for messages.

    Raises:
        TbpoError: for a source that cannot be read, with the file and the line.
    """
    is_jsonl = source.path.removesuffix(".gz").endswith(".jsonl")
    rows = _read_jsonl(Path(source.path)) if is_jsonl else _read_dataset(source, source.split or split, key)
    yield from (Row(source.path, number, content) for number, content in rows)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (ValueError, RecursionError) as error:  # JSON that is broken, not UTF-8, or nested beyond reason
        raise TbpoError(
            f"the line is not JSON: {error}",
            f"{path}, line {number}",
            "one JSON object a line, in UTF-8",
            "mend or remove that line",
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TbpoError(
            f"the compressed file is damaged: {error}",
            f"{path}, after line {number}",
            "a whole .gz file",
            "copy or download it again",
        ) from None
    except OSError as error:
        raise TbpoError(f"the file cannot be read: {error.strerror}", str(path), "a readable file") from None


def _read_dataset(source: Source, split: str, key: str) -> Iterator[tuple[int, Any]]:
    """Everything that is no JSONL goes through `datasets`: files are streamed, a Hub data set is downloaded once."""
    import datasets

    path, number = Path(source.path), 0
    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(source.path)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        elif path.is_file():
            if path.suffix not in DATASETS_BUILDERS:
                raise TbpoError(
                    f"{key} is of an unknown kind",
                    source.path,
                    f"one of .jsonl, .jsonl.gz, {', '.join(DATASETS_BUILDERS)}",
                    "convert the file, or rename it if its ending is wrong",
                )
            builder = DATASETS_BUILDERS[path.suffix]
            rows = datasets.load_dataset(builder, data_files=source.path, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(source.path, source.config, split=split, revision=source.revision)
        for number, row in enumerate(rows, 1):
            yield number, row
    except TbpoError:
        raise
    except Exception as error:  # whatever `datasets` and the Hub raise is about the source that was named
        raise TbpoError(
            f"{key} cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            f"{source.path}{f', after row {number}' if number else ''}",
            f"a local file, a folder, or a Hub data set with the split {split!r}",
            f"check {key} in the recipe",
        ) from error
