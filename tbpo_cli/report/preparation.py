"""Prepared pairs for a person: their tokens with the loss mask, and prepare's report.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.tokenizer import load_tokenizer
from tbpo_cli.data.tokens import TokenizedPair
from tbpo_cli.report.charts import Panel, histogram
from tbpo_cli.report.pages import write_page

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUM_EXAMPLES = 10


@dataclass(frozen=True)
class ShownToken:
    """A token as text; its `part`: prompt, aligned (t < T, read by every loss) or tail (t ≥ T)."""

    token_id: int
    text: str
    part: str
    control: bool


def shown_parts(
    pair: TokenizedPair, tokenizer: PreTrainedTokenizerFast
) -> dict[str, list[ShownToken]]:
    """The tokens of prompt, chosen and, unless it is a demonstration, rejected."""
    controls = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    anchor = int(pair.prompt_ids[0])  # a decoder may treat the first token of a text in its own way
    before = len(tokenizer.decode([anchor]))
    aligned = pair.aligned_length or len(pair.chosen_ids)
    parts = {}
    for name, ids in (
        ("prompt", pair.prompt_ids),
        ("chosen", pair.chosen_ids),
        ("rejected", pair.rejected_ids),
    ):
        if len(ids):
            texts = [
                text[before:] for text in tokenizer.batch_decode([[anchor, int(i)] for i in ids])
            ]
            read = [
                "prompt" if name == "prompt" else "aligned" if t < aligned else "tail"
                for t in range(len(ids))
            ]
            is_control = [int(i) in controls for i in ids]
            parts[name] = list(map(ShownToken, map(int, ids), texts, read, is_control))
    return parts


def write_report(recipe: Recipe, folder: Path, counts: list[dict[str, Any]]) -> None:
    """Writes report.html beside prepared splits; `counts` says what became of the rows, as the
    manifest does.
    """
    tokenizer = load_tokenizer(recipe.model)
    names = dict.fromkeys(split for count in counts for split in count["kept"])
    stores = {name: PairStore(folder / name) for name in names}
    train = stores["train"]
    write_page(
        folder / "report.html",
        "prepare.html",
        title=f"Prepared pairs of {recipe.run.name}",
        subtitle=f"base {recipe.model.base}, at most {recipe.data.max_length:,} tokens, "
        f"longer pairs: {recipe.data.overlong}",
        sources=[
            [c["source"], c["key"], c["format"], f"{c['rows']:,}"]
            + [f"{sum(c[fate].values()):,}" for fate in ("kept", "rejected")]
            for c in counts
        ],
        reasons=[
            [reason, c["source"], f"{n:,}"]
            for c in counts
            for reason, n in sorted(c["rejected"].items())
        ],
        notes=[
            [note, c["source"], f"{n:,}"] for c in counts for note, n in c["noted"].items() if n
        ],
        splits=[_describe(name, store) for name, store in stores.items() if len(store)],
        examples=[
            (train[n].pair_id, shown_parts(train[n], tokenizer))
            for n in range(min(NUM_EXAMPLES, len(train)))
        ],
        chat_template=tokenizer.chat_template,
    )


def _describe(name: str, store: PairStore) -> dict[str, Any]:
    """Figures and histograms of a split."""
    prompt = store.prompt_lengths
    chosen = store.chosen_lengths
    rejected = store.rejected_lengths
    figures = []
    responses = {"chosen": chosen}
    shown = [("length of the prompts", "tokens", {"prompt": prompt})]
    if store.has_rejected:
        shared = np.minimum(chosen, rejected)
        beyond = 1 - 2 * shared.sum() / (chosen.sum() + rejected.sum())
        responses["rejected"] = rejected
        shown.append(("aligned length", "tokens", {"aligned": shared}))
        figures = [
            ["response tokens beyond the aligned length", f"{beyond:.1%}"],
            ["pairs whose chosen response is longer", f"{(chosen > rejected).mean():.1%}"],
            ["mean of chosen − rejected tokens", f"{(chosen - rejected).mean():+.1f}"],
        ]
    shown.insert(1, ("length of the responses", "tokens", responses))
    if len(margins := store.score_margins):
        figures.append(
            ["pairs whose chosen response has the lower score", f"{(margins < 0).mean():.1%}"]
        )
        shown.append(("score difference", "score of chosen − score of rejected", {"": margins}))
    if (store.weights != 1).any():
        figures.append(["sum of the weights of all pairs", f"{store.weights.sum():,.6g}"])
        figures.append(["pairs of weight 0", f"{(store.weights == 0).mean():.1%}"])
        shown.append(("weight", "weight of a pair in the loss", {"": store.weights}))
    histograms = [_histogram(title, x_title, values) for title, x_title, values in shown]
    return {"name": name, "num_pairs": len(store), "figures": figures, "histograms": histograms}


def _histogram(title: str, x_title: str, values: dict[str, np.ndarray]) -> Panel:
    """The distributions of some values, by their names, over each other, with their means."""
    means = [f"{of_one.mean():.3g}" for of_one in values.values()]
    if len(values) > 1:
        means = [f"{mean} {name}" for mean, name in zip(means, values, strict=True)]
    x_title = f"{x_title}; mean {', '.join(means)}"
    return histogram(title, "pairs", x_title, dict(enumerate(values.values())), list(values))
