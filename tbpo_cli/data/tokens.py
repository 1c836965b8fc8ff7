"""Messages → token ids that training and inference both see: prompt and responses, each tokenized
on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tbpo_cli.config.recipe import Data
from tbpo_cli.data import limits
from tbpo_cli.data.pairs import Messages, PreferencePair, RejectedRow, Tools
from tbpo_cli.data.sources import Row
from tbpo_cli.data.templates import Chat, render_pair
from tbpo_cli.errors import TbpoError

PAIRS_AT_A_TIME = 16  # that are rendered within one limit of memory


@dataclass(frozen=True)
class TokenizedPair:
    """One comparison as token ids.

    Args:
        pair_id: that of the PreferencePair.
        prompt_ids: at least one id.
        chosen_ids: at least one id, the last is the end of the turn (unless the response was
            truncated).
        rejected_ids: likewise; empty for a demonstration.
        weight: that of the PreferencePair.
        score_margin, reversed_id, prompt_hash: those of the PreferencePair.
        is_cut: whether a response was truncated. These four are used when a store is made; a pair
            that is read from the store has their defaults.
    """

    pair_id: str
    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    weight: float = 1.0
    score_margin: float | None = None
    reversed_id: str = ""
    prompt_hash: str = ""
    is_cut: bool = False

    def __post_init__(self) -> None:
        if not len(self.prompt_ids) or not len(self.chosen_ids):
            raise ValueError(f"pair {self.pair_id} has an empty prompt or chosen response")

    @property
    def aligned_length(self) -> int:
        """T = min(|y^w|, |y^l|), tokens."""
        return min(len(self.chosen_ids), len(self.rejected_ids))


Result = TokenizedPair | RejectedRow
Rendered = tuple[PreferencePair, str, str, str] | RejectedRow


def render_pairs(
    pairs: Sequence[PreferencePair], chat: Chat, rows: Sequence[Row] = ()
) -> list[Rendered]:
    """Each pair with the texts that `render_pair` makes of it; or why it makes none.

    Args:
        rows: of each pair, its row, which errors name.

    Raises:
        TbpoError: if the chat template does not allow the cut between prompt and response, or does
            not end.
    """
    rendered: list[Rendered] = []
    for start in range(0, len(pairs), PAIRS_AT_A_TIME):
        with limits.at_most(limits.MAX_SECONDS, limits.MAX_BYTES):
            for place, pair in enumerate(pairs[start : start + PAIRS_AT_A_TIME], start):
                try:
                    rendered.append((pair, *render_pair(pair, chat)))
                except RejectedRow as reason:
                    rendered.append(reason)
                except TbpoError as error:
                    raise (rows[place].named(error) if rows else error) from None
    return rendered


def encode_pairs(rendered: Sequence[Rendered], chat: Chat, data: Data) -> list[Result]:
    """What `render_pairs` has made, as tokens; the reason in place of a pair that is too long."""
    texts = [one for one in rendered if not isinstance(one, RejectedRow)]
    prompts = [prompt for _, prompt, *_ in texts]
    prompt_ids = chat.encoder.encode(prompts)
    chosen_ids = chat.encoder.encode_after(prompts, [chosen for *_, chosen, _ in texts])
    rejected_ids = chat.encoder.encode_after(prompts, [text for *_, text in texts])
    ids = zip(prompt_ids, chosen_ids, rejected_ids, strict=True)
    return [
        one if isinstance(one, RejectedRow) else _fit(one[0], *next(ids), data) for one in rendered
    ]


def tokenize_prompt(messages: Messages, tools: Tools, chat: Chat) -> list[int]:
    """The ids of a prompt with the generation prompt, as in every pair.

    Raises:
        RejectedRow: if the chat template refuses it, or leaves out a part of it.
    """
    return chat.encoder.encode([chat.prompt(messages, tools)])[0]


def _fit(
    pair: PreferencePair, prompt: list[int], chosen: list[int], rejected: list[int], data: Data
) -> Result:
    """The pair within `data.max_length` tokens: if longer, as `data.overlong` says."""
    longest = len(prompt) + max(len(chosen), len(rejected))
    tokens_left = data.max_length - len(prompt)
    is_cut = longest > data.max_length
    if is_cut and (data.overlong == "drop" or tokens_left < 1):
        return RejectedRow("overlong", f"{longest} tokens, max_length is {data.max_length}")
    if is_cut:
        chosen = chosen[:tokens_left]
        rejected = rejected[:tokens_left]
    if chosen == rejected:
        return RejectedRow("identical", "chosen and rejected are the same tokens")
    about = (pair.weight, pair.score_margin, pair.reversed_id, pair.prompt_hash, is_cut)
    return TokenizedPair(pair.pair_id, prompt, chosen, rejected, *about)
