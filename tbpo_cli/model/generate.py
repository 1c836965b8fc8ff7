"""Completions of prompts by a model, each with random numbers of its own."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from tbpo_cli.config.recipe import Sample
from tbpo_cli.data.prompts import Prompt
from tbpo_cli.data.templates import Chat
from tbpo_cli.model.out_of_memory import with_less_at_once
from tbpo_cli.model.policy import Policy
from tbpo_cli.model.probes import check_positions, positions_change, reads_padding
from tbpo_cli.model.sharding import LanguageModel
from tbpo_cli.model.together import ALONE, Together
from tbpo_cli.model.trials import mixes_sequences, reads_its_cache_otherwise, without_settings


@dataclass(frozen=True)
class Completion:
    """What a model said.

    Args:
        token_ids: with the end of the turn, if it came to that.
        logp: log-probability of the tokens under the model, at temperature 1, nats.
        finish_reason: "stop" at the end of the turn, "length" after max_new_tokens.
        entropy: nats, mean over the tokens of the entropy of the whole distribution that they were
            drawn from, at temperature 1 and before top_p.
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
    use_cache: bool = True,
    together: Together = ALONE,
) -> list[Completion]:
    """One completion a prompt, in one batch, padded on the left.

    Where several processes make the passes together, all of them go on until the last has ended.

    Args:
        prompts: B lists of token ids, none empty.
        seeds: B numbers; a completion depends on its own seed, not on what else is in the batch.
        settings: temperature (0: greedy), top_p and max_new_tokens.
        stop_ids: tokens that end a completion.
        use_cache: whether keys and values of earlier tokens are kept, or all computed each time.
        together: the processes that make the passes.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    padding = [width - len(ids) for ids in prompts]
    rows = [[stop_ids[0]] * left + [*ids] for ids, left in zip(prompts, padding, strict=True)]
    mask = [[0] * left + [1] * (width - left) for left in padding]
    draw = _Draw(settings, seeds)
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        pad_token_id=stop_ids[0],
        use_cache=use_cache,
    )
    with without_settings(model) as causal:
        generated = causal.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([_AllStopped(stop_ids, together)]),
        )
    generated = generated[:, width:].cpu()
    logps, entropies = (torch.stack(steps, dim=1).cpu() for steps in (draw.logps, draw.entropies))
    stopped = torch.isin(generated, torch.tensor(stop_ids))
    completions = []
    for row, ends in enumerate(stopped):
        count = int(ends.int().argmax()) + 1 if ends.any() else generated.shape[1]
        reason = "stop" if ends.any() else "length"
        logp = float(logps[row, :count].sum())
        entropy = float(entropies[row, :count].mean())
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
    known: Collection[int] = (),
    together: Together = ALONE,
) -> Iterator[list[dict[str, Any]]]:
    """Yields samples, a batch at a time; each depends on its prompt, its number and the seed alone.

    Args:
        view: the model of the policy that answers.
        keys: prompts, and the numbers of their samples.
        seed: of the run.
        known: places of keys whose samples are there. A batch of such keys alone is left out.
        together: the processes that make the passes; all of them ask for samples of the same view.
    """
    prompts = [prompt.token_ids for prompt, _ in keys]
    seeds = [seed_of(seed, prompt.prompt_id, number) for prompt, number in keys]
    with policy.view(view) as model:
        for batch in completions(model, prompts, seeds, settings, chat.end_ids, known, together):
            yield [
                {
                    "prompt_id": keys[place][0].prompt_id,
                    "sample": keys[place][1],
                    "completion": chat.encoder.decode(completion.token_ids),
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
    known: Collection[int] = (),
    together: Together = ALONE,
) -> Iterator[list[tuple[int, Completion]]]:
    """Yields (place, completion) of prompts, a batch of prompts of like length at a time.

    A batch in which all places are `known` is left out. Where memory runs out, half as many prompts
    go through at once from there on; a completion depends on its own prompt and seed alone.

    Processes that make the passes together have equally many batches: where one has no more
    prompts, it generates from a blank one.

    A model that reads the padding on the left gets prompts of one length at a time, without any;
    one that mixes the sequences of a batch as it generates (RWKV) gets one prompt at a time. A
    model whose cache changes its logits (BLT) generates without, and so does one whose earlier
    tokens get other positions on the way (dynamic rope past its length).

    Raises:
        TbpoError: if a prompt and its completion need more positions than the model has, or more
            memory than there is.
    """
    places = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    longest = max(together.gather(max(map(len, prompts), default=0)))
    if not longest:
        return
    check_positions(
        [model],
        longest + settings.max_new_tokens,
        f"a prompt of {longest:,} tokens, and {settings.max_new_tokens:,} new ones",
        "a smaller sample.max_new_tokens; for the diversity: eval.diversity_prompts = 0",
    )
    same_length = reads_padding(model) is not None
    use_cache = not reads_its_cache_otherwise(model)
    mixes = settings.batch_size > 1 and mixes_sequences(model, use_cache)
    size = 1 if mixes else together.batch_size(settings.batch_size)
    batches = _batches(places, prompts, size, same_length)
    left = (batch for batch in batches if not all(place in known for place in batch))
    for batch in together.equally_many(left, []):
        done = 0
        while done < max(1, len(batch)):
            rest = batch[done:]

            def answered(count: int, rest: Sequence[int] = rest) -> list[Completion]:
                asked = [prompts[place] for place in rest[:count]] or [stop_ids[:1]]  # a blank one
                drawn = [seeds[place] for place in rest[:count]] or [0]
                return _answers(model, asked, drawn, settings, stop_ids, use_cache, together)

            wanted = min(size, max(1, len(rest)))
            answers, fitting = with_less_at_once(answered, wanted, "sampling", together)
            if fitting < wanted:
                size = fitting  # also of the batches that follow
            if rest:
                yield list(zip(rest, answers, strict=False))
            done += fitting


def _answers(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: Sample,
    stop_ids: Sequence[int],
    use_cache: bool,
    together: Together,
) -> list[Completion]:
    """As `generate`; without a cache where earlier tokens get other positions on the way."""
    start, end = len(prompts[0]), len(prompts[-1]) + settings.max_new_tokens - 1
    if not together.any(positions_change(model, start, end)):
        return generate(model, prompts, seeds, settings, stop_ids, use_cache, together)
    with _own_frequencies(model):
        return generate(model, prompts, seeds, settings, stop_ids, False, together)


@contextlib.contextmanager
def _own_frequencies(model: LanguageModel) -> Iterator[None]:
    """Rotary frequencies of no longer sequence than those within the context, nor after it.

    With rope_type "dynamic", transformers keeps the frequencies of the longest sequence so far
    until it reads one that is shorter than the length that the model was trained with.
    """
    shortest = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    with without_settings(model) as causal, torch.no_grad():
        causal(input_ids=shortest, use_cache=False)
        yield
        causal(input_ids=shortest, use_cache=False)


def _batches(
    places: Sequence[int], prompts: Sequence[Sequence[int]], size: int, same_length: bool
) -> Iterator[Sequence[int]]:
    """At most `size` places at a time, in their order; with `same_length`, of prompts of one."""
    groups = [list(places)]
    if same_length:
        by_length = itertools.groupby(places, key=lambda place: len(prompts[place]))
        groups = [list(group) for _, group in by_length]
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]


def seed_of(seed: int, prompt_id: str, number: int) -> int:
    """The seed of the n-th sample of a prompt in a run."""
    return (
        int.from_bytes(hashlib.sha256(f"{seed} {prompt_id} {number}".encode()).digest()[:8], "big")
        >> 1
    )


class _AllStopped(StoppingCriteria):
    """Ends a batch when all rows of all processes have ended.

    A row that has ended goes on until then; what it says after its end is cut off.
    """

    def __init__(self, stop_ids: Sequence[int], together: Together) -> None:
        self._stop_ids = stop_ids
        self._together = together
        self._stopped: Tensor | None = None  # (B,) of the rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        last = input_ids[:, -1]
        stops = torch.isin(last, torch.tensor(self._stop_ids, device=last.device))
        self._stopped = stops if self._stopped is None else self._stopped | stops
        is_over = not self._together.any(not bool(self._stopped.all()))
        return torch.full_like(stops, is_over)


class _Draw(LogitsProcessor):
    """Draws each row's next token by the row's own random numbers; no other stays possible."""

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
