"""The training loop, for sft and align."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from tbpo_cli import console
from tbpo_cli.charts import curves
from tbpo_cli.core.baseline import StateBaseline
from tbpo_cli.core.losses import Loss
from tbpo_cli.data.batches import longest_sequence, num_steps, span_lengths
from tbpo_cli.data.reference import ReferenceCache
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import Interrupted, TbpoError
from tbpo_cli.model.attention import choose_layout
from tbpo_cli.model.load import Policy
from tbpo_cli.model.scoring import Scorer, from_reference_logps
from tbpo_cli.recipe import Align, Sft
from tbpo_cli.report import write_page
from tbpo_cli.train.checkpoint import Trainee, load_newest_checkpoint, save_checkpoint
from tbpo_cli.train.feed import TokenBudget, keep_freed_memory
from tbpo_cli.train.group import ONE, Group
from tbpo_cli.train.memory import kept_bytes, tokens_that_fit
from tbpo_cli.train.metrics import MetricsLog
from tbpo_cli.train.optim import build_baseline_optimizer, build_optimizer
from tbpo_cli.train.step import Stepper
from tbpo_cli.train.trackers import Tell

SHOWN = (  # beside the bar, as far as it is known: every step, or since the last one that reported all
    ("loss", "loss {:.4f}"),
    ("accuracy", "accuracy {:.0%}"),
    ("kl", "KL {:.4f}"),
    ("tokens_per_s", "{:,.0f} tokens/s"),
)


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
        reference: the file for log π_ref of the training pairs, named by what it depends on; used by losses that read
            nothing else of the reference, if pairs are visited more than once.
        group: the processes that train together; they all run this, with the same arguments.
        tell: is told ("train" or "eval", step, metrics) as they are written.
        mesh: over which the weights are shared out; None: every process has all of them.
    """

    policy: Policy
    loss: Loss
    settings: Sft | Align
    train: PairStore
    evaluation: PairStore
    folder: Path
    seed: int
    device: torch.device
    reference: Path | None = None
    group: Group = ONE
    tell: Tell = lambda split, step, values: None
    mesh: DeviceMesh | None = None

    @property
    def num_steps(self) -> int:
        return num_steps(len(self.train), self.settings.batch_size, self.settings.epochs, self.settings.max_steps)

    def run(self) -> MetricsLog:
        """Trains to the last step, from the newest checkpoint if there is one.

        Raises:
            DivergenceError: on a gradient that is not finite, before the optimizer step.
            Interrupted: on SIGINT or SIGTERM, after a checkpoint.
        """
        stepper, checkpoints = self._build(), self.folder / "checkpoints"
        step, skipped = load_newest_checkpoint(checkpoints, stepper.trainees)
        for line in skipped:
            console.say(line)
        if step:
            console.say(f"going on from step {step}")
        log = MetricsLog(self.folder / "metrics.jsonl", step, self.group.is_main)
        latest: dict[str, float] = {}
        if len(set(self.group.gather(step))) > 1:  # and nobody writes to the log before all have read it
            raise TbpoError(
                "the processes do not see the same checkpoints",
                str(checkpoints),
                "a run directory on a file system that all machines share",
                "give such a one with --run-dir",
            )
        progress = console.progress(self.folder.name, self.num_steps, step, self.settings.log_every)
        with closing(stepper.ahead), _signals() as stop, progress as update:
            while True:
                # What the first process has read of its log decides for all.
                if self._evaluation_is_due(step) and self.group.gather(log.evaluation(step) is None)[0]:
                    self._note(log, "eval", step, stepper.evaluate())
                    self._draw(log)
                if step == self.num_steps:
                    self._draw(log)
                    return log
                values = stepper.step(step)
                step += 1
                self._note(log, "train", step, values)
                latest |= values
                update(step, "  ".join(form.format(latest[name]) for name, form in SHOWN if name in latest))
                stops = [number for number in self.group.gather(stop[0] if stop else None) if number is not None]
                due = step % self.settings.checkpoint_every == 0 or step == self.num_steps or stops
                if due:
                    states = {name: each.state(self.group.is_main) for name, each in stepper.trainees.items()}
                    if self.group.is_main:
                        save_checkpoint(checkpoints, step, states)
                    del states
                if stops:
                    raise Interrupted(
                        stops[0], f"a checkpoint of step {step} is kept", "the same command goes on from there"
                    )

    def _build(self) -> Stepper:
        """The parts of the training, in their state before the first step."""
        settings, model = self.settings, self.policy.model
        if self.device.type == "cpu":
            keep_freed_memory()
        layout = self._choose_layout()  # some models fail at the trial: not in the middle of a pass of many processes
        kept, _ = kept_bytes(model, settings.activation_checkpointing)
        if self.mesh is not None:
            self.policy.share_out(self.mesh)
        baseline = self._build_baseline()
        trainees = {"policy": Trainee(self.policy.trained, build_optimizer(settings, self.policy.trained.values()))}
        if baseline is not None:
            parameters = dict(baseline.named_parameters())
            trainees["baseline"] = Trainee(parameters, build_baseline_optimizer(parameters.values()))
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        fit = tokens_that_fit(kept, self.device)
        sharded_in = self.folder if self.policy.is_sharded else None
        budget = TokenBudget(settings.max_tokens_per_device, fit, self.group, sharded_in)
        scorer = Scorer.of(self.policy, baseline)
        return Stepper(self, scorer, trainees, layout, budget, self._open_cache())

    def _build_baseline(self) -> StateBaseline | None:
        if "state_baseline" not in self.loss.needs:
            return None
        hidden_size = self.policy.model.get_output_embeddings().weight.shape[1]
        return StateBaseline(hidden_size, self.seed).to(self.device)

    def _open_cache(self) -> ReferenceCache | None:
        again = self.num_steps * self.settings.batch_size > len(self.train)
        if self.reference is None or not again or not from_reference_logps(self.loss.needs):
            return None
        lengths = span_lengths(self.train, range(len(self.train)), self.loss.span)
        if self.group.is_main:
            ReferenceCache(self.reference, lengths)
        self.group.gather(None)  # the file is made by one process; each then writes what it finds out of its own pairs
        return ReferenceCache(self.reference, lengths)

    def _choose_layout(self) -> str:
        models = [self.policy.model, *self.policy.frozen.values()]
        layout, reason = choose_layout(models, self.settings.layout, longest_sequence((self.train, self.evaluation)))
        console.say(f"rows are {layout}: {reason}")
        return layout

    def _evaluation_is_due(self, step: int) -> bool:
        return len(self.evaluation) > 0 and (step % self.settings.eval_every == 0 or step == self.num_steps)

    def _draw(self, log: MetricsLog) -> None:
        if self.group.is_main:
            write_page(self.folder / "curves.svg", "curves.svg", panels=curves(log.lines))

    def _note(self, log: MetricsLog, split: str, step: int, values: dict[str, float]) -> None:
        log.append(split, step, values)
        self.tell(split, step, values)


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
