"""`tbpo prepare`: rows → checked, tokenized pairs, and a report of what was left out and why."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
from rich.text import Text

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe, Source
from tbpo_cli.config.toml import TOKENIZER_FILES
from tbpo_cli.data.chunks import prepare_rows, workers
from tbpo_cli.data.formats import recognise
from tbpo_cli.data.pairs import RejectedRow
from tbpo_cli.data.sources import ROWS_AT_A_TIME, Row, read_rows
from tbpo_cli.data.store import PairStore, pair_writer, record_batch
from tbpo_cli.data.templates import Chat
from tbpo_cli.data.tokenizer import fingerprint, load_tokenizer
from tbpo_cli.data.tokens import Result, TokenizedPair
from tbpo_cli.errors import TbpoError
from tbpo_cli.report.preparation import ShownToken, shown_parts, write_report
from tbpo_cli.runs.launch import ALONE, Processes
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage

EXCERPT_CHARACTERS = 200
KEY = {  # of the parts of a pair: style, meaning
    "prompt": ("dim", "The prompt is never in the loss;"),
    "aligned": ("green", "aligned tokens are read by every loss;"),
    "tail": ("yellow", "a tail by those of whole responses."),
}


@dataclass
class Counts:
    """What became of the rows of one source.

    Args:
        kept: number of pairs written, by split.
        rejected: number of rows that cannot be used, by reason.
        noted: number of pairs, by what a reader should know of them: reversed (the same comparison
            also occurs with chosen and rejected exchanged), cut (to data.max_length), unsampled
            (left out by the weight of the source).
    """

    key: str
    source: str
    format: str = ""
    rows: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Prepares the training, evaluation and SFT pairs of a recipe.

    Raises:
        TbpoError: for a source that cannot be read, a template that cannot be cut, or too many
            unusable rows.
    """
    started = time.monotonic()
    folder = run_dir.begin(STAGE, recipe)
    # Before the workers load it, whose exceptions would break the pool.
    tokenizer = load_tokenizer(recipe.model)
    Chat(tokenizer, recipe.data.template_date).check_that_it_ends()
    data, sft = recipe.data, recipe.sft
    work = [
        ("data.train", data.train, data.train_split, ("train",) if data.eval else ("train", "eval"))
    ]
    if data.eval is not None:  # first, so that its prompts are known
        work.insert(0, ("data.eval", data.eval, data.eval_split, ("eval",)))
    if sft is not None and sft.train is not None:
        work.append(("sft.train", sft.train, data.train_split, ("sft",)))
    counts: list[Counts] = []
    eval_prompts: set[str] = set()
    columns: set[str] = set()
    with (
        workers(recipe.model, data) as pool,
        (folder / "rejects.jsonl").open("w", encoding="utf-8") as rejects,
    ):
        for key, sources, split, into in work:
            with ExitStack() as stack:
                writers = {name: stack.enter_context(pair_writer(folder / name)) for name in into}
                pair_filter = PairFilter(recipe, key, writers, eval_prompts, rejects, columns)
                counts += [pair_filter.keep(source, split, pool) for source in sources]
    _check_columns(data.columns, columns)
    for key, *_ in work:
        _check(
            key, [count for count in counts if count.key == key], data.max_reject_fraction, folder
        )
    seconds = round(time.monotonic() - started, 1)
    facts = {
        "counts": [vars(count) for count in counts],
        "tokenizer": fingerprint(tokenizer),
        "seconds": seconds,
    }
    write_report(recipe, folder, [vars(count) for count in counts])
    run_dir.finish("prepare", [*folder.glob("*/pairs.arrow"), folder / "rejects.jsonl"], facts)
    report(recipe, run_dir)


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the counts of the complete stage."""
    folder, counts = run_dir.stage("prepare"), run_dir.manifest("prepare")["counts"]
    rows = [
        [
            split,
            count["source"].rpartition("/")[2],
            count["format"],
            f"{count['rows']:,}",
            f"{pairs:,}",
        ]
        for count in counts
        for split, pairs in count["kept"].items()
    ]
    console.show_table("Prepared pairs", ["split", "from", "format", "rows", "pairs"], rows)
    _show_rejected(counts, folder)
    rows = []
    for split in dict.fromkeys(split for count in counts for split in count["kept"]):
        lengths = PairStore(folder / split).lengths
        rows.append(
            [split, *(f"{mean:.0f}" for mean in lengths.mean(axis=0))]
            if len(lengths)
            else [split, "", "", ""]
        )
    console.show_table("Mean tokens", ["split", "prompt", "chosen", "rejected"], rows)
    console.say(f"more about them: {console.short(folder / 'report.html')}")


def show_pairs(recipe: Recipe, run_dir: RunDir, num_pairs: int, with_ids: bool) -> None:
    """Prints the first training pairs of the complete stage to stdout as the model sees them, token
    by token.
    """
    store, tokenizer = PairStore(run_dir.stage("prepare") / "train"), load_tokenizer(recipe.model)
    console.out.print(
        "│ ends a token, ‖ the aligned part.",
        *(f"[{style}]{text}[/]" for style, text in KEY.values()),
    )
    for index in range(min(num_pairs, len(store))):
        console.out.print(f"\n[bold]pair {store[index].pair_id}[/bold]")
        for name, tokens in shown_parts(store[index], tokenizer).items():
            console.out.print(f"[bold]{name}[/bold], {len(tokens)} tokens", highlight=False)
            console.out.print(_line(tokens, with_ids))


def _line(tokens: list[ShownToken], with_ids: bool) -> Text:
    line = Text()
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        line.append(
            console.plain(token.text).replace("\n", "⏎\n"),
            f"{KEY[token.part][0]}{' bold' if token.control else ''}",
        )
        line.append(f"⟨{token.token_id}⟩" if with_ids else "", "dim")
        line.append(
            "‖" if token.part == "aligned" and following and following.part == "tail" else "│",
            "dim",
        )
    return line


def _check_columns(wanted: dict[str, str], columns: set[str]) -> None:
    """Raises TbpoError if data.columns names a column that no row of any source has."""
    for ours, theirs in wanted.items():
        if theirs not in columns:
            raise TbpoError(
                f"no row has the column {theirs!r}",
                f"data.columns.{ours}",
                f"one of {', '.join(map(repr, sorted(columns)))}",
                f"change data.columns.{ours}, or leave it out",
            )


def check(recipe: Recipe, run_dir: RunDir) -> None:
    """Raises TbpoError if the complete stage left out more than data.max_reject_fraction."""
    listed = run_dir.manifest("prepare")["counts"]
    for key in dict.fromkeys(count["key"] for count in listed):
        counts = [Counts(**count) for count in listed if count["key"] == key]
        for each in counts:
            each.kept, each.rejected = Counter(each.kept), Counter(each.rejected)
        _check(key, counts, recipe.data.max_reject_fraction, run_dir.stage("prepare"))


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
    wanted = {"data.eval": "eval", "data.train": "train", "sft.train": "sft"}[key]
    if any(count.kept.total() for count in counts) and not any(c.kept[wanted] for c in counts):
        raise TbpoError(
            f"no pair of {key} is left to {'measure' if wanted == 'eval' else 'train'} on",
            str(folder),
            "at least one",
            "lower data.eval_fraction, or add rows",
        )
    rejected = sum(count.rejected.total() for count in counts)
    rows = sum(count.rows for count in counts)
    if rejected > max_reject_fraction * rows or not any(count.kept.total() for count in counts):
        _show_rejected([vars(count) for count in counts], folder)
        reasons = sum((count.rejected for count in counts), Counter()).most_common()
        fix = "mend the rows, name the columns under [data.columns], or raise "
        fix += "data.max_reject_fraction"
        if reasons and reasons[0][0] == "overlong":
            fix = 'raise data.max_length, set data.overlong = "truncate", or raise '
            fix += "data.max_reject_fraction"
        parts = [
            f"{rejected:,} of {rows:,} rows of {key} cannot be used",
            *(f"{n:,} {name}" for name, n in reasons),
        ]
        expected = f"at least one usable row, and at most {max_reject_fraction:.0%} left out"
        raise TbpoError(", ".join(parts), str(folder / "rejects.jsonl"), expected, fix)


@dataclass(frozen=True)
class PairFilter:
    """Decides, row after row, which pairs of a recipe key are kept, and in which split.

    Args:
        writers: by split, where the pairs go; if there are two, `eval_fraction` of the prompts to
            the second.
        eval_prompts: hashes of the evaluation prompts, filled by the key that they come from.
        columns: names of columns of the rows, filled.
        seen: ids of the pairs that were kept.
    """

    recipe: Recipe
    key: str
    writers: dict[str, pa.RecordBatchFileWriter]
    eval_prompts: set[str]
    rejects: TextIO
    columns: set[str]
    seen: set[str] = field(default_factory=set)

    def keep(self, source: Source, split: str, pool: Executor) -> Counts:
        """Writes the pairs of one source."""
        data = self.recipe.data
        data = replace(data, format="auto") if self.key == "sft.train" else data
        format_name, rows = recognise(read_rows(source, split, self.key), data)
        counts = Counts(
            self.key, source.path, format_name, kept=Counter(dict.fromkeys(self.writers, 0))
        )
        with console.progress(f"preparing {self.key}", None, every=50 * ROWS_AT_A_TIME) as update:
            for chunk, results in prepare_rows(rows, format_name, data, pool):
                kept: dict[str, list[TokenizedPair]] = {name: [] for name in self.writers}
                for row, result in zip(chunk, results, strict=True):
                    if isinstance(row.content, dict):
                        self.columns.update(row.content)
                    if reason := self._reason_against(result):
                        self._reject(row, reason, counts)
                    elif isinstance(result, TokenizedPair):
                        kept[self._split_of(result)] += [result] * self._copies(
                            result, source.weight, counts
                        )
                for name, pairs in kept.items():
                    counts.kept[name] += len(pairs)
                    if pairs:
                        self.writers[name].write_batch(record_batch(pairs))
                counts.rows += len(chunk)
                update(counts.rows, "rows")
        return counts

    def _reason_against(self, result: Result) -> RejectedRow | None:
        if isinstance(result, RejectedRow):
            return result
        if "eval" not in self.writers and result.prompt_hash in self.eval_prompts:
            return RejectedRow("in_eval", "the prompt is among the evaluation prompts")
        if self.recipe.data.dedup and result.pair_id in self.seen:
            return RejectedRow("duplicate", "the same comparison came before")
        return None

    def _split_of(self, pair: TokenizedPair) -> str:
        """By the prompt, so that no prompt is in two splits, and by the seed."""
        held_out = len(self.writers) > 1 and self._draw(pair.prompt_hash) < (
            self.recipe.data.eval_fraction or 0
        )
        split = [*self.writers][held_out]
        if split == "eval":
            self.eval_prompts.add(pair.prompt_hash)
        return split

    def _copies(self, pair: TokenizedPair, weight: float, counts: Counts) -> int:
        """How often a pair that is kept is written; counts what is noted of it."""
        self.seen.add(pair.pair_id)
        copies = int(weight) + (self._draw(pair.pair_id) < weight % 1)
        counts.noted["reversed"] += pair.reversed_id in self.seen
        counts.noted["cut"] += pair.is_cut
        counts.noted["unsampled"] += not copies
        return copies

    def _draw(self, text: str) -> float:
        """A number in [0, 1) that the text and the seed decide."""
        digest = hashlib.sha256(f"{self.recipe.run.seed} {text}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def _reject(self, row: Row, reason: RejectedRow, counts: Counts) -> None:
        counts.rejected[reason.reason] += 1
        line = {"from": self.key, "source": row.source, "row": row.number}
        line |= {"reason": reason.reason, "detail": reason.detail}
        line |= {"excerpt": json.dumps(row.content, default=str)[:EXCERPT_CHARACTERS]}
        self.rejects.write(json.dumps(line) + "\n")


STAGE = Stage(
    name="prepare",
    needs=lambda recipe: (),
    keys=("run.seed", "model.base", "model.revision", "model.chat_template", "data.", "sft.train"),
    run=run,
    report=report,
    base_files=(*TOKENIZER_FILES, "tokenization*.py"),
    check=check,
)
