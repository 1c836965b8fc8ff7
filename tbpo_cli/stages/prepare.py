"""`tbpo prepare`: rows → checked, tokenized pairs, and a report of what was left out and why."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from tbpo_cli import console
from tbpo_cli.data import preview
from tbpo_cli.data.chunks import ROWS_AT_A_TIME, Chunk, Kept, prepare_rows, workers
from tbpo_cli.data.pairs import RejectedRow
from tbpo_cli.data.sources import read_rows
from tbpo_cli.data.store import PairStore, pair_writer
from tbpo_cli.data.tokens import fingerprint, load_tokenizer
from tbpo_cli.errors import TbpoError
from tbpo_cli.recipe import Recipe, Source
from tbpo_cli.run import RunDir

EXCERPT_CHARACTERS = 200


@dataclass
class Counts:
    """What became of the rows of one source. `kept` is by split, `rejected` by reason.

    `noted` counts pairs that are kept, or left out on the recipe's own word: reversed (the same comparison is there the
    other way round as well), cut (to data.max_length), unsampled (a weight below 1).
    """

    key: str
    source: str
    format: str = ""
    rows: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)


def run(recipe: Recipe, run_dir: RunDir) -> None:
    """Prepares the training, evaluation and SFT pairs of a recipe.

    Raises:
        TbpoError: for a source that cannot be read, a template that cannot be cut, or too many unusable rows.
    """
    started = time.monotonic()
    folder = run_dir.begin("prepare", recipe)
    tokenizer = load_tokenizer(recipe.model)  # before the workers do, whose errors could not be told
    for leftover in ("train", "eval", "sft"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    data, sft = recipe.data, recipe.sft
    work = [("data.train", data.train, data.train_split, ("train",) if data.eval else ("train", "eval"))]
    if data.eval is not None:  # first, so that its prompts are known
        work.insert(0, ("data.eval", data.eval, data.eval_split, ("eval",)))
    if sft is not None and sft.train is not None:
        work.append(("sft.train", sft.train, data.train_split, ("sft",)))
    counts: list[Counts] = []
    eval_prompts: set[str] = set()
    with workers(recipe.model, data) as pool, (folder / "rejects.jsonl").open("w", encoding="utf-8") as rejects:
        for key, sources, split, into in work:
            sifter = _Sifter(recipe, key, into, eval_prompts, rejects, pool)
            with ExitStack() as stack:
                writers = {name: stack.enter_context(pair_writer(folder / name)) for name in into}
                counts += [sifter.sift(source, split, writers) for source in sources]
    for key, *_ in work:
        _check(key, [count for count in counts if count.key == key], data.max_reject_fraction, folder)
    facts: dict[str, Any] = {
        "counts": [vars(count) for count in counts],
        "tokenizer": fingerprint(tokenizer),
        "seconds": round(time.monotonic() - started, 1),
    }
    preview.write_report(recipe, folder, facts["counts"])
    outputs = [*folder.glob("*/pairs.arrow"), folder / "rejects.jsonl"]
    run_dir.finish("prepare", outputs, facts)
    report(recipe, run_dir)


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the counts of the complete stage."""
    folder, counts = run_dir.stage("prepare"), run_dir.manifest("prepare")["counts"]
    rows = [
        [split, count["source"].rpartition("/")[2], count["format"], f"{count['rows']:,}", f"{pairs:,}"]
        for count in counts
        for split, pairs in count["kept"].items()
    ]
    console.show_table("Prepared pairs", ["split", "from", "format", "rows", "pairs"], rows)
    _show_rejected(counts, folder)
    rows = []
    for split in dict.fromkeys(split for count in counts for split in count["kept"]):
        store = PairStore(folder / split)
        lengths = (store.prompt_lengths, store.chosen_lengths, store.rejected_lengths)
        rows.append([split, *(f"{x.mean():.0f}" if len(x) else "" for x in lengths)])
    console.show_table("Mean tokens", ["split", "prompt", "chosen", "rejected"], rows)
    console.say(f"more about them: {folder / 'report.html'}")


def show_pairs(recipe: Recipe, run_dir: RunDir, num_pairs: int, with_ids: bool) -> None:
    """Prints the first training pairs of the complete stage as the model sees them."""
    preview.show_pairs(PairStore(run_dir.stage("prepare") / "train"), load_tokenizer(recipe.model), num_pairs, with_ids)


def _show_rejected(counts: list[dict[str, Any]], folder: Path) -> None:
    rows = [
        [reason, count["source"].rpartition("/")[2], f"{number:,}"]
        for count in counts
        for reason, number in sorted(count["rejected"].items())
    ]
    if rows:
        console.show_table("Rows that were left out", ["reason", "from", "rows"], rows)
        console.say(f"each with its number and text: {folder / 'rejects.jsonl'}")
    for count in counts:
        for note, number in count["noted"].items():
            if number:
                console.say(f"{count['source'].rpartition('/')[2]}: {NOTES[note].format(number)}")


NOTES = {
    "reversed": "{:,} pairs are there the other way round as well (kept)",
    "cut": "{:,} pairs have a response that was cut to data.max_length",
    "unsampled": "{:,} pairs are left out by the source's weight",
}


def _check(key: str, counts: list[Counts], max_reject_fraction: float, folder: Path) -> None:
    rejected = sum(count.rejected.total() for count in counts)
    rows = sum(count.rows for count in counts)
    if rejected > max_reject_fraction * rows or not any(count.kept.total() for count in counts):
        _show_rejected([vars(count) for count in counts], folder)
        reasons = sum((count.rejected for count in counts), Counter()).most_common()
        fix = "mend the rows, name the columns under [data.columns], or raise data.max_reject_fraction"
        if reasons and reasons[0][0] == "overlong":
            fix = 'raise data.max_length, set data.overlong = "truncate", or raise data.max_reject_fraction'
        raise TbpoError(
            f"{rejected:,} of {rows:,} rows of {key} cannot be used"
            + "".join(f", {number:,} {reason}" for reason, number in reasons),
            str(folder / "rejects.jsonl"),
            f"at least one usable row, and at most {max_reject_fraction:.0%} left out",
            fix,
        )


@dataclass(frozen=True)
class _Sifter:
    """Decides, row after row, which pairs of a recipe key are kept, and in which split.

    Args:
        splits: where the pairs go; if there are two, `eval_fraction` of the prompts to the second.
        eval_prompts: hashes of the evaluation prompts, filled by the key that makes them.
        seen: ids of the pairs that were kept.
    """

    recipe: Recipe
    key: str
    splits: tuple[str, ...]
    eval_prompts: set[str]
    rejects: TextIO
    pool: Executor
    seen: set[str] = field(default_factory=set)

    def sift(self, source: Source, split: str, writers: dict[str, pa.RecordBatchFileWriter]) -> Counts:
        """Writes the pairs of one source."""
        counts = Counts(self.key, source.path, kept=Counter(dict.fromkeys(self.splits, 0)))
        rows = read_rows(source, split, self.key)
        with console.progress(f"preparing {self.key}", None, every=50 * ROWS_AT_A_TIME) as update:
            for chunk in prepare_rows(rows, self.recipe.data, self.pool):
                self._sift_chunk(chunk, source.weight, writers, counts)
                update(counts.rows, "rows")
        return counts

    def _sift_chunk(
        self, chunk: Chunk, weight: float, writers: dict[str, pa.RecordBatchFileWriter], counts: Counts
    ) -> None:
        counts.format = chunk.format_name
        counts.rows += len(chunk.rows)
        rejected = dict(chunk.rejected)
        taken: dict[str, list[int]] = {name: [] for name in self.splits}
        for index, kept in enumerate(chunk.kept):
            if reason := self._reason_against(kept):
                rejected[kept.position] = reason
                continue
            self.seen.add(kept.pair_id)
            copies = self._copies(kept, weight)
            counts.noted["reversed"] += kept.reversed_id != kept.pair_id and kept.reversed_id in self.seen
            counts.noted["cut"] += kept.is_cut
            counts.noted["unsampled"] += not copies
            taken[self._split_of(kept)] += [index] * copies
        for name, indices in taken.items():
            counts.kept[name] += len(indices)
            if indices:
                writers[name].write_batch(chunk.pairs.take(pa.array(indices)))
        self._note_rejected(chunk, rejected, counts)

    def _reason_against(self, kept: Kept) -> RejectedRow | None:
        if self.splits != ("eval",) and kept.prompt_hash in self.eval_prompts:
            return RejectedRow("in_eval", "the prompt is among the evaluation prompts")
        if self.recipe.data.dedup and kept.pair_id in self.seen:
            return RejectedRow("duplicate", "the same comparison came before")
        return None

    def _split_of(self, kept: Kept) -> str:
        """By the prompt, so that no prompt is in two splits, and by the seed."""
        if self.splits == ("eval",):
            self.eval_prompts.add(kept.prompt_hash)
        held_out = len(self.splits) > 1 and self._draw(kept.prompt_hash) < self.recipe.data.eval_fraction
        return self.splits[held_out]

    def _copies(self, kept: Kept, weight: float) -> int:
        whole = int(weight)
        return whole + (self._draw(kept.pair_id) < weight - whole)

    def _draw(self, text: str) -> float:
        """A number in [0, 1) that the text and the seed decide."""
        digest = hashlib.sha256(f"{self.recipe.run.seed} {text}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def _note_rejected(self, chunk: Chunk, rejected: dict[int, RejectedRow], counts: Counts) -> None:
        for position, reason in sorted(rejected.items()):
            row = chunk.rows[position]
            counts.rejected[reason.reason] += 1
            line = {
                "from": self.key,
                "source": row.source,
                "row": row.number,
                "reason": reason.reason,
                "detail": reason.detail,
                "excerpt": json.dumps(row.content, default=str)[:EXCERPT_CHARACTERS],
            }
            self.rejects.write(json.dumps(line) + "\n")
