"""Prepared pairs for a person: tokens with their loss mask at a terminal, and prepare's report.html."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from tbpo_cli import console
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.tokens import TokenizedPair, load_tokenizer
from tbpo_cli.recipe import Recipe
from tbpo_cli.report import histogram, write_page
from tbpo_cli.svg import Panel

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
    """The tokens of prompt, chosen and rejected."""
    controls = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    anchor = int(pair.prompt_ids[0])  # a decoder may treat the first token of a text in its own way
    before = len(tokenizer.decode([anchor]))
    aligned = pair.aligned_length if len(pair.rejected_ids) else len(pair.chosen_ids)

    def shown(ids: Any, name: str) -> list[ShownToken]:
        texts = tokenizer.batch_decode([[anchor, int(i)] for i in ids]) if len(ids) else []
        parts = ("prompt" if name == "prompt" else "aligned" if t < aligned else "tail" for t in range(len(ids)))
        return [
            ShownToken(int(i), text[before:], part, int(i) in controls)
            for i, text, part in zip(ids, texts, parts, strict=True)
        ]

    return {name: shown(getattr(pair, f"{name}_ids"), name) for name in ("prompt", "chosen", "rejected")}


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
            _example(stores["train"][index], tokenizer) for index in range(min(NUM_EXAMPLES, len(stores["train"])))
        ],
        chat_template=tokenizer.chat_template,
    )


def _describe(name: str, store: PairStore) -> dict[str, Any]:
    """Figures and histograms of a split."""
    lengths = {"prompt": store.prompt_lengths, "chosen": store.chosen_lengths, "rejected": store.rejected_lengths}
    figures = []
    if store.has_rejected:
        lengths["aligned"] = np.minimum(store.chosen_lengths, store.rejected_lengths)
        responses = int(store.chosen_lengths.sum() + store.rejected_lengths.sum())
        figures = [
            ["response tokens beyond the aligned length", f"{1 - 2 * int(lengths['aligned'].sum()) / responses:.1%}"],
            ["pairs whose chosen response is longer", f"{(store.chosen_lengths > store.rejected_lengths).mean():.1%}"],
            ["mean of chosen − rejected tokens", f"{(store.chosen_lengths - store.rejected_lengths).mean():+.1f}"],
        ]
    else:
        del lengths["rejected"]
    histograms = [_histogram(part, f"{part}, tokens", values) for part, values in lengths.items()]
    if len(margins := store.score_margins):
        figures.append(["pairs whose chosen response has the lower score", f"{(margins < 0).mean():.1%}"])
        histograms.append(_histogram("score difference", "score of chosen − score of rejected", margins))
    return {"name": name, "num_pairs": len(store), "figures": figures, "histograms": histograms}


def _histogram(title: str, what: str, values: np.ndarray) -> Panel:
    return histogram(title, "pairs", f"{what}; mean {values.mean():.3g}", {0: values})


def _example(pair: TokenizedPair, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    parts = {name: tokens for name, tokens in shown_parts(pair, tokenizer).items() if tokens}
    return {
        "pair_id": pair.pair_id,
        "summary": ", ".join(f"{name} {len(tokens)} tokens" for name, tokens in parts.items()),
        "parts": [{"name": name, "tokens": tokens} for name, tokens in parts.items()],
    }
