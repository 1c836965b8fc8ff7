"""`tbpo prepare`: rows → checked, tokenized pairs, and a report of what was left out and why."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tbpo_cli import console
from tbpo_cli.config.recipe import Data, Recipe, Source
from tbpo_cli.config.toml import ENCODING_FILES
from tbpo_cli.data.chunks import workers
from tbpo_cli.data.formats import columns_read
from tbpo_cli.data.formats.unknown import absent_columns, unread_columns
from tbpo_cli.data.held_out import drop_overlapping, held_out_prompts, split_off
from tbpo_cli.data.selection import READING, Counts, PairFilter, read_otherwise
from tbpo_cli.data.sources import ROWS_AT_A_TIME, Row, read_rows
from tbpo_cli.data.store import PairStore, pair_writer
from tbpo_cli.data.tokenizer import fingerprint, load_tokenizer
from tbpo_cli.errors import TbpoError, gather
from tbpo_cli.report.preparation import write_report
from tbpo_cli.runs.files import json_lines
from tbpo_cli.runs.launch import ALONE, Processes
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.sharing import complete_beside, copy_stage
from tbpo_cli.runs.stage import Stage

# Recipe key, its sources, their split, where the pairs go.
Work = tuple[str, tuple[Source, ...], str, str]

FEW_PROMPTS = 20


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Prepares the training, evaluation and SFT pairs of a recipe.

    A run beside this one that has them from the same inputs is copied, unless --restart asks for
    new ones.

    Raises:
        TbpoError: for a source that cannot be read, a template that cannot be cut, or too many
            unusable rows.
    """
    started = time.monotonic()
    folder = run_dir.begin(STAGE, recipe)
    # Before the workers load it, whose exceptions would break the pool.
    tokenizer = load_tokenizer(recipe.model)
    if not run_dir.is_restarted("prepare") and _copied(recipe, run_dir, fingerprint(tokenizer)):
        return
    data = recipe.data
    work = _work(recipe)
    _check_sources(work, data)
    counts: list[Counts] = []
    eval_prompts: set[str] = set()
    with (
        workers(recipe.model, data, recipe.choose, recipe.run.seed) as pool,
        (folder / "rejects.jsonl").open("w", encoding="utf-8") as rejects,
    ):
        for key, sources, split, into in work:
            kept = PairFilter(recipe, key, into, eval_prompts, rejects)
            with pair_writer(folder / into) as writer:
                for source in sources:
                    kept.keep(source, split, pool, writer)
            counts += kept.counts
            rejects.flush()
            _check(key, kept.counts, data.max_reject_fraction, folder)
            if key == "data.eval":
                eval_prompts |= {*kept.prompts}
            elif key == "data.train" and data.eval is None:
                eval_prompts |= _hold_out(recipe, folder, kept)
    if data.max_eval_overlap is not None:
        _drop_overlapping(folder, data.max_eval_overlap, counts)
    facts = {
        "counts": [vars(count) for count in counts],
        "tokenizer": fingerprint(tokenizer),
        "seconds": round(time.monotonic() - started, 1),
    }
    _finish(recipe, run_dir, facts)


def _copied(recipe: Recipe, run_dir: RunDir, tokenizer: str) -> bool:
    """Completes the stage with what a run beside this one has prepared from the same inputs.

    Args:
        tokenizer: what names the tokenizer's content, which may be the Hub's.
    """
    other = complete_beside(run_dir, "prepare")
    manifest = other.manifest("prepare") if other else {}
    if other is None or manifest["tokenizer"] != tokenizer or read_otherwise(manifest):
        return False
    if not copy_stage(other, run_dir, "prepare"):
        return False
    console.say(
        f"prepare: the pairs of {console.short(other.path)} are copied, which were made from the"
        " same inputs (tbpo prepare RECIPE --restart makes them anew)"
    )
    facts = {name: manifest[name] for name in ("counts", "tokenizer", "seconds")}
    _finish(recipe, run_dir, facts | {"copied_from": str(other.path)})
    check(recipe, run_dir)
    return True


def _finish(recipe: Recipe, run_dir: RunDir, facts: dict[str, Any]) -> None:
    """Writes report.html and the manifest, and reports the complete stage."""
    folder = run_dir.stage("prepare")
    facts |= {"reading": READING}
    write_report(recipe, folder, facts["counts"])
    run_dir.finish("prepare", [*folder.glob("*/pairs.arrow"), folder / "rejects.jsonl"], facts)
    report(recipe, run_dir)


def _work(recipe: Recipe) -> list[Work]:
    """The recipe keys with rows, in the order in which they are prepared."""
    data = recipe.data
    work = [("data.train", data.train, data.train_split, "train")]
    if data.eval is not None:  # first, so that its prompts are known
        work.insert(0, ("data.eval", data.eval, data.eval_split, "eval"))
    if recipe.sft is not None and recipe.sft.train is not None:
        work.append(("sft.train", recipe.sft.train, data.train_split, "sft"))
    return work


def _check_sources(work: list[Work], data: Data) -> None:
    """Raises TbpoError for rows that are both trained and measured on, and for columns that the
    recipe names and that are absent or not read.
    """
    places: dict[tuple[str | None, ...], str] = {}
    for key, sources, split, _ in work[:2] if data.eval is not None else []:
        for source in sources:
            place: tuple[str | None, ...] = (
                source.path,
                source.config,
                source.split or split,
                source.revision,
            )
            if not Path(source.path).is_dir() and Path(source.path).exists():
                place = (source.path,)  # a file has no splits
            if places.setdefault(place, key) != key:
                raise TbpoError(
                    "data.train and data.eval name the same rows",
                    f"data.eval = {source.path!r}",
                    "held-out rows that are not trained on",
                    "leave data.eval out: data.eval_fraction of the prompts are held out then",
                )
    if data.columns:
        _check_columns(work, data)


def _check_columns(work: list[Work], data: Data) -> None:
    """Raises TbpoError for [data.columns] that no source has, or that its format does not read."""
    seen: set[str] = set()
    samples: list[tuple[str, list[Row]]] = []
    for key, sources, split, _ in work:
        for source in sources:
            rows = list(itertools.islice(read_rows(source, split, key), ROWS_AT_A_TIME))
            samples.append((key, rows))
            seen |= {name for row in rows if isinstance(row.content, dict) for name in row.content}
    where = ", ".join(source.path for _, sources, *_ in work for source in sources)
    gather(absent_columns(data.columns, seen, where))
    found = [columns_read(rows, data, key == "sft.train") for key, rows in samples if rows]
    gather(unread_columns(data.columns, found, where))


def _hold_out(recipe: Recipe, folder: Path, kept: PairFilter) -> set[str]:
    """Moves `data.eval_fraction` of the prompts from train to eval; returns their hashes."""
    fraction = recipe.data.eval_fraction or 0.0
    prompts = held_out_prompts(kept.prompts, fraction, recipe.run.seed)
    mask = np.array([prompt in prompts for prompt in kept.prompts], dtype=bool)
    split_off(folder / "train", folder / "eval", mask)
    start = 0
    for counts in kept.counts:
        end = start + counts.kept["train"]
        counts.kept["eval"] = int(mask[start:end].sum())
        counts.kept["train"] -= counts.kept["eval"]
        start = end
    if not prompts:
        why = "data.eval_fraction is 0" if fraction == 0 else "there is but one prompt"
        console.say(
            f"warning: no pair is held out, since {why}: nothing will say whether the policy got"
            " better on prompts that it has not seen; give data.eval, or data.eval_fraction = 0.05"
        )
    elif len(prompts) < FEW_PROMPTS:
        console.say(
            f"warning: only {len(prompts)} prompts are held out: figures on them are rough;"
            " data.eval_fraction holds out more"
        )
    return prompts


def _drop_overlapping(folder: Path, threshold: float, counts: list[Counts]) -> None:
    """Leaves out the held-out pairs whose prompts the training pairs repeat, and counts them."""
    left_out = drop_overlapping(folder / "eval", folder / "train", threshold)
    start = 0
    for count in counts:
        if "eval" in count.kept:
            end = start + count.kept["eval"]
            count.noted["overlap"] = int(left_out[start:end].sum())
            count.kept["eval"] -= count.noted["overlap"]
            start = end


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the counts of the complete stage."""
    folder = run_dir.stage("prepare")
    counts = run_dir.manifest("prepare")["counts"]
    rows = [
        [split, c["source"].rpartition("/")[2], c["format"], f"{c['rows']:,}", f"{pairs:,}"]
        for c in counts
        for split, pairs in c["kept"].items()
    ]
    console.show_table("Prepared pairs", ["split", "from", "format", "rows", "pairs"], rows)
    _show_rejected(counts, folder)
    stores = {split: PairStore(folder / split) for count in counts for split in count["kept"]}
    rows = [
        [split, *([f"{m:.0f}" for m in store.lengths.mean(axis=0)] if len(store) else 3 * [""])]
        for split, store in stores.items()
    ]
    console.show_table("Mean tokens", ["split", "prompt", "chosen", "rejected"], rows)
    for split in (split for split, store in stores.items() if store.weighs_nothing):
        what = "no figures of them" if split == "eval" else "nothing to learn"
        console.say(f"WARNING: all pairs of {split} have the weight 0: there will be {what}")
    console.say(f"more about them: {console.short(folder / 'report.html')}")


def check(recipe: Recipe, run_dir: RunDir) -> None:
    """Raises TbpoError if the complete stage left out more than data.max_reject_fraction."""
    listed = run_dir.manifest("prepare")["counts"]
    for key in dict.fromkeys(count["key"] for count in listed):
        counts = [Counts(**count) for count in listed if count["key"] == key]
        for each in counts:
            each.kept = Counter(each.kept)
            each.rejected = Counter(each.rejected)
            each.noted = Counter(each.noted)
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
    "duplicate": "{:,} rows repeat an earlier comparison (left out; data.dedup = false keeps them)",
    "other_weight": "{:,} of these repeats have another weight than the first one, which is kept",
    "overlap": "{:,} held-out pairs have a prompt that occurs in the training pairs (left out)",
    "reversed": "{:,} pairs are there the other way round as well (kept)",
    "cut": "{:,} pairs have a response that was cut to data.max_length",
    "unsampled": "{:,} pairs are left out by the source's weight",
    "no_mark": "{:,} answers have no mark (left out)",
    "same_answer": "{:,} answers repeat another one to the same prompt (left out)",
    "cut_answer": "{:,} answers were cut at their limit (never chosen)",
}

NAME_COLUMNS = 'name the columns that hold them, e.g. [data.columns] chosen = "better_answer"'
OTHER_TEMPLATE = "name a template that does as model.chat_template"
FIXES = {  # by the most frequent reason
    "missing_column": NAME_COLUMNS,
    "null_column": NAME_COLUMNS,
    "wrong_type": f"mend the rows; if other columns hold the texts, {NAME_COLUMNS}",
    "overlong": 'raise data.max_length, or set data.overlong = "truncate"',
    "not_rendered": f"{OTHER_TEMPLATE}, or take that part out of the rows",
    "template_error": f"{OTHER_TEMPLATE}, or change the rows",
    "in_eval": "give data.eval other prompts than data.train",
    "unpaired": "give rows with both labels, of one weight, or the good ones as sft.train",
    "no_preference": "give rows of which one answer is better, or another [judge]",
    "identical": "give rows whose answers differ",
    "no_mark": "mend [judge], or give rows with two answers that have a mark",
    "all_cut": "raise rounds.max_new_tokens, or give rows with a better, whole answer",
    "small_margin": "lower choose.min_margin",
    "length_difference": "raise choose.max_length_difference",
    "unwanted": "give rows with label = true",
    "marks_differ": "take the wrong ones of scores and ranks out of the rows",
    "bad_weight": "mend the column weight of these rows, or take it out: a row without it weighs 1",
    "not_text": "take these rows out, or their pictures and sound if the text stands for itself",
}


def _check(key: str, counts: list[Counts], max_reject_fraction: float, folder: Path) -> None:
    """Raises TbpoError if there are no pairs of a recipe key, or too many unusable rows."""
    rows = sum(count.rows for count in counts)
    rejected = sum((count.rejected for count in counts), Counter())
    num_kept = sum(count.kept.total() for count in counts)
    num_duplicates = sum(count.noted["duplicate"] for count in counts)
    where = ", ".join(count.source for count in counts)
    if not rows:
        raise TbpoError(f"{key} has no rows", where, "at least one row", f"give {key} other rows")
    num_comparisons = num_kept + rejected.total() + num_duplicates
    if num_kept and rejected.total() <= max_reject_fraction * max(rows, num_comparisons):
        return
    _show_rejected([vars(count) for count in counts], folder)
    reasons = rejected.most_common()
    if not reasons:
        kinds = "duplicates" if num_duplicates else "left out by the weight of their source"
        raise TbpoError(f"no pair of {key} is left: all are {kinds}", where, "at least one pair")
    parts = [
        f"{rejected.total():,} of {rows:,} rows of {key} cannot be used",
        *(f"{number:,} {reason}" for reason, number in reasons),
    ]
    first = next(
        line
        for line in json_lines(folder / "rejects.jsonl")
        if line["from"] == key and line["reason"] == reasons[0][0]
    )
    place = f"{first['source']}, row {first['row']}: {first['detail'] or first['reason']}"
    raise TbpoError(
        ", ".join(parts),
        f"{folder / 'rejects.jsonl'}; first {place}",
        f"at least one usable row, and at most {max_reject_fraction:.0%} left out",
        FIXES.get(reasons[0][0], "mend the rows")
        + "; or raise data.max_reject_fraction" * (num_kept > 0),
    )


STAGE = Stage(
    name="prepare",
    needs=lambda recipe: (),
    keys=(
        "run.seed",
        "model.base",
        "model.revision",
        "model.chat_template",
        "data.",
        "choose.",
        "sft.train",
    ),
    run=run,
    report=report,
    base_files=ENCODING_FILES,
    check=check,
    outdated=read_otherwise,
)
