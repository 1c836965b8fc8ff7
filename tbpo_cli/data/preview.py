"""Prepared pairs for a person: tokens with their loss mask at a terminal, and prepare's report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from tbpo_cli import console
from tbpo_cli.charts import Panel, histogram
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.tokens import TokenizedPair, load_tokenizer
from tbpo_cli.recipe import Recipe
from tbpo_cli.report import write_page

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUM_EXAMPLES = 10
STYLES = {"prompt": "dim", "aligned": "green", "tail": "yellow"}


@dataclass(frozen=True)
class ShownToken:
    """A token as text, and its `part`: prompt, aligned (t < T, read by every loss) or tail (t ≥ T)."""

    token_id: int
    text: str
    part: str
    control: bool


def shown_parts(pair: TokenizedPair, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[ShownToken]]:
    """The tokens of prompt, chosen and, unless it is a demonstration, rejected."""
    controls = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    anchor = int(pair.prompt_ids[0])  # a decoder may treat the first token of a text in its own way
    before = len(tokenizer.decode([anchor]))
    aligned = pair.aligned_length or len(pair.chosen_ids)

    def shown(ids: Sequence[int], in_prompt: bool = False) -> list[ShownToken]:
        texts = tokenizer.batch_decode([[anchor, int(i)] for i in ids])
        parts = ("prompt" if in_prompt else "aligned" if t < aligned else "tail" for t in range(len(ids)))
        return [
            ShownToken(int(i), text[before:], part, int(i) in controls)
            for i, text, part in zip(ids, texts, parts, strict=True)
        ]

    parts = {"prompt": shown(pair.prompt_ids, in_prompt=True), "chosen": shown(pair.chosen_ids)}
    return parts | ({"rejected": shown(pair.rejected_ids)} if len(pair.rejected_ids) else {})


def show_pairs(store: PairStore, tokenizer: PreTrainedTokenizerFast, num_pairs: int, with_ids: bool) -> None:
    """Prints the first pairs of a split, token by token, to stdout."""
    console.out.print(
        Text.assemble(
            "│ ends a token, ‖ the aligned part. ",
            ("The prompt is never in the loss; ", STYLES["prompt"]),
            ("aligned tokens are read by every loss; ", STYLES["aligned"]),
            ("a tail by those of whole responses.", STYLES["tail"]),
        )
    )
    for index in range(min(num_pairs, len(store))):
        pair = store[index]
        console.out.print(f"\n[bold]pair {pair.pair_id}[/bold]")
        for name, tokens in shown_parts(pair, tokenizer).items():
            console.out.print(f"[bold]{name}[/bold], {len(tokens)} tokens", highlight=False)
            console.out.print(_line(tokens, with_ids))


def _line(tokens: list[ShownToken], with_ids: bool) -> Text:
    line = Text()
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        line.append(token.text.replace("\n", "⏎\n"), f"{STYLES[token.part]}{' bold' if token.control else ''}")
        line.append(f"⟨{token.token_id}⟩" if with_ids else "", "dim")
        line.append("‖" if token.part == "aligned" and following and following.part == "tail" else "│", "dim")
    return line


def write_report(recipe: Recipe, folder: Path, counts: list[dict[str, Any]]) -> None:
    """Writes report.html of prepared splits.

    Args:
        folder: prepare's folder, with the splits.
        counts: what became of the rows, one entry a source, as in the manifest.
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
        reasons=[[reason, c["source"], f"{n:,}"] for c in counts for reason, n in sorted(c["rejected"].items())],
        notes=[[note, c["source"], f"{n:,}"] for c in counts for note, n in c["noted"].items() if n],
        splits=[_describe(name, store) for name, store in stores.items() if len(store)],
        examples=[
            (train[index].pair_id, shown_parts(train[index], tokenizer))
            for index in range(min(NUM_EXAMPLES, len(train)))
        ],
        chat_template=tokenizer.chat_template,
    )


def _describe(name: str, store: PairStore) -> dict[str, Any]:
    """Figures and histograms of a split."""
    prompt, chosen, rejected = store.prompt_lengths, store.chosen_lengths, store.rejected_lengths
    lengths, figures = {"prompt": prompt, "chosen": chosen}, []
    if store.has_rejected:
        aligned = np.minimum(chosen, rejected)
        lengths |= {"rejected": rejected, "aligned": aligned}
        figures = [
            [
                "response tokens beyond the aligned length",
                f"{1 - 2 * aligned.sum() / (chosen.sum() + rejected.sum()):.1%}",
            ],
            ["pairs whose chosen response is longer", f"{(chosen > rejected).mean():.1%}"],
            ["mean of chosen − rejected tokens", f"{(chosen - rejected).mean():+.1f}"],
        ]
    histograms = [_histogram(part, f"{part}, tokens", values) for part, values in lengths.items()]
    if len(margins := store.score_margins):
        figures.append(["pairs whose chosen response has the lower score", f"{(margins < 0).mean():.1%}"])
        histograms.append(_histogram("score difference", "score of chosen − score of rejected", margins))
    return {"name": name, "num_pairs": len(store), "figures": figures, "histograms": histograms}


def _histogram(title: str, what: str, values: np.ndarray) -> Panel:
    return histogram(title, "pairs", f"{what}; mean {values.mean():.3g}", {0: values})
