"""One optimizer step, and one evaluation, of a training."""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbpo_cli import console
from tbpo_cli.batch.batches import collate_all, deal, span_lengths, step_indices
from tbpo_cli.batch.layouts import PairBatch, blank_batch
from tbpo_cli.batch.reference import ReferenceCache
from tbpo_cli.core.types import LossOutput, PairScores, aligned_scores
from tbpo_cli.data.store import PairStore, pair_writer, record_batch
from tbpo_cli.errors import DivergenceError
from tbpo_cli.model.dropout import TokenKeys
from tbpo_cli.model.fused import cast_once
from tbpo_cli.model.policy import REFERENCE
from tbpo_cli.model.scoring import Scorer
from tbpo_cli.model.sharding import gathered
from tbpo_cli.model.together import equally_many
from tbpo_cli.runs.files import write_sealed
from tbpo_cli.train.checkpoint import TrainState, kept_checkpoints
from tbpo_cli.train.checkpoint_writer import CheckpointWriter
from tbpo_cli.train.feed import Prefetcher, TokenBudget
from tbpo_cli.train.metrics import Totals, average, measure, pair_weights
from tbpo_cli.train.optim import learning_rate
from tbpo_cli.train.run import TrainingRun


@dataclass
class Stepper:
    """Computes the steps of a training. Which pairs a step reads is a function of its number.

    Args:
        run: what is trained, on which pairs, with which settings.
        scorer: of the policy, for the statistics that the loss needs.
        states: what a step changes: "policy", and "baseline" if the loss has one.
        layout: of the model's rows, a name in LAYOUTS.
        budget: tokens of a micro-batch.
        cache: of log π_ref; None if it is computed in every step.
        token_keys: what the policy's dropout is drawn from; None without dropout.
        prefetcher: collates the micro-batches of the next step.
        checkpoints: writes the states while the next steps are computed.
        new_reference_logps: of the current step, by the pairs' places: what the cache did not have.
    """

    run: TrainingRun
    scorer: Scorer
    states: dict[str, TrainState]
    layout: str
    budget: TokenBudget
    cache: ReferenceCache | None
    token_keys: TokenKeys | None
    prefetcher: Prefetcher = field(init=False)
    checkpoints: CheckpointWriter = field(init=False)
    new_reference_logps: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        run = self.run
        self.prefetcher = Prefetcher(self.collate)
        self.checkpoints = CheckpointWriter(run.folder / "checkpoints", self.states, run.group)

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step.

        1. Add up the gradients of all micro-batches; again with smaller ones if memory runs out.
        2. Sum them over the processes, and clip those of the policy.
        3. Read the metrics: the one moment in which the host waits for the device.
        4. Keep the log π_ref that were new.
        5. Set the learning rate and update the weights.

        Args:
            number: of the step, from 0.

        Returns:
            The step's metrics, as in metrics.jsonl.

        Raises:
            DivergenceError: if loss or gradient is not finite; no weight has changed then.
        """
        started = time.monotonic()
        run = self.run
        policy = self.states["policy"]

        totals = self.budget.attempt(functools.partial(self._accumulate, number))

        for state in self.states.values():
            add_up = functools.partial(run.group.sum_gradients, state.parameters.values())
            self.budget.once_more(add_up, "the sum of the gradients over the processes")
        norm = self._clip(policy)

        metrics = average([*totals, {"grad_norm": (gathered(norm), 1)}], run.group)
        metrics.setdefault("loss", 0.0)  # there is no mean over pairs that all weigh 0
        if not np.isfinite([metrics["grad_norm"], metrics["loss"]]).all():
            raise self._divergence(number)

        if self.cache is not None:
            for indices, logps in self.new_reference_logps.items():
                self.cache.write(indices, logps)

        rate = learning_rate(run.settings, number, run.num_steps)
        for group in policy.optimizer.param_groups:
            group["lr"] = rate
        for state in self.states.values():
            changes = [*state.tensors.values()]
            self.budget.once_more(state.optimizer.step, "the optimizer's step", changes)
            state.optimizer.zero_grad(set_to_none=True)

        seconds = time.monotonic() - started
        num_tokens = int(metrics.pop("num_tokens"))
        return metrics | {
            "learning_rate": rate,
            "pairs": run.settings.batch_size,
            "tokens": num_tokens,
            "pairs_per_s": run.settings.batch_size / seconds,
            "tokens_per_s": num_tokens / seconds,
            "seconds": seconds,
            "peak_memory_gb": peak_memory_gb(run.group.device),
        }

    def _clip(self, state: TrainState) -> Tensor:
        """Clips the gradients; returns their norm. That of sharded ones is an exchange."""
        parameters = state.parameters.values()
        clip = functools.partial(
            torch.nn.utils.clip_grad_norm_, parameters, self.run.settings.max_grad_norm
        )
        gradients = [each.grad for each in parameters if each.grad is not None]
        changes = None if state.is_sharded else gradients
        return self.budget.once_more(clip, "the clipping of the gradients", changes)

    def _accumulate(self, number: int, max_tokens: int) -> list[Totals]:
        """The gradients of a step's micro-batches, in place of those of an earlier attempt."""
        self._drop_gradients()
        self.new_reference_logps.clear()
        totals = []
        policy = self.run.policy
        batches = self._equally_many(self.prefetcher.batches(number, max_tokens))
        with cast_once(() if policy.is_sharded else policy.fused):
            for part, batch in enumerate(batches):
                scores, output = self._backward(number, part, batch)
                if self.run.loss.span == "aligned_and_chosen" and not self._reports_all(number):
                    scores = aligned_scores(scores)  # both sides' metrics are of the same positions
                totals.append(measure(scores, output, self.run.loss))
                totals[-1]["num_tokens"] = (batch.num_tokens, 1)
        return totals

    def _backward(self, number: int, part: int, batch: PairBatch) -> tuple[PairScores, LossOutput]:
        """Adds the gradients of one micro-batch to those of the others.

        The scalar is the weighted sum of the losses of its pairs over the weight of the whole step.
        """
        run = self.run
        reports_all = self._reports_all(number)
        run.policy.train()
        random = np.random.SeedSequence((run.seed, number, part * run.group.size + run.group.rank))
        torch.manual_seed(int(random.generate_state(1)[0]))
        is_incomplete = False
        if self.cache is not None and not reports_all:
            batch = replace(batch, reference_logps=self.cache.read(batch.indices))
            is_incomplete = self._is_incomplete(batch)
        batch = batch.to(run.group.device)
        if self.token_keys is not None:
            self.token_keys.set(batch.token_keys, run.seed, number)
        if reports_all:
            scores = self.scorer.score_and_measure(batch, run.loss.needs)
        else:
            logps = self._all_reference_logps(batch) if is_incomplete else batch.reference_logps
            scores = self.scorer.score(batch, run.loss.needs, logps)
        output = run.loss(scores)
        losses = output.per_pair * pair_weights(scores, run.loss)
        losses.sum().div(self._total_weight(number)).backward()
        return scores, output

    def _total_weight(self, number: int) -> float:
        """What the summed loss of a step is divided by, over all processes.

        The weights of its pairs, times their numbers of chosen tokens if the loss is a mean over
        them. Of a step whose pairs all weigh 0, so that the sum is 0 as well: 1.
        """
        pairs = self._pairs(number)
        weights = self.run.train.weights[pairs]
        if self.run.loss.mean_over == "chosen_tokens":
            weights = weights * self.run.train.chosen_lengths[pairs]
        return float(weights.sum()) or 1.0

    def _is_incomplete(self, batch: PairBatch) -> bool:
        """Whether log π_ref of a batch has to be computed; it is still on the host."""
        assert batch.reference_logps is not None
        own = bool(batch.reference_logps.isnan().any())
        if self.run.policy.is_sharded:  # a pass of the reference is made by all processes together
            return any(self.run.group.gather(own))
        return own

    def _all_reference_logps(self, batch: PairBatch) -> Tensor:
        """log π_ref of a batch's tokens, (N,): where it is not known, from the reference."""
        known = batch.reference_logps
        assert known is not None
        logps = torch.where(known.isnan(), self.scorer.view_logps(REFERENCE, batch), known)
        self.new_reference_logps[batch.indices] = logps
        return logps

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[int]) -> dict[str, float]:
        """All metrics on some of the held-out pairs, by their places in the store."""
        self.run.policy.model.eval()
        measure_pairs = functools.partial(self._measure_held_out, pairs)
        metrics = average(self.budget.attempt(measure_pairs), self.run.group)
        return metrics | {"pairs": len(pairs)}

    def _measure_held_out(self, all_pairs: Sequence[int], max_tokens: int) -> list[Totals]:
        run = self.run
        span = "chosen" if run.loss.span == "chosen" else "response"
        pairs = self._own_pairs(run.evaluation, all_pairs, span)
        batches = collate_all(run.evaluation, pairs, max_tokens, span, self.layout)
        totals = []
        num_done = 0
        with console.progress("evaluating", len(pairs), every=max(1, len(pairs))) as update:
            for batch in self._equally_many(batches):
                on_device = batch.to(run.group.device)
                scores = self.scorer.score_and_measure(on_device, run.loss.needs)
                totals.append(measure(scores, run.loss(scores), run.loss))
                num_done += len(batch.pair_ids)
                update(num_done, "")
        return totals

    def collate(self, number: int, max_tokens: int) -> list[PairBatch]:
        """This process's micro-batches of a step: a function of the arguments and the seed."""
        run = self.run
        span = run.loss.span
        if span != "chosen" and self._reports_all(number):
            span = "response"
        indices = self._own_pairs(run.train, self._pairs(number), span)
        with_keys = self.token_keys is not None
        return list(collate_all(run.train, indices, max_tokens, span, self.layout, with_keys))

    def _own_pairs(self, store: PairStore, pairs: Sequence[int], span: str) -> list[int]:
        """This process's part of some pairs: all processes have about as many tokens."""
        group = self.run.group
        num_tokens = span_lengths(store, pairs, span).sum(axis=1)
        return [pairs[number] for number in deal(num_tokens, group.size)[group.rank]]

    def _reports_all(self, number: int) -> bool:
        """Whether a step reports all metrics, which are of whole responses and of the reference."""
        return (number + 1) % self.run.settings.log_every == 0

    def _pairs(self, number: int) -> list[int]:
        """The pairs of a step, by their places in the store."""
        run = self.run
        return step_indices(len(run.train), run.settings.batch_size, run.seed, number)

    def _equally_many(self, batches: Iterable[PairBatch]) -> Iterable[PairBatch]:
        """The batches; with sharded weights blank ones follow, until all processes have as many.

        Each pass over sharded weights is made by all processes together.
        """
        if not self.run.policy.is_sharded:
            return batches
        return equally_many(batches, blank_batch(), self.run.group.gather)

    def _drop_gradients(self) -> None:
        for state in self.states.values():
            state.optimizer.zero_grad(set_to_none=True)

    def _divergence(self, number: int) -> DivergenceError:
        """The error; it names the first micro-batch whose own gradient is not finite."""
        run = self.run
        self.checkpoints.finish()
        every = run.group.gather(self._find_diverged(number))
        known = next((found for found in every if found), None)
        pairs = [run.train[index] for index in (known["indices"] if known else self._pairs(number))]
        folder = run.folder / "diverged"
        if run.group.is_main:
            with pair_writer(folder) as writer:
                writer.write_batch(record_batch(pairs))
            about = {"step": number + 1, "seed": run.seed, **(known or {})}
            write_sealed(folder / "diverged.json", about)
        names = ", ".join(pair.pair_id for pair in pairs)
        losses = "only their sum is not finite"
        if known:
            losses = f"the losses of the micro-batch are {known['losses']}"
        last = ["the start", *kept_checkpoints(run.folder / "checkpoints").values()][-1]
        return DivergenceError(
            "training diverged: the loss or its gradient is not finite",
            f"step {number + 1}, pairs {names}; {losses}",
            f"finite numbers; no weight was overwritten, and the last good state is {last}",
            f"lower the learning rate, or look at those pairs alone: {folder}",
        )

    def _find_diverged(self, number: int) -> dict[str, Any] | None:
        """This process's first micro-batch whose loss or gradient is not finite by itself.

        Gradients of sharded weights are sums over the processes: there one process at a time has
        pairs, and the others take part with blank batches.
        """
        rank = self.run.group.rank
        own = self.collate(number, self.budget.tokens)
        found: dict[str, Any] | None = None
        for turn in range(self.run.group.size) if self.run.policy.is_sharded else [rank]:
            for part, batch in enumerate(self._equally_many(own if turn == rank else [])):
                self._drop_gradients()
                _, output = self._backward(number, part, batch)
                norms = [state.gradient_norm() for state in self.states.values()]
                numbers = [output.per_pair, *norms]
                is_finite = all(bool(tensor.isfinite().all()) for tensor in numbers)
                if turn == rank and found is None and not is_finite:
                    found = {
                        "micro_batch": part,
                        "rank": rank,
                        "indices": batch.indices,
                        "losses": [f"{loss:.4g}" for loss in output.per_pair.tolist()],
                    }
        return found


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that the process has held: the allocator's on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
