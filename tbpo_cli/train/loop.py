"""The training loop, for sft and align."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tbpo_cli import console
from tbpo_cli.core.baseline import StateBaseline
from tbpo_cli.core.losses import Loss
from tbpo_cli.data.batches import PairBatch, collate_all, num_steps, span_lengths, step_indices
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import DivergenceError, Interrupted
from tbpo_cli.model.attention import choose_layout
from tbpo_cli.model.load import Policy
from tbpo_cli.model.scoring import Scorer
from tbpo_cli.recipe import Align, Sft
from tbpo_cli.train.checkpoint import Trainee, load_newest_checkpoint, save_checkpoint
from tbpo_cli.train.feed import Ahead, TokenBudget
from tbpo_cli.train.metrics import MetricsLog, Totals, average, measure
from tbpo_cli.train.optim import build_baseline_optimizer, build_optimizer, learning_rate


@dataclass(frozen=True)
class TrainingRun:
    """One training, from its settings to the files it writes. Nothing in it changes while it trains but the weights.

    Args:
        policy: in its starting state.
        loss: what is minimised.
        settings: [sft] or [align].
        train, evaluation: the pairs; `evaluation` may be empty.
        folder: the stage's folder, for metrics.jsonl and checkpoints/.
        seed: with the step it decides the order of pairs and every random number.
        device: where the model is.
    """

    policy: Policy
    loss: Loss
    settings: Sft | Align
    train: PairStore
    evaluation: PairStore
    folder: Path
    seed: int
    device: torch.device

    @property
    def num_steps(self) -> int:
        return num_steps(len(self.train), self.settings.batch_size, self.settings.epochs, self.settings.max_steps)

    def run(self) -> MetricsLog:
        """Trains to the last step, from the newest checkpoint if there is one.

        Raises:
            DivergenceError: on a loss or gradient that is not finite, before the optimizer step.
            Interrupted: on SIGINT or SIGTERM, after a checkpoint.
        """
        baseline = self._build_baseline()
        scorer = Scorer.of(self.policy, baseline)
        trainees = {
            "policy": Trainee(self.policy.trained, build_optimizer(self.settings, self.policy.trained.values()))
        }
        if baseline is not None:
            parameters = dict(baseline.named_parameters())
            trainees["baseline"] = Trainee(parameters, build_baseline_optimizer(parameters.values()))
        if self.settings.activation_checkpointing:
            self.policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        checkpoints = self.folder / "checkpoints"
        step, skipped = load_newest_checkpoint(checkpoints, trainees)
        for line in skipped:
            console.say(line)
        if step:
            console.say(f"going on from step {step}")
        layout = self._choose_layout()
        budget = TokenBudget(
            self.settings.max_tokens_per_device, self.policy.model, self.settings.activation_checkpointing
        )
        log = MetricsLog(self.folder / "metrics.jsonl", step)
        every = self.settings.log_every
        with (
            closing(Ahead(lambda step, tokens: self._collate_step(step, tokens, layout))) as ahead,
            _signals() as stop,
            console.progress(self.folder.name, self.num_steps, step, every) as update,
        ):
            while True:
                if self._evaluation_is_due(step) and log.evaluation(step) is None:
                    log.append("eval", step, self._evaluate(scorer, budget, layout))
                if step == self.num_steps:
                    return log
                values = self._step(scorer, trainees, step, budget, ahead)
                step += 1
                log.append("train", step, values)
                update(step, f"loss {values['loss']:.4f}  {values['pairs_per_s']:.1f} pairs/s")
                if step % self.settings.checkpoint_every == 0 or step == self.num_steps or stop:
                    save_checkpoint(checkpoints, step, trainees)
                if stop:
                    raise Interrupted(
                        stop[0], f"a checkpoint of step {step} is kept", "the same command goes on from there"
                    )

    def _build_baseline(self) -> StateBaseline | None:
        if "state_baseline" not in self.loss.needs:
            return None
        hidden_size = self.policy.model.get_output_embeddings().weight.shape[1]
        return StateBaseline(hidden_size, self.seed).to(self.device)

    def _evaluation_is_due(self, step: int) -> bool:
        return len(self.evaluation) > 0 and (step % self.settings.eval_every == 0 or step == self.num_steps)

    def _choose_layout(self) -> str:
        models = [self.policy.model, *self.policy.frozen.values()]
        lengths = [span_lengths(store, range(len(store)), "response") for store in (self.train, self.evaluation)]
        longest = max(int((each[:, 0] + each[:, 1:].max(axis=1)).max()) for each in lengths if len(each))
        layout, reason = choose_layout(models, self.settings.layout, longest)
        console.say(f"rows are {layout}: {reason}")
        return layout

    def _is_full(self, step: int) -> bool:
        """Whether a step reports all metrics: it then reads whole responses."""
        return (step + 1) % self.settings.log_every == 0

    def _collate_step(self, step: int, tokens: int, layout: str) -> list[PairBatch]:
        """The micro-batches of a step (from 0), a function of the arguments and the seed."""
        indices = step_indices(len(self.train), self.settings.batch_size, self.seed, step)
        span = "response" if self._is_full(step) and self.loss.span == "aligned" else self.loss.span
        return list(collate_all(self.train, indices, tokens, span, layout))

    def _step(
        self, scorer: Scorer, trainees: dict[str, Trainee], step: int, budget: TokenBudget, ahead: Ahead
    ) -> dict[str, float]:
        """One optimizer step; returns its metrics."""
        started = time.monotonic()
        batches, totals = budget.attempt(
            lambda tokens: self._accumulate(scorer, trainees, step, ahead.batches(step, tokens))
        )
        policy = trainees["policy"]
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters.values(), self.settings.max_grad_norm)
        values = average([*totals, {"grad_norm": (norm, 1)}])  # the one moment when the device is waited for
        if not np.isfinite(values["grad_norm"]):
            raise self._diverged(step, "the gradient is not finite", batches)
        rate = learning_rate(self.settings, step, self.num_steps)
        for group in policy.optimizer.param_groups:
            group["lr"] = rate
        for trainee in trainees.values():
            trainee.optimizer.step()
            trainee.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        return {
            **values,
            "learning_rate": rate,
            "response_tokens": sum(len(batch.tokens) for batch in batches),
            "pairs_per_s": self.settings.batch_size / seconds,
            "seconds": seconds,
        }

    def _accumulate(
        self, scorer: Scorer, trainees: dict[str, Trainee], step: int, batches: list[PairBatch]
    ) -> tuple[list[PairBatch], list[Totals]]:
        """A whole step's gradients, one micro-batch after the other; those of an earlier attempt are dropped."""
        for trainee in trainees.values():
            trainee.optimizer.zero_grad(set_to_none=True)
        scorer.policy.model.train()
        normaliser = self.settings.batch_size
        if self.loss.mean_over == "chosen_tokens":
            normaliser = sum(len(batch.chosen.slots) for batch in batches)
        totals = []
        for number, batch in enumerate(batches):
            torch.manual_seed(int(np.random.SeedSequence((self.seed, step, number)).generate_state(1)[0]))
            scores = scorer.score(batch.to(self.device), self.loss.needs, diagnostics=self._is_full(step))
            output = self.loss(scores)
            weights = scores.chosen.mask.sum(dim=1) if self.loss.mean_over == "chosen_tokens" else 1
            (output.per_pair * weights).sum().div(normaliser).backward()
            totals.append(measure(scores, output, self.loss))
        return batches, totals

    @torch.no_grad()
    def _evaluate(self, scorer: Scorer, budget: TokenBudget, layout: str) -> dict[str, float]:
        """All metrics on the held-out pairs."""
        self.policy.model.eval()
        span = "chosen" if self.loss.span == "chosen" else "response"

        def evaluate(tokens: int) -> dict[str, float]:
            totals, done = [], 0
            pairs = range(len(self.evaluation))
            with console.progress("evaluating", len(pairs), every=len(pairs)) as update:
                for batch in collate_all(self.evaluation, pairs, tokens, span, layout):
                    scores = scorer.score(batch.to(self.device), self.loss.needs, diagnostics=True)
                    totals.append(measure(scores, self.loss(scores), self.loss))
                    done += len(batch.pair_ids)
                    update(done, "")
            return average(totals)

        return budget.attempt(evaluate)

    def _diverged(self, step: int, what: str, batches: list[PairBatch]) -> DivergenceError:
        ids = ", ".join(pair_id for batch in batches for pair_id in batch.pair_ids)
        return DivergenceError(
            f"training diverged: {what}",
            f"step {step + 1}, pairs {ids}",
            "finite numbers; nothing was written over",
            "lower the learning rate, or look at those pairs; checkpoints/ holds the last good state",
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that a first SIGINT or SIGTERM puts its number into; a second one ends the process at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        console.say("stopping after this step …")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
