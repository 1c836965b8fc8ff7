"""The training loop, for sft and align."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tbpo_cli import console
from tbpo_cli.core.baseline import StateBaseline
from tbpo_cli.core.losses import Loss
from tbpo_cli.data.batches import collate_padded, micro_batches, num_steps, step_indices
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.tokens import TokenizedPair
from tbpo_cli.errors import DivergenceError, Interrupted
from tbpo_cli.model.load import Policy
from tbpo_cli.model.scoring import Scorer
from tbpo_cli.recipe import Align, Sft
from tbpo_cli.train.checkpoint import Trainee, load_newest_checkpoint, save_checkpoint
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
        log = MetricsLog(self.folder / "metrics.jsonl", step)
        every = self.settings.log_every
        with _signals() as stop, console.progress(self.folder.name, self.num_steps, step, every) as update:
            while True:
                if self._evaluation_is_due(step) and log.evaluation(step) is None:
                    log.append("eval", step, self._evaluate(scorer))
                if step == self.num_steps:
                    return log
                values = self._step(scorer, trainees, step)
                step += 1
                log.append("train", step, values)
                update(step, f"loss {values['loss']:.4f}  {values['pairs_per_s']:.1f} pairs/s")
                if step % self.settings.checkpoint_every == 0 or step == self.num_steps or stop:
                    save_checkpoint(checkpoints, step, trainees, self.settings.keep_checkpoints)
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

    def _step(self, scorer: Scorer, trainees: dict[str, Trainee], step: int) -> dict[str, float]:
        """One optimizer step; returns its metrics. Every `log_every` steps it reads whole responses and reports all."""
        started = time.monotonic()
        full = (step + 1) % self.settings.log_every == 0
        indices = step_indices(len(self.train), self.settings.batch_size, self.seed, step)
        span = "response" if full and self.loss.span == "aligned" else self.loss.span
        batches = micro_batches(self.train, indices, self.settings.max_tokens_per_device, span)
        normaliser = len(indices)
        if self.loss.mean_over == "chosen_tokens":
            normaliser = int(self.train.chosen_lengths[indices].sum())
        scorer.policy.model.train()
        totals, num_tokens = [], 0
        for number, pairs in enumerate(batches):
            torch.manual_seed(int(np.random.SeedSequence((self.seed, step, number)).generate_state(1)[0]))
            totals.append(self._backward(scorer, pairs, normaliser, full))
            num_tokens += sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
        policy = trainees["policy"]
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters.values(), self.settings.max_grad_norm).item()
        if not np.isfinite(norm):
            raise self._diverged(step, "the gradient is not finite", batches)
        rate = learning_rate(self.settings, step, self.num_steps)
        for group in policy.optimizer.param_groups:
            group["lr"] = rate
        for trainee in trainees.values():
            trainee.optimizer.step()
            trainee.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        return {
            **average(totals),
            "learning_rate": rate,
            "grad_norm": norm,
            "response_tokens": num_tokens,
            "pairs_per_s": len(indices) / seconds,
            "seconds": seconds,
        }

    def _backward(self, scorer: Scorer, pairs: list[TokenizedPair], normaliser: int, full: bool) -> Totals:
        batch = collate_padded(pairs).to(self.device)
        scores = scorer.score(batch, self.loss.needs, diagnostics=full)
        output = self.loss(scores)
        weights = scores.chosen.mask.sum(dim=1) if self.loss.mean_over == "chosen_tokens" else 1
        (output.per_pair * weights).sum().div(normaliser).backward()
        return measure(scores, output, self.loss)

    @torch.no_grad()
    def _evaluate(self, scorer: Scorer) -> dict[str, float]:
        """All metrics on the held-out pairs."""
        self.policy.model.eval()
        span = "chosen" if self.loss.span == "chosen" else "response"
        batches = micro_batches(self.evaluation, range(len(self.evaluation)), self.settings.max_tokens_per_device, span)
        totals = []
        with console.progress("evaluating", len(batches), every=len(batches)) as update:
            for number, pairs in enumerate(batches, 1):
                scores = scorer.score(collate_padded(pairs).to(self.device), self.loss.needs, diagnostics=True)
                totals.append(measure(scores, self.loss(scores), self.loss))
                update(number, "")
        return average(totals)

    def _diverged(self, step: int, what: str, batches: list[list[TokenizedPair]]) -> DivergenceError:
        ids = ", ".join(pair.pair_id for batch in batches for pair in batch)
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
