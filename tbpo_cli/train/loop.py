"""The training loop, for sft and align."""

from __future__ import annotations

import signal
from collections.abc import Hashable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from tbpo_cli import console
from tbpo_cli.batch.batches import longest_sequence, span_lengths
from tbpo_cli.batch.reference import ReferenceCache
from tbpo_cli.core.baseline import StateBaseline
from tbpo_cli.core.memory import first_line, is_out_of_memory
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.tokens import TokenizedPair
from tbpo_cli.errors import Interrupted, TbpoError
from tbpo_cli.model.attention import BY_SEQUENCE, describe_attention
from tbpo_cli.model.dropout import use_token_dropout
from tbpo_cli.model.layout import PADDED, apply_layout, choose_layout, confirm_layout
from tbpo_cli.model.probes import attention_of
from tbpo_cli.model.scoring import Scorer, from_reference_logps
from tbpo_cli.model.sharding import causal_model
from tbpo_cli.report.charts import curves
from tbpo_cli.report.pages import write_page
from tbpo_cli.runs import interrupts
from tbpo_cli.train.checkpoint import TrainState, kept_checkpoints, load_newest_checkpoint
from tbpo_cli.train.feed import TokenBudget, keep_freed_memory
from tbpo_cli.train.memory import (
    bytes_of_learning,
    bytes_of_weights,
    kept_bytes,
    needs_checkpointing,
    tokens_that_fit,
)
from tbpo_cli.train.metrics import MetricsLog
from tbpo_cli.train.optim import build_baseline_optimizer, build_optimizer, make_moments
from tbpo_cli.train.run import TrainingRun, num_evaluated
from tbpo_cli.train.step import Stepper

# Beside the progress bar: the metrics of the last step that had them.
SHOWN = (
    ("loss", "loss {:.4f}"),
    ("accuracy", "accuracy {:.0%}"),
    ("kl", "KL {:z.4f}"),
    ("tokens_per_s", "{:,.0f} tokens/s"),
)


def train(run: TrainingRun) -> MetricsLog:
    """Trains to the last step, from the newest checkpoint if there is one.

    Raises:
        DivergenceError: on a gradient that is not finite, before the optimizer's step.
        Interrupted: on SIGINT, SIGTERM or SIGHUP, after a checkpoint.
    """
    stepper = build_stepper(run)
    checkpoints = run.folder / "checkpoints"
    _check_same(run, tuple(kept_checkpoints(checkpoints)), checkpoints)
    step = load_newest_checkpoint(checkpoints, stepper.states, run.group)
    if step:
        console.say(f"going on from step {step}")
    log = MetricsLog(run.folder / "metrics.jsonl", step, run.group.is_main)
    _check_same(run, step, checkpoints)
    _say_what_is_measured(run)
    every = run.settings.log_every
    progress = console.progress(run.folder.name, run.num_steps, step, every)
    latest: dict[str, float] = {}
    with (
        closing(stepper.prefetcher),
        closing(stepper.checkpoints) as writer,
        _signals() as received,
        progress as update,
    ):
        while True:
            if step % run.settings.eval_every == 0 or step == run.num_steps:
                _evaluate(run, step, stepper, log)
                writer.advance()
            if step == run.num_steps:
                return log
            metrics = stepper.step(step)
            step += 1
            _write(run, log, "train", step, metrics)
            latest |= metrics
            shown = [form.format(latest[name]) for name, form in SHOWN if name in latest]
            update(step, "  ".join(shown))
            writer.advance()
            signals = run.group.gather(received[0] if received else None)
            stops = [number for number in signals if number is not None]
            is_last = step == run.num_steps
            if step % run.settings.checkpoint_every == 0 or is_last or stops:
                if stepper.cache is not None:
                    stepper.cache.sync()
                writer.begin(step)
            if is_last or stops:
                writer.finish()
            if stops:
                what = f"a checkpoint of step {step} is kept"
                raise Interrupted(stops[0], what, "the same command goes on from there")


def build_stepper(run: TrainingRun) -> Stepper:
    """The parts of a training in their state before the first step.

    Where weights are sharded, the layout is chosen on shapes without numbers: some models fail in
    that trial, and must not do so in the middle of a pass that many processes make together.
    """
    settings = run.settings
    policy = run.policy
    device = run.group.device
    if device.type == "cpu":
        keep_freed_memory()
    stores = (run.train, run.evaluation)
    longest = longest_sequence(stores)
    shapes = run.shapes or policy
    layout, reason = choose_layout(shapes.models, settings.layout, longest)
    apply_layout(policy.models, layout)
    longest_pair = max(int(each.lengths.sum(axis=1).max(initial=0)) for each in stores)
    checkpointing = use_checkpointing(run, longest_pair)
    kept, _ = kept_bytes(shapes.model, checkpointing, policy.autocast)
    states = {
        "policy": TrainState(policy.trained, build_optimizer(settings, policy.trained.values()))
    }
    baseline = None
    if "state_baseline" in run.loss.needs:
        hidden_size = policy.model.get_output_embeddings().weight.shape[1]
        baseline = StateBaseline(hidden_size, run.seed).to(device)
        optimizer = build_baseline_optimizer(baseline.parameters())
        states["baseline"] = TrainState(dict(baseline.named_parameters()), optimizer)
    for state in states.values():
        allocate_moments(state, device)
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    budget = TokenBudget(
        settings.max_tokens_per_device,
        tokens_that_fit(kept, device),
        run.group,
        run.folder if policy.is_sharded else None,
        run.folder,
    )
    scorer = Scorer.of(policy, baseline)
    pairs = sample_pairs(run.train)

    def confirm(max_tokens: int) -> tuple[str, str]:
        fitting = _fitting(pairs, max_tokens)
        return confirm_layout(scorer, layout, settings.layout, reason, fitting)

    layout, reason = budget.attempt(confirm)
    say_ways(run, scorer, layout, reason)
    cache = open_reference_cache(run)
    token_keys = use_token_dropout(policy.model)
    return Stepper(run, scorer, states, layout, budget, cache, token_keys)


def say_ways(run: TrainingRun, scorer: Scorer, layout: str, reason: str) -> None:
    """Says how rows, attention and head are computed, and why; a slow way is a warning.

    The varlen kernel is tried here, before any layer runs in a pass that may be checkpointed.
    """
    policy = run.policy
    device = run.group.device
    models = [causal_model(model) for model in policy.models]
    attention = attention_of(models[0])
    slow = reason if layout == PADDED and run.settings.layout == "auto" else ""
    if attention == BY_SEQUENCE:
        dtype = policy.autocast or models[0].dtype
        attention, slow = describe_attention(models, dtype, device)
    head = scorer.describe(run.loss.needs)
    run.ways.update(rows=f"{layout}: {reason}", attention=attention, head=head)
    if slow:
        run.ways["slow"] = slow
    console.say(f"rows are {layout}: {reason}")
    console.say(f"attention: {attention}; output head: {head}")
    if slow:
        console.say(f"WARNING: a slower way is taken: {slow}")


def sample_pairs(store: PairStore) -> list[TokenizedPair]:
    """Real pairs to try a layout on: the longest one, and the first two."""
    longest = int(store.lengths.sum(axis=1).argmax())
    return [store[index] for index in dict.fromkeys([longest, *range(min(2, len(store)))])]


def _fitting(pairs: list[TokenizedPair], max_tokens: int) -> list[TokenizedPair]:
    """The first pairs that have so many tokens together, each response in a row; at least one."""
    fitting: list[TokenizedPair] = []
    for pair in pairs:
        kept = [*fitting, pair]
        rows = (len(one.prompt_ids) + len(ids) for one in kept for ids in _responses(one))
        if fitting and sum(rows) > max_tokens:
            break
        fitting = kept
    return fitting


def _responses(pair: TokenizedPair) -> tuple[Sequence[int], Sequence[int]]:
    return pair.chosen_ids, pair.rejected_ids


def use_checkpointing(run: TrainingRun, longest_pair: int) -> bool:
    """Whether activations are computed again; the same in all processes, and said if "auto"."""
    wanted = run.settings.activation_checkpointing
    policy = run.shapes or run.policy
    used = bytes_of_weights(policy) + bytes_of_learning(policy, run.settings)
    used /= run.policy.num_parts
    device = run.group.device
    autocast = policy.autocast
    own = needs_checkpointing(policy.model, wanted, longest_pair, device, used, autocast)
    uses = any(run.group.gather(own))
    if uses and wanted == "auto":
        tokens = f"the longest pair, of {longest_pair:,} tokens, would not fit otherwise"
        console.say(f"activations are computed again in the backward pass: {tokens}")
    return uses


def allocate_moments(state: TrainState, device: torch.device) -> None:
    """`make_moments`. Raises TbpoError if there is no memory for them."""
    try:
        make_moments(state.optimizer)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        num_weights = sum(weight.numel() for weight in state.parameters.values())
        raise TbpoError(
            f"out of memory: {first_line(error)}",
            f"the optimizer's moments of {num_weights:,} trained weights on {device}",
            "memory for weights, gradients and moments, 16 bytes a weight with adamw",
            'train an adapter ([model.lora]), or give more --gpus with sharding = "fsdp"',
        ) from None


def open_reference_cache(run: TrainingRun) -> ReferenceCache | None:
    """For losses that read log π_ref and nothing else of the reference, if pairs are read again."""
    is_read_again = run.num_steps * run.settings.batch_size > len(run.train)
    if run.reference is None or not is_read_again or not from_reference_logps(run.loss.needs):
        return None
    lengths = span_lengths(run.train, range(len(run.train)), run.loss.span)
    if run.group.is_main:
        ReferenceCache(run.reference, lengths)
    run.group.gather(None)  # the others open the file that the first one has made
    return ReferenceCache(run.reference, lengths)


def _check_same(run: TrainingRun, seen: Hashable, checkpoints: Path) -> None:
    """Raises TbpoError if the processes see other checkpoints, or begin at different steps."""
    if len(set(run.group.gather(seen))) > 1:
        raise TbpoError(
            "the processes do not see the same checkpoints",
            str(checkpoints),
            "a run directory on a file system that all machines share",
            "give such a one with --run-dir",
        )


def _say_what_is_measured(run: TrainingRun) -> None:
    num_pairs = len(run.evaluation)
    num_between = num_evaluated(run.settings, num_pairs)
    if num_between < num_pairs and run.num_steps > run.settings.eval_every:
        part = f"{num_between:,} of the {num_pairs:,} held-out pairs"
        often = f"measured every {run.settings.eval_every:,} steps"
        console.say(f"{part} are {often}; all of them at the beginning and the end (eval_pairs)")


def _evaluate(run: TrainingRun, step: int, stepper: Stepper, log: MetricsLog) -> None:
    """Measures the held-out pairs, unless the log has that already, and draws the curves."""
    is_new = not any((line["split"], line["step"]) == ("eval", step) for line in log.lines)
    is_new_for_main = run.group.gather(is_new)[0]  # one decision for all processes
    if len(run.evaluation) and is_new_for_main:
        # The weights have changed since the layout was chosen, and with them what they pass on.
        pairs = sample_pairs(run.evaluation)

        def confirm(max_tokens: int) -> tuple[str, str]:
            fitting = _fitting(pairs, max_tokens)
            return confirm_layout(stepper.scorer, stepper.layout, stepper.layout, "", fitting)

        stepper.budget.attempt(confirm)
        _write(run, log, "eval", step, stepper.evaluate(run.evaluated_pairs(step)))
    if run.group.is_main:
        write_page(run.folder / "curves.svg", "curves.svg", panels=curves(log.lines))


def _write(
    run: TrainingRun, log: MetricsLog, split: str, step: int, metrics: dict[str, float]
) -> None:
    log.append(split, step, metrics)
    run.track(split, step, metrics)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list for the number of a first signal; a second SIGINT or SIGTERM ends the process."""
    received: list[int] = []

    def receive(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        console.say("stopping after this step …")

    interrupts.raise_if_received()
    give_back = interrupts.handle(receive)
    try:
        yield received
    finally:
        give_back()
