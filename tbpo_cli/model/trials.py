"""How a model generates, as far as samples depend on it: tried before any is drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tbpo_cli.model.probes import differ, probe_ids
from tbpo_cli.model.sharding import LanguageModel, causal_model

PROMPT_TOKENS, NEW_TOKENS = 6, 3  # of the sequences that are tried before any is generated


@contextlib.contextmanager
def without_settings(model: LanguageModel) -> Iterator[LanguageModel]:
    """The transformers model, in evaluation mode, without a generation config of its own.

    transformers takes from that whatever the config of a call leaves open: penalties, top_k, beams.
    """
    causal = causal_model(model)
    own = causal.generation_config
    causal.eval()
    causal.generation_config = GenerationConfig()
    try:
        yield causal
    finally:
        causal.generation_config = own


def reads_its_cache_otherwise(model: LanguageModel) -> bool:
    """Whether a sequence gets other logits with the cache of `generate` than in a single pass."""
    ids = probe_ids(model, PROMPT_TOKENS + NEW_TOKENS)
    device = next(model.parameters()).device
    with without_settings(model) as causal, torch.no_grad():
        inputs = torch.tensor([ids[:-1]], device=device)
        straight = causal(input_ids=inputs, use_cache=False).logits[:, PROMPT_TOKENS - 1 :]
    return differ(_generated_logits(model, [ids], True), straight.float(), causal.dtype)


def mixes_sequences(model: LanguageModel, use_cache: bool) -> bool:
    """Whether sequences of one length get other logits in a batch than each alone."""
    length = PROMPT_TOKENS + NEW_TOKENS
    rows = [probe_ids(model, length, start) for start in (0, length)]
    together, *alone = (_generated_logits(model, some, use_cache) for some in (rows, *zip(rows)))
    return differ(together, torch.cat(alone), causal_model(model).dtype)


def _generated_logits(
    model: LanguageModel, rows: Sequence[Sequence[int]], use_cache: bool
) -> Tensor:
    """(B, n, V): logits as `generate` computes them while it says the last n tokens of the rows."""
    ids = torch.tensor(rows, device=next(model.parameters()).device)
    prompts = ids[:, :PROMPT_TOKENS]
    say = _Say(ids)
    with without_settings(model) as causal, torch.no_grad():
        causal.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=GenerationConfig(
                max_new_tokens=ids.shape[1] - PROMPT_TOKENS,
                do_sample=False,
                pad_token_id=0,
                use_cache=use_cache,
            ),
            logits_processor=LogitsProcessorList([say]),
        )
    return torch.stack(say.logits, dim=1)


class _Say(LogitsProcessor):
    """Makes `generate` say given tokens, and notes the logits.

    Args:
        ids: (B, L), of which the prompts are the beginning.
    """

    def __init__(self, ids: Tensor) -> None:
        self.logits: list[Tensor] = []  # (B, V) a step
        self._ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores)
        said = self._ids[:, input_ids.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter_(1, said, 0.0)
