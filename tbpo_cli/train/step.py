"""One optimizer step, and one evaluation, of a training."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tbpo_cli import console
from tbpo_cli.data.batches import PairBatch, collate_all, step_indices
from tbpo_cli.data.reference import ReferenceCache
from tbpo_cli.errors import DivergenceError
from tbpo_cli.model.scoring import Scorer
from tbpo_cli.train.checkpoint import Trainee
from tbpo_cli.train.feed import Ahead, TokenBudget
from tbpo_cli.train.metrics import Totals, average, measure
from tbpo_cli.train.optim import learning_rate

if TYPE_CHECKING:
    from tbpo_cli.train.loop import TrainingRun

Found = tuple[tuple[int, ...], Tensor]  # pairs, by their places in the store, and log π_ref of their tokens


@dataclass
class Stepper:
    """Computes the steps of a training; which pairs a step reads, and how, is a function of its number.

    Args:
        run: what is trained, on which pairs, with which settings.
        trainees: what the steps change: "policy", and "baseline" if the loss has one.
        layout: of the rows, a name in LAYOUTS.
        cache: of log π_ref, if it is worth one.
    """

    run: TrainingRun
    scorer: Scorer
    trainees: dict[str, Trainee]
    layout: str
    budget: TokenBudget
    cache: ReferenceCache | None
    ahead: Ahead = field(init=False)

    def __post_init__(self) -> None:
        self.ahead = Ahead(self._collate)

    def step(self, number: int) -> dict[str, float]:
        """An optimizer step (from 0); returns its metrics.

        Raises:
            DivergenceError: on a gradient that is not finite, before anything changed.
        """
        started, run = time.monotonic(), self.run
        batches, totals, found = self.budget.attempt(
            lambda tokens: self._accumulate(number, self.ahead.batches(number, tokens))
        )
        policy = self.trainees["policy"]
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters.values(), run.settings.max_grad_norm)
        values = average([*totals, {"grad_norm": (norm, 1)}])  # the one moment when the device is waited for
        if not np.isfinite(values["grad_norm"]):
            raise self._diverged(number, "the gradient is not finite", batches)
        for indices, logps in found:
            self.cache.write(indices, logps)
        rate = learning_rate(run.settings, number, run.num_steps)
        for group in policy.optimizer.param_groups:
            group["lr"] = rate
        for trainee in self.trainees.values():
            trainee.optimizer.step()
            trainee.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        pairs, tokens = run.settings.batch_size, sum(batch.num_tokens for batch in batches)
        return {
            **values,
            "learning_rate": rate,
            "pairs": pairs,
            "tokens": tokens,
            "pairs_per_s": pairs / seconds,
            "tokens_per_s": tokens / seconds,
            "seconds": seconds,
            "peak_memory_gb": peak_memory_gb(run.device),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """All metrics on the held-out pairs."""
        run = self.run
        run.policy.model.eval()
        span = "chosen" if run.loss.span == "chosen" else "response"
        pairs = range(len(run.evaluation))

        def measure_all(tokens: int) -> dict[str, float]:
            totals, done = [], 0
            with console.progress("evaluating", len(pairs), every=len(pairs)) as update:
                for batch in collate_all(run.evaluation, pairs, tokens, span, self.layout):
                    scores = self.scorer.score(batch.to(run.device), run.loss.needs, diagnostics=True)
                    totals.append(measure(scores, run.loss(scores), run.loss))
                    done += len(batch.pair_ids)
                    update(done, "")
            return average(totals)

        return self.budget.attempt(measure_all)

    def _is_full(self, number: int) -> bool:
        """Whether a step reports all metrics: it then reads whole responses, and needs the reference itself."""
        return (number + 1) % self.run.settings.log_every == 0

    def _collate(self, number: int, tokens: int) -> list[PairBatch]:
        """The micro-batches of a step, a function of the arguments and the seed."""
        run = self.run
        indices = step_indices(len(run.train), run.settings.batch_size, run.seed, number)
        span = "response" if self._is_full(number) and run.loss.span == "aligned" else run.loss.span
        return list(collate_all(run.train, indices, tokens, span, self.layout))

    def _accumulate(self, number: int, batches: list[PairBatch]) -> tuple[list[PairBatch], list[Totals], list[Found]]:
        """A whole step's gradients, one micro-batch after the other; those of an earlier attempt are dropped."""
        run, full = self.run, self._is_full(number)
        for trainee in self.trainees.values():
            trainee.optimizer.zero_grad(set_to_none=True)
        run.policy.model.train()
        by_tokens = run.loss.mean_over == "chosen_tokens"
        normaliser = sum(len(b.chosen.slots) for b in batches) if by_tokens else run.settings.batch_size
        totals, found = [], []
        for part, batch in enumerate(batches):
            torch.manual_seed(int(np.random.SeedSequence((run.seed, number, part)).generate_state(1)[0]))
            batch, reference = batch.to(run.device), None
            if self.cache is not None and not full:
                reference, is_new = self._reference_logps(batch)
                found += [(batch.indices, reference)] if is_new else []
            scores = self.scorer.score(batch, run.loss.needs, full, reference)
            output = run.loss(scores)
            weights = scores.chosen.mask.sum(dim=1) if by_tokens else 1
            (output.per_pair * weights).sum().div(normaliser).backward()
            totals.append(measure(scores, output, run.loss))
        return batches, totals, found

    def _reference_logps(self, batch: PairBatch) -> tuple[Tensor, bool]:
        """log π_ref of a batch's tokens, (N,): what the cache knows, and for the rest what the reference says now."""
        known = self.cache.read(batch.indices)
        reference = known.to(self.run.device, non_blocking=True)
        if not known.isnan().any():
            return reference, False
        return torch.where(reference.isnan(), self.scorer.reference_logps(batch), reference), True

    def _diverged(self, number: int, what: str, batches: list[PairBatch]) -> DivergenceError:
        ids = ", ".join(pair_id for batch in batches for pair_id in batch.pair_ids)
        return DivergenceError(
            f"training diverged: {what}",
            f"step {number + 1}, pairs {ids}",
            "finite numbers; nothing was written over",
            "lower the learning rate, or look at those pairs; checkpoints/ holds the last good state",
        )


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that the process held so far: on a GPU its allocator's, elsewhere the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
