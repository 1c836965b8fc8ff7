"""`tbpo prepare`: rows → checked, tokenized pairs, and a report of what was dropped and why."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tbpo_cli import console
from tbpo_cli.data.pairs import PreferencePair, RejectedRow, recognise, to_pair
from tbpo_cli.data.sources import Row, read_rows
from tbpo_cli.data.store import PairStore, PairWriter
from tbpo_cli.data.tokens import TokenizedPair, load_tokenizer, tokenize_pairs
from tbpo_cli.errors import TbpoError
from tbpo_cli.recipe import Recipe
from tbpo_cli.run import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROWS_AT_A_TIME = 1000
EXCERPT_CHARACTERS = 200


@dataclass
class Counts:
    """What became of the rows of one recipe key. `kept` is by split, `rejected` by reason."""

    rows: int = 0
    formats: dict[str, str] = field(default_factory=dict)
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Prepares the training, evaluation and SFT pairs of a recipe.

    Raises:
        TbpoError: for a source that cannot be read, a template that cannot be cut, or too many unusable rows.
    """
    started = time.monotonic()
    folder = run_dir.begin("prepare", recipe)
    for leftover in ("train", "eval", "sft"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    data = recipe.data
    with (folder / "rejects.jsonl").open("w", encoding="utf-8") as rejects:
        work = _Work(recipe, load_tokenizer(recipe.model), folder, rejects)
        counts = {}
        if data.eval is not None:
            counts["data.eval"] = work.prepare(
                "data.eval", read_rows(data.eval, data.eval_split, "data.eval"), ("eval",)
            )
        rows = read_rows(data.train, data.train_split, "data.train")
        splits = ("train", "eval") if data.eval is None else ("train",)
        counts["data.train"] = work.prepare("data.train", rows, splits)
        if recipe.sft is not None and recipe.sft.train is not None:
            rows = read_rows(recipe.sft.train, data.train_split, "sft.train")
            counts["sft.train"] = work.prepare("sft.train", rows, ("sft",))
    for key, count in counts.items():
        _check(key, count, data.max_reject_fraction, folder)
    run_dir.finish(
        "prepare",
        [*folder.glob("*/pairs.arrow"), folder / "rejects.jsonl"],
        {
            "counts": {key: vars(count) for key, count in counts.items()},
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    report(recipe, run_dir)


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the counts of the complete stage."""
    folder = run_dir.stage("prepare")
    rows = []
    for key, counts in run_dir.manifest("prepare")["counts"].items():
        for split in counts["kept"]:
            store = PairStore(folder / split)
            lengths = [store.prompt_lengths, store.chosen_lengths, store.rejected_lengths]
            means = [f"{values.mean():.0f}" if len(values) else "" for values in lengths]
            formats = ", ".join(sorted(set(counts["formats"].values())))
            rows.append([split, key, formats, f"{counts['rows']:,}", f"{len(store):,}", *means])
    headings = ["split", "from", "format", "rows", "pairs", "prompt", "chosen", "rejected"]
    console.show_table("Prepared pairs (prompt, chosen, rejected: mean tokens)", headings, rows)
    _show_rejected({k: c["rejected"] for k, c in run_dir.manifest("prepare")["counts"].items()}, folder)


def _show_rejected(rejected: dict[str, dict[str, int]], folder: Path) -> None:
    rows = [[key, reason, f"{n:,}"] for key, reasons in rejected.items() for reason, n in reasons.items()]
    if rows:
        console.show_table("Rows that were left out", ["from", "reason", "rows"], rows)
        console.say(f"each with its number and text: {folder / 'rejects.jsonl'}")


def _check(key: str, counts: Counts, max_reject_fraction: float, folder: Path) -> None:
    rejected = counts.rejected.total()
    if rejected > max_reject_fraction * counts.rows or not counts.kept.total():
        _show_rejected({key: counts.rejected}, folder)
        raise TbpoError(
            f"{rejected:,} of {counts.rows:,} rows of {key} cannot be used",
            str(folder / "rejects.jsonl"),
            f"at least one usable row, and at most {max_reject_fraction:.0%} left out",
            "mend the rows, name the columns under [data.columns], or raise data.max_reject_fraction",
        )


@dataclass(frozen=True)
class _Work:
    """What all sources of a recipe are prepared with."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    rejects: TextIO
    eval_prompts: set[str] = field(default_factory=set)

    def prepare(self, key: str, rows: Iterator[Row], splits: tuple[str, ...]) -> Counts:
        """Writes the rows of one key to `splits`; if there are two, `eval_fraction` of the prompts to the second."""
        counts = Counts(kept=Counter(dict.fromkeys(splits, 0)))
        seen: set[str] = set()
        with ExitStack() as stack:
            writers = {split: stack.enter_context(PairWriter(self.folder / split)) for split in splits}
            for batch in _batched(rows, ROWS_AT_A_TIME):
                counts.rows += len(batch)
                usable: list[tuple[Row, PreferencePair]] = []
                for row in batch:
                    try:
                        usable.append((row, self._pair(row, counts, seen, leave_out=self._held_out(splits))))
                    except RejectedRow as reason:
                        self._reject(key, row, reason, counts)
                kept: dict[str, list[TokenizedPair]] = {split: [] for split in splits}
                tokenized = tokenize_pairs([pair for _, pair in usable], self.tokenizer, self.recipe.data)
                for (row, pair), result in zip(usable, tokenized, strict=True):
                    if isinstance(result, RejectedRow):
                        self._reject(key, row, result, counts)
                    else:
                        kept[self._split_of(pair, splits)].append(result)
                for split, pairs in kept.items():
                    writers[split].write(pairs)
                    counts.kept[split] += len(pairs)
        return counts

    def _pair(self, row: Row, counts: Counts, seen: set[str], leave_out: set[str]) -> PreferencePair:
        if row.source not in counts.formats:
            counts.formats[row.source] = recognise(row, self.recipe.data)
        pair = to_pair(row, counts.formats[row.source], self.recipe.data.columns)
        if pair.prompt_hash in leave_out:
            raise RejectedRow("in_eval", "the prompt is among the evaluation prompts")
        if self.recipe.data.dedup and pair.pair_id in seen:
            raise RejectedRow("duplicate")
        seen.add(pair.pair_id)
        return pair

    def _held_out(self, splits: tuple[str, ...]) -> set[str]:
        return set() if splits == ("eval",) else self.eval_prompts

    def _split_of(self, pair: PreferencePair, splits: tuple[str, ...]) -> str:
        """By the prompt, so that no prompt is in two splits, and by the seed."""
        if splits == ("eval",):
            self.eval_prompts.add(pair.prompt_hash)
        if len(splits) == 1:
            return splits[0]
        digest = hashlib.sha256(f"{self.recipe.run.seed} {pair.prompt_hash}".encode()).digest()
        return splits[int.from_bytes(digest[:8], "big") < self.recipe.data.eval_fraction * 2**64]

    def _reject(self, key: str, row: Row, reason: RejectedRow, counts: Counts) -> None:
        counts.rejected[reason.reason] += 1
        line = {
            "from": key,
            "source": row.source,
            "row": row.number,
            "reason": reason.reason,
            "detail": reason.detail,
            "excerpt": json.dumps(row.content, default=str)[:EXCERPT_CHARACTERS],
        }
        self.rejects.write(json.dumps(line) + "\n")


def _batched(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
