"""Completions of prompts by a model, each with random numbers of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from tbpo_cli.model.sharding import LanguageModel
from tbpo_cli.recipe import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Completion:
    """What a model said.

    Args:
        token_ids: with the end of the turn, if it came to that.
        logp: log-probability of the tokens under the model, at temperature 1, nats.
        finish_reason: "stop" at the end of the turn, "length" after max_new_tokens.
        entropy: mean over the tokens of the entropy of the whole distribution they were drawn from, at temperature 1
            and before top_p, nats.
    """

    token_ids: tuple[int, ...]
    logp: float
    finish_reason: str
    entropy: float | None = None


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: Sample,
    stop_ids: Sequence[int],
) -> list[Completion]:
    """One completion a prompt, in one batch, padded on the left.

    Args:
        prompts: B lists of token ids, none empty.
        seeds: B numbers; a completion depends on its own seed, not on what else is in the batch.
        settings: temperature (0: greedy), top_p and max_new_tokens.
        stop_ids: tokens that end a completion.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), stop_ids[0])
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.as_tensor(ids)
        mask[row, width - len(ids) :] = 1
    draw = _Draw(settings, seeds)
    model.eval()
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=False, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0]
    )
    generated = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        logits_processor=LogitsProcessorList([draw]),
    )[:, width:].cpu()
    logps, entropies = (torch.stack(steps, dim=1).cpu() for steps in (draw.logps, draw.entropies))
    stopped = torch.isin(generated, torch.tensor(stop_ids))
    completions = []
    for row, ends in enumerate(stopped):
        count = int(ends.int().argmax()) + 1 if ends.any() else generated.shape[1]
        reason = "stop" if ends.any() else "length"
        logp, entropy = float(logps[row, :count].sum()), float(entropies[row, :count].mean())
        completions.append(Completion(tuple(generated[row, :count].tolist()), logp, reason, entropy))
    return completions


def complete(
    model: LanguageModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], settings: Sample, seed: int
) -> list[str]:
    """One completion a prompt, as text without the end of the turn.

    Args:
        prompts: texts of one user turn each, rendered with the tokenizer's chat template.
        seed: decides the draws, together with the place of a prompt.
    """
    turns = [[{"role": "user", "content": text}] for text in prompts]
    rendered: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    ids = rendered["input_ids"]
    seeds = [seed * 2**32 + number for number in range(len(ids))]
    completions = []
    for start in range(0, len(ids), settings.batch_size):
        part = slice(start, start + settings.batch_size)
        completions += generate(model, ids[part], seeds[part], settings, [tokenizer.eos_token_id])
    return tokenizer.batch_decode([list(completion.token_ids) for completion in completions], skip_special_tokens=True)


def seed_of(seed: int, prompt_id: str, number: int) -> int:
    """The seed of the n-th sample of a prompt in a run."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt_id} {number}".encode()).digest()[:8], "big") >> 1


class _Draw(LogitsProcessor):
    """Draws each row's next token with the row's own random numbers, and leaves only that one possible."""

    def __init__(self, settings: Sample, seeds: Sequence[int]) -> None:
        self.logps: list[Tensor] = []  # (B,) a step
        self.entropies: list[Tensor] = []
        self._greedy = settings.temperature == 0
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._warpers: list[LogitsProcessor] = []
        if not self._greedy and settings.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(settings.temperature))
        if not self._greedy and settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logps = scores.float().log_softmax(dim=-1)
        if self._greedy:
            chosen = logps.argmax(dim=-1)
        else:
            warped = logps
            for warper in self._warpers:
                warped = warper(input_ids, warped)
            cumulated = warped.softmax(dim=-1).cumsum(dim=-1)
            uniform = torch.cat([torch.rand(1, generator=generator) for generator in self._generators])
            reached = cumulated <= (uniform.to(scores.device) * cumulated[:, -1])[:, None]
            chosen = reached.sum(dim=-1).clamp(max=scores.shape[-1] - 1)
        chosen = chosen[:, None]
        self.logps.append(logps.gather(1, chosen)[:, 0])
        self.entropies.append(-torch.linalg.vecdot(logps.exp(), logps.clamp(min=torch.finfo(logps.dtype).min)))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
