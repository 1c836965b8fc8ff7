"""The training loop, for sft and align."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

from tbpo_cli import console
from tbpo_cli.batch.batches import longest_sequence, num_steps, span_lengths
from tbpo_cli.batch.reference import ReferenceCache
from tbpo_cli.config.recipe import Align, Sft
from tbpo_cli.core.baseline import StateBaseline
from tbpo_cli.core.losses import Loss
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import Interrupted, TbpoError
from tbpo_cli.model.attention import choose_layout
from tbpo_cli.model.load import Policy
from tbpo_cli.model.scoring import Scorer, from_reference_logps
from tbpo_cli.report.charts import curves
from tbpo_cli.report.pages import write_page
from tbpo_cli.train.checkpoint import Trainee, load_newest_checkpoint, save_checkpoint
from tbpo_cli.train.feed import TokenBudget, keep_freed_memory
from tbpo_cli.train.group import ONE, Group
from tbpo_cli.train.memory import kept_bytes, tokens_that_fit
from tbpo_cli.train.metrics import MetricsLog
from tbpo_cli.train.optim import build_baseline_optimizer, build_optimizer
from tbpo_cli.train.step import Stepper

Tell = Callable[[str, int, dict[str, float]], None]
SHOWN = (  # beside the bar, as far as it is known: every step, or since the last one that reported all
    ("loss", "loss {:.4f}"),
    ("accuracy", "accuracy {:.0%}"),
    ("kl", "KL {:.4f}"),
    ("tokens_per_s", "{:,.0f} tokens/s"),
)


@dataclass(frozen=True)
class TrainingRun:
    """One training, from its settings to the files it writes. Nothing in it changes while it trains but the weights."""

    policy: Policy  # in its starting state
    loss: Loss
    settings: Sft | Align
    train: PairStore
    evaluation: PairStore  # may be empty
    folder: Path  # of the stage, for metrics.jsonl and checkpoints/
    seed: int  # with the step it decides the order of pairs and every random number
    reference: Path | None = (
        None  # a file for log π_ref of the training pairs, named by what it depends on
    )
    group: Group = ONE  # of processes that all run this, with the same arguments
    tell: Tell = lambda split, step, values: None
    mesh: DeviceMesh | None = (
        None  # over which the weights are shared out; None: every process has all of them
    )

    @property
    def num_steps(self) -> int:
        return num_steps(
            len(self.train), self.settings.batch_size, self.settings.epochs, self.settings.max_steps
        )

    def run(self) -> MetricsLog:
        """Trains to the last step, from the newest checkpoint if there is one.

        Raises DivergenceError on a gradient that is not finite, before the optimizer step, and Interrupted on SIGINT
        or SIGTERM, after a checkpoint.
        """
        stepper, checkpoints = self._build(), self.folder / "checkpoints"
        if step := load_newest_checkpoint(checkpoints, stepper.trainees):
            console.say(f"going on from step {step}")
        log = MetricsLog(self.folder / "metrics.jsonl", step, self.group.is_main)
        latest: dict[str, float] = {}
        if (
            len(set(self.group.gather(step))) > 1
        ):  # and nobody writes to the log before all have read it
            what, fix = (
                "the processes do not see the same checkpoints",
                "give such a one with --run-dir",
            )
            expected = "a run directory on a file system that all machines share"
            raise TbpoError(what, str(checkpoints), expected, fix)
        progress = console.progress(self.folder.name, self.num_steps, step, self.settings.log_every)
        with closing(stepper.ahead), _signals() as stop, progress as update:
            while True:
                if step % self.settings.eval_every == 0 or step == self.num_steps:
                    self._evaluate(step, stepper, log)
                if step == self.num_steps:
                    return log
                values = stepper.step(step)
                step += 1
                self._note(log, "train", step, values)
                latest |= values
                update(
                    step,
                    "  ".join(form.format(latest[name]) for name, form in SHOWN if name in latest),
                )
                stops = [
                    number
                    for number in self.group.gather(stop[0] if stop else None)
                    if number is not None
                ]
                if step % self.settings.checkpoint_every == 0 or step == self.num_steps or stops:
                    if stepper.cache is not None:
                        stepper.cache.sync()
                    save_checkpoint(checkpoints, step, stepper.trainees, self.group.is_main)
                if stops:
                    what = f"a checkpoint of step {step} is kept"
                    raise Interrupted(stops[0], what, "the same command goes on from there")

    def _build(self) -> Stepper:
        """The parts of the training, in their state before the first step."""
        settings, model = self.settings, self.policy.model
        if self.group.device.type == "cpu":
            keep_freed_memory()
        # Some models fail when the layout is tried: not in the middle of a pass of many processes.
        longest = longest_sequence((self.train, self.evaluation))
        layout, reason = choose_layout(
            [model, *self.policy.frozen.values()], settings.layout, longest
        )
        console.say(f"rows are {layout}: {reason}")
        kept, _ = kept_bytes(model, settings.activation_checkpointing)
        if self.mesh is not None:
            self.policy.share_out(self.mesh)
        trainees = {
            "policy": Trainee(
                self.policy.trained, build_optimizer(settings, self.policy.trained.values())
            )
        }
        baseline = None
        if "state_baseline" in self.loss.needs:
            baseline = StateBaseline(model.get_output_embeddings().weight.shape[1], self.seed).to(
                self.group.device
            )
            optimizer = build_baseline_optimizer(baseline.parameters())
            trainees["baseline"] = Trainee(dict(baseline.named_parameters()), optimizer)
        if settings.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        fit = tokens_that_fit(kept, self.group.device)
        sharded_in = self.folder if self.policy.is_sharded else None
        budget = TokenBudget(settings.max_tokens_per_device, fit, self.group, sharded_in)
        return Stepper(
            self, Scorer.of(self.policy, baseline), trainees, layout, budget, self._open_cache()
        )

    def _open_cache(self) -> ReferenceCache | None:
        """For losses that read nothing else of the reference, if pairs are visited more than once."""
        again = self.num_steps * self.settings.batch_size > len(self.train)
        if self.reference is None or not again or not from_reference_logps(self.loss.needs):
            return None
        lengths = span_lengths(self.train, range(len(self.train)), self.loss.span)
        if self.group.is_main:
            ReferenceCache(self.reference, lengths)
        self.group.gather(
            None
        )  # the file is made by one process; each then writes what it finds out of its own pairs
        return ReferenceCache(self.reference, lengths)

    def _evaluate(self, step: int, stepper: Stepper, log: MetricsLog) -> None:
        """Measures the held-out pairs, unless the log has that already, and draws the curves."""
        is_new = not any((line["split"], line["step"]) == ("eval", step) for line in log.lines)
        if (
            len(self.evaluation) and self.group.gather(is_new)[0]
        ):  # what the first process has read decides for all
            self._note(log, "eval", step, stepper.evaluate())
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

    with ExitStack() as after:
        for number in (signal.SIGINT, signal.SIGTERM):
            after.callback(signal.signal, number, signal.signal(number, note))
        yield received
