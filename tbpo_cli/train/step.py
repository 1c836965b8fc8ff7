"""One optimizer step, and one evaluation, of a training."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tbpo_cli import console
from tbpo_cli.batch.batches import collate_all, step_indices
from tbpo_cli.batch.layouts import PairBatch, blank_batch
from tbpo_cli.batch.reference import ReferenceCache
from tbpo_cli.core.types import LossOutput, PairScores
from tbpo_cli.data.store import pair_writer, record_batch
from tbpo_cli.errors import DivergenceError
from tbpo_cli.model.load import REFERENCE
from tbpo_cli.model.scoring import Scorer
from tbpo_cli.model.sharding import gathered
from tbpo_cli.runs.files import write_sealed
from tbpo_cli.train.checkpoint import Trainee, kept_checkpoints
from tbpo_cli.train.feed import Ahead, TokenBudget
from tbpo_cli.train.metrics import Totals, average, measure, pair_weights
from tbpo_cli.train.optim import learning_rate

if TYPE_CHECKING:
    from tbpo_cli.train.loop import TrainingRun


@dataclass
class Stepper:
    """Computes the steps of a training; which pairs a step reads, and how, is a function of its number."""

    run: TrainingRun  # what is trained, on which pairs, with which settings
    scorer: Scorer
    trainees: dict[
        str, Trainee
    ]  # what the steps change: "policy", and "baseline" if the loss has one
    layout: str  # of the rows, a name in LAYOUTS
    budget: TokenBudget
    cache: ReferenceCache | None  # of log π_ref, if it is worth one
    ahead: Ahead = field(init=False)
    found: dict[tuple[int, ...], Tensor] = field(
        default_factory=dict
    )  # in a step: log π_ref of pairs, for the cache

    def __post_init__(self) -> None:
        self.ahead = Ahead(self._collate)

    def step(self, number: int) -> dict[str, float]:
        """An optimizer step (from 0); returns its metrics, or raises DivergenceError before anything has changed."""
        started, run = time.monotonic(), self.run
        totals = self.budget.attempt(lambda tokens: self._accumulate(number, tokens))
        policy = self.trainees["policy"]
        for trainee in self.trainees.values():
            run.group.sum_gradients(trainee.parameters.values())
        norm = gathered(
            torch.nn.utils.clip_grad_norm_(policy.parameters.values(), run.settings.max_grad_norm)
        )
        values = average(
            [*totals, {"grad_norm": (norm, 1)}], run.group
        )  # the one moment when the device is waited for
        if not np.isfinite([values["grad_norm"], values["loss"]]).all():
            raise self._diverged(number)
        if self.cache is not None:
            for indices, logps in self.found.items():
                self.cache.write(indices, logps)
        rate = learning_rate(run.settings, number, run.num_steps)
        for group in policy.optimizer.param_groups:
            group["lr"] = rate
        for trainee in self.trainees.values():
            trainee.optimizer.step()
            trainee.optimizer.zero_grad(set_to_none=True)
        seconds, pairs, tokens = (
            time.monotonic() - started,
            run.settings.batch_size,
            int(values.pop("num_tokens")),
        )
        values |= {
            "learning_rate": rate,
            "pairs": pairs,
            "tokens": tokens,
            "pairs_per_s": pairs / seconds,
        }
        values |= {"tokens_per_s": tokens / seconds, "seconds": seconds}
        return values | {"peak_memory_gb": peak_memory_gb(run.group.device)}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """All metrics on the held-out pairs."""
        run = self.run
        run.policy.model.eval()
        span = "chosen" if run.loss.span == "chosen" else "response"
        pairs = run.group.share(range(len(run.evaluation)))

        def measure_all(tokens: int) -> list[Totals]:
            totals, done = [], 0
            with console.progress("evaluating", len(pairs), every=max(1, len(pairs))) as update:
                for batch in self._matched(
                    collate_all(run.evaluation, pairs, tokens, span, self.layout)
                ):
                    scores = self.scorer.score(
                        batch.to(run.group.device), run.loss.needs, diagnostics=True
                    )
                    totals.append(measure(scores, run.loss(scores), run.loss))
                    done += len(batch.pair_ids)
                    update(done, "")
            return totals

        return average(self.budget.attempt(measure_all), run.group)

    def _is_full(self, number: int) -> bool:
        """Whether a step reports all metrics: it then reads whole responses, and needs the reference itself."""
        return (number + 1) % self.run.settings.log_every == 0

    def _pairs(self, number: int) -> list[int]:
        """The pairs of a step, by their places in the store."""
        return step_indices(
            len(self.run.train), self.run.settings.batch_size, self.run.seed, number
        )

    def _collate(self, number: int, tokens: int) -> list[PairBatch]:
        """This process's micro-batches of a step, a function of the arguments and the seed."""
        run = self.run
        indices = run.group.share(self._pairs(number))
        span = run.loss.span
        if self._is_full(number) and span != "chosen":
            span = "response"
        return list(collate_all(run.train, indices, tokens, span, self.layout))

    def _matched(self, batches: Iterable[PairBatch]) -> Iterable[PairBatch]:
        """This process's micro-batches; of sharded weights then blank ones, until all processes have equally many."""
        if not self.run.policy.is_sharded:
            return batches
        batches = list(batches)
        missing = max(self.run.group.gather(len(batches))) - len(batches)
        return [*batches, *[blank_batch()] * missing]

    def _accumulate(self, number: int, tokens: int) -> list[Totals]:
        """A whole step's gradients, one micro-batch after the other; those of an earlier attempt are dropped."""
        self._drop_gradients()
        self.found.clear()
        totals = []
        for part, batch in enumerate(self._matched(self.ahead.batches(number, tokens))):
            scores, output = self._backward(number, part, batch)
            totals.append(
                measure(scores, output, self.run.loss) | {"num_tokens": (batch.num_tokens, 1)}
            )
        return totals

    def _drop_gradients(self) -> None:
        for trainee in self.trainees.values():
            trainee.optimizer.zero_grad(set_to_none=True)

    def _backward(self, number: int, part: int, batch: PairBatch) -> tuple[PairScores, LossOutput]:
        """Adds the gradients of one micro-batch to those that are there."""
        run, full = self.run, self._is_full(number)
        run.policy.model.train()
        random = np.random.SeedSequence((run.seed, number, part * run.group.size + run.group.rank))
        torch.manual_seed(int(random.generate_state(1)[0]))
        batch = batch.to(run.group.device)
        reference = None if self.cache is None or full else self._reference_logps(self.cache, batch)
        scores = self.scorer.score(batch, run.loss.needs, full, reference)
        output = run.loss(scores)
        total = run.settings.batch_size
        if run.loss.mean_over == "chosen_tokens":
            total = int(run.train.chosen_lengths[self._pairs(number)].sum())
        (output.per_pair * pair_weights(scores, run.loss)).sum().div(total).backward()
        return scores, output

    def _reference_logps(self, cache: ReferenceCache, batch: PairBatch) -> Tensor:
        """log π_ref of a batch's tokens, (N,): what the cache knows, and for the rest what the reference says now."""
        known = cache.read(batch.indices)
        reference, is_new = (
            known.to(self.run.group.device, non_blocking=True),
            bool(known.isnan().any()),
        )
        if any(self.run.group.gather(is_new)) if self.run.policy.is_sharded else is_new:
            reference = torch.where(
                reference.isnan(), self.scorer.view_logps(REFERENCE, batch), reference
            )
            self.found[batch.indices] = reference
        return reference

    def _diverged(self, number: int) -> DivergenceError:
        """The error that names the first micro-batch whose gradient is not finite by itself, if there is one."""
        run = self.run
        known = next(
            (found for found in run.group.gather(self._find_diverged(number)) if found), None
        )
        indices = known["indices"] if known else self._pairs(number)
        pairs = [run.train[index] for index in indices]
        folder = run.folder / "diverged"
        if run.group.is_main:
            with pair_writer(folder) as writer:
                writer.write_batch(record_batch(pairs))
            write_sealed(
                folder / "diverged.json", {"step": number + 1, "seed": run.seed, **(known or {})}
            )
        last = ["the start", *kept_checkpoints(run.folder / "checkpoints").values()][-1]
        what = (
            f"the losses of the micro-batch are {known['losses']}"
            if known
            else "only their sum is not finite"
        )
        where = f"step {number + 1}, pairs {', '.join(pair.pair_id for pair in pairs)}; {what}"
        expected = f"finite numbers; nothing was written over, and the last good state is {last}"
        fix = f"lower the learning rate, or look at those pairs alone: {folder}"
        return DivergenceError(
            "training diverged: the loss or its gradient is not finite", where, expected, fix
        )

    def _find_diverged(self, number: int) -> dict[str, Any] | None:
        rank, found, batches = self.run.group.rank, None, self._collate(number, self.budget.tokens)
        # Gradients of sharded weights are sums over the processes: only one of them at a time has pairs then.
        for turn in range(self.run.group.size) if self.run.policy.is_sharded else [rank]:
            for part, batch in enumerate(self._matched(batches if turn == rank else [])):
                self._drop_gradients()
                _, output = self._backward(number, part, batch)
                norms = [each.gradient_norm() for each in self.trainees.values()]
                is_finite = all(
                    bool(tensor.isfinite().all()) for tensor in (output.per_pair, *norms)
                )
                if turn == rank and found is None and not is_finite:
                    losses = [f"{loss:.4g}" for loss in output.per_pair.tolist()]
                    found = {
                        "micro_batch": part,
                        "rank": rank,
                        "indices": batch.indices,
                        "losses": losses,
                    }
        return found


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that the process held so far: on a GPU its allocator's, elsewhere the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
