"""Rows: from local files or Hub data sets, one at a time, each with the place it came from."""

from __future__ import annotations

import gzip
import json
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


def read_rows(sources: Source, split: str, key: str) -> Iterator[Row]:
    """The rows of all sources, one source after the other.

    Args:
        sources: paths of .jsonl[.gz], .json, .parquet, .csv or .arrow files, folders that `datasets` saved, or ids of
            Hub data sets.
        split: the split of a Hub data set.
        key: the recipe key that names the sources, for messages.

    Raises:
        TbpoError: for a source that cannot be read, with the file and the line.
    """
    for source in [sources] if isinstance(sources, str) else sources:
        name = source.removesuffix(".gz")
        rows = _read_jsonl(Path(source)) if name.endswith(".jsonl") else _read_dataset(source, split, key)
        yield from (Row(source, number, content) for number, content in rows)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TbpoError(
            f"the line is not JSON: {error}",
            f"{path}, line {number}",
            "one JSON object a line, in UTF-8",
            "mend or remove that line",
        ) from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise TbpoError(
            f"the compressed file is damaged: {error}",
            f"{path}, after line {number}",
            "a whole .gz file",
            "copy or download it again",
        ) from None
    except OSError as error:
        raise TbpoError(f"the file cannot be read: {error.strerror}", str(path), "a readable file") from None


def _read_dataset(source: str, split: str, key: str) -> Iterator[tuple[int, Any]]:
    """Everything that is no JSONL goes through `datasets`, without loading it into memory."""
    import datasets

    path = Path(source)
    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(source)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        elif path.is_file():
            if path.suffix not in DATASETS_BUILDERS:
                raise TbpoError(
                    f"{key} is of an unknown kind",
                    source,
                    f"one of .jsonl, .jsonl.gz, {', '.join(DATASETS_BUILDERS)}",
                    "convert the file, or rename it if its ending is wrong",
                )
            rows = datasets.load_dataset(
                DATASETS_BUILDERS[path.suffix], data_files=source, split="train", streaming=True
            )
        else:
            rows = datasets.load_dataset(source, split=split, streaming=True)
        yield from enumerate(rows, 1)
    except TbpoError:
        raise
    except Exception as error:  # whatever `datasets` and the Hub raise is about the source that was named
        raise TbpoError(
            f"{key} cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            source,
            f"a local file, a folder, or a Hub data set with the split {split!r}",
            f"check {key} in the recipe",
        ) from error
