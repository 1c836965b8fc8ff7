"""Completions of prompts by a model, each with random numbers of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from tbpo_cli.config.recipe import Sample
from tbpo_cli.data.prompts import Prompt
from tbpo_cli.data.templates import Chat
from tbpo_cli.model.load import Policy
from tbpo_cli.model.sharding import LanguageModel


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
    entropy: float


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
    device, width = next(model.parameters()).device, max(map(len, prompts))
    input_ids = torch.tensor(
        [[stop_ids[0]] * (width - len(ids)) + [*ids] for ids in prompts], device=device
    )
    mask = torch.tensor(
        [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device
    )
    draw = _Draw(settings, seeds)
    model.eval()
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
    )
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
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
        completions.append(
            Completion(tuple(generated[row, :count].tolist()), logp, reason, entropy)
        )
    return completions


def samples_of(
    policy: Policy,
    view: str,
    chat: Chat,
    keys: Sequence[tuple[Prompt, int]],
    settings: Sample,
    seed: int,
) -> Iterator[list[dict[str, Any]]]:
    """Yields samples, a batch at a time; each depends on its prompt, its number and the seed alone.

    Args:
        view: the model of the policy that answers.
        keys: prompts, and the numbers of their samples.
        seed: of the run.
    """
    prompts = [prompt.token_ids for prompt, _ in keys]
    seeds = [seed_of(seed, prompt.prompt_id, number) for prompt, number in keys]
    with policy.view(view) as model:
        for batch in completions(model, prompts, seeds, settings, chat.end_ids):
            yield [
                {
                    "prompt_id": keys[place][0].prompt_id,
                    "sample": keys[place][1],
                    "completion": chat.tokenizer.decode(
                        list(completion.token_ids), skip_special_tokens=True
                    ),
                    **asdict(completion),
                }
                for place, completion in batch
            ]


def completions(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: Sample,
    stop_ids: Sequence[int],
) -> Iterator[list[tuple[int, Completion]]]:
    """Yields (place, completion) of prompts, a batch of prompts of like length at a time."""
    places = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for start in range(0, len(places), settings.batch_size):
        batch = places[start : start + settings.batch_size]
        asked, drawn = [prompts[place] for place in batch], [seeds[place] for place in batch]
        yield list(zip(batch, generate(model, asked, drawn, settings, stop_ids), strict=True))


def seed_of(seed: int, prompt_id: str, number: int) -> int:
    """The seed of the n-th sample of a prompt in a run."""
    return (
        int.from_bytes(hashlib.sha256(f"{seed} {prompt_id} {number}".encode()).digest()[:8], "big")
        >> 1
    )


class _Draw(LogitsProcessor):
    """Draws each row's next token with the row's own random numbers, and leaves only that one possible."""

    def __init__(self, settings: Sample, seeds: Sequence[int]) -> None:
        self.logps: list[Tensor] = []  # (B,) a step
        self.entropies: list[Tensor] = []
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._warpers: Any = None  # greedy
        if settings.temperature > 0:
            self._warpers = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
            self._warpers += [TopPLogitsWarper(settings.top_p)] * (settings.top_p < 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logps = scores.float().log_softmax(dim=-1)
        if self._warpers is None:
            chosen = logps.argmax(dim=-1)
        else:
            cumulated = self._warpers(input_ids, logps).softmax(dim=-1).cumsum(dim=-1)
            uniform = torch.cat(
                [torch.rand(1, generator=generator) for generator in self._generators]
            )
            reached = cumulated <= (uniform.to(scores.device) * cumulated[:, -1])[:, None]
            chosen = reached.sum(dim=-1).clamp(max=scores.shape[-1] - 1)
        chosen = chosen[:, None]
        self.logps.append(logps.gather(1, chosen)[:, 0])
        self.entropies.append(
            -torch.linalg.vecdot(logps.exp(), logps.clamp(min=torch.finfo(logps.dtype).min))
        )
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
