"""Which pairs of a recipe's rows are kept, how often, and in which split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TextIO

import pyarrow as pa

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe, Source
from tbpo_cli.data.chunks import prepare_rows
from tbpo_cli.data.formats import recognise
from tbpo_cli.data.pairs import Noted, RejectedRow, draw
from tbpo_cli.data.sources import ROWS_AT_A_TIME, Row, read_rows
from tbpo_cli.data.store import record_batch
from tbpo_cli.data.tokens import Result, TokenizedPair
from tbpo_cli.errors import TbpoError

EXCERPT_CHARACTERS = 200
# The version of how rows are read: it is raised when the same rows are read as other pairs. 1: what
# a number says of the better answer follows from the whole column (1 and 2 were taken for 0 and 1).
# 2: both rows of an unpaired comparison have the same weight (that of one was taken).
READING = 2
# By format, from which READING on its rows are read as now, and what may be wrong before.
READ_SINCE = {
    "winner": (1, "rows of the format winner with numbers: {}the worse answer for the better"),
    "unpaired": (2, "rows of the format unpaired: {}the weight of one of two rows for both"),
}


@dataclass
class Counts:
    """What became of the rows of one source.

    Args:
        kept: number of pairs written, by split.
        rejected: number of rows, or of pairs of a row of several, that cannot be used, by reason.
        noted: number of pairs, by what a reader should know of them: duplicate (left out, since
            the same comparison came before), other_weight (such a repeat that has another weight
            than the one before), reversed (the same comparison also occurs with chosen
            and rejected exchanged), cut (to data.max_length), unsampled (left out by the weight of
            the source), overlap (left out of the held-out pairs by data.max_eval_overlap); and
            number of answers of rows with several of them, by what `choose` notes.
    """

    key: str
    source: str
    format: str = ""
    rows: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)


@dataclass
class PairFilter:
    """Decides, row after row, which pairs of a recipe key are kept.

    Args:
        split: where the pairs go.
        eval_prompts: hashes of the prompts that must not be trained on.
        rejects: where the rows that cannot be used are written.
        seen: ids of the pairs that were kept, each with its weight.
        prompts: of each pair that was written, in order, the hash of its prompt.
        counts: of each source.
    """

    recipe: Recipe
    key: str
    split: str
    eval_prompts: set[str]
    rejects: TextIO
    seen: dict[str, float] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)

    def keep(
        self, source: Source, split: str, pool: Executor, writer: pa.RecordBatchFileWriter
    ) -> None:
        """Writes the pairs of one source, and counts them.

        Args:
            split: of a Hub data set, if the source names none.
            pool: of `workers`, which makes pairs of rows.
        """
        data = self.recipe.data
        is_sft = self.key == "sft.train"
        data = replace(data, format="auto") if is_sft else data
        format_name, rows = recognise(partial(read_rows, source, split, self.key), data, is_sft)
        if format_name.startswith("sft_") and not is_sft:
            _refuse_demonstrations(self.recipe, self.key, source.path, format_name)
        counts = Counts(self.key, source.path, format_name, kept=Counter({self.split: 0}))
        self.counts.append(counts)
        with console.progress(f"preparing {self.key}", None, every=50 * ROWS_AT_A_TIME) as update:
            for chunk, results in prepare_rows(rows, format_name, data, pool):
                kept: list[TokenizedPair] = []
                for row, of_row in zip(chunk, results, strict=True):
                    for result in of_row:
                        kept += self._kept(row, result, source.weight, counts)
                if kept:
                    writer.write_batch(record_batch(kept))
                    self.prompts += [pair.prompt_hash for pair in kept]
                counts.kept[self.split] += len(kept)
                counts.rows += len(chunk)
                update(counts.rows, "rows")

    def _kept(
        self, row: Row, result: Result | Noted, weight: float, counts: Counts
    ) -> list[TokenizedPair]:
        """The pair, as often as it is written; counts what becomes of it, or notes of answers."""
        if isinstance(result, Counter):
            counts.noted.update(result)
            return []
        if isinstance(result, TokenizedPair) and result.prompt_hash in self.eval_prompts:
            result = RejectedRow("in_eval", "the prompt is among the evaluation prompts")
        if isinstance(result, RejectedRow):
            self._reject(row, result, counts)
            return []
        if self.recipe.data.dedup and result.pair_id in self.seen:
            counts.noted["duplicate"] += 1
            counts.noted["other_weight"] += result.weight != self.seen[result.pair_id]
            return []
        self.seen[result.pair_id] = result.weight
        copies = int(weight) + (draw(self.recipe.run.seed, result.pair_id) < weight % 1)
        counts.noted["reversed"] += result.reversed_id in self.seen
        counts.noted["cut"] += result.is_cut
        counts.noted["unsampled"] += not copies
        return [result] * copies

    def _reject(self, row: Row, reason: RejectedRow, counts: Counts) -> None:
        counts.rejected[reason.reason] += 1
        counts.noted.update(reason.noted)
        line = {"from": self.key, "source": row.source, "row": row.number}
        line |= {"reason": reason.reason, "detail": reason.detail}
        line |= {"excerpt": json.dumps(row.content, default=str)[:EXCERPT_CHARACTERS]}
        self.rejects.write(json.dumps(line) + "\n")


def _refuse_demonstrations(recipe: Recipe, key: str, where: str, format_name: str) -> None:
    """Says that rows of one answer each cannot be aligned on, before they are tokenized.

    Raises:
        TbpoError: unless the recipe's `sft` trains on them, or its `align` needs no pairs.
    """
    if recipe.align.loss.span == "chosen" or recipe.rounds is not None:
        return
    fault = _demonstrations(key, where, format_name)
    if recipe.sft is None or recipe.sft.train is not None:
        raise fault
    console.say(f"warning: {fault.what}: `tbpo sft` can train on them, `tbpo align` cannot")


def require_comparisons(recipe: Recipe, counts: Sequence[dict[str, Any]]) -> None:
    """Raises TbpoError if demonstrations were prepared for an alignment on comparisons.

    Args:
        counts: of the sources, as in the manifest of the stage.
    """
    for count in counts:
        is_one_answer = count["format"].startswith("sft_") and count["key"] != "sft.train"
        if is_one_answer and recipe.align.loss.span != "chosen":
            raise _demonstrations(count["key"], count["source"], count["format"])


def _demonstrations(key: str, where: str, format_name: str) -> TbpoError:
    """Rows of one answer each in the place of comparisons."""
    return TbpoError(
        f"the rows of {key} are demonstrations: they have no rejected responses",
        f"{where}, of the format {format_name}",
        "comparisons to align on: of each prompt a chosen and a rejected response",
        f"demonstrations are for `tbpo sft`: [sft] train = {where!r}, and comparisons in {key}",
    )


def read_otherwise(manifest: dict[str, Any]) -> list[str]:
    """What another version, with another READING, has read differently in a complete stage.

    Args:
        manifest: of the stage; it may be empty.
    """
    formats = {count["format"] for count in manifest.get("counts", ())}
    reading = manifest.get("reading", 0)
    earlier = "an earlier version prepared them, and may have taken "
    return [
        what.format(earlier)
        for name, (since, what) in READ_SINCE.items()
        if name in formats and reading < since
    ]
