"""Prepared pairs in the terminal, token by token."""

from __future__ import annotations

from rich.text import Text

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.tokenizer import load_tokenizer
from tbpo_cli.report.preparation import ShownToken, shown_parts
from tbpo_cli.runs.run_dir import RunDir

KEY = {  # of the parts of a pair: style, meaning
    "prompt": ("dim", "The prompt is never in the loss;"),
    "aligned": ("green", "every loss reads the aligned tokens;"),
    "tail": ("yellow", "only losses of whole responses read the tail."),
}


def show_pairs(recipe: Recipe, run_dir: RunDir, num_pairs: int, with_ids: bool) -> None:
    """Prints the first training pairs of the complete stage to stdout as the model sees them, token
    by token.
    """
    store = PairStore(run_dir.stage("prepare") / "train")
    tokenizer = load_tokenizer(recipe.model)
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
