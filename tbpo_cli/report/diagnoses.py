"""What usually goes wrong with a training: a table of conditions, sentences and keys to change.

`tbpo show`, the end of `tbpo align`, `tbpo eval`, the report and docs/troubleshooting.md read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tbpo_cli.evaluation.headline import MANY_FLIPS
from tbpo_cli.report.facts import Facts

UNMOVED_KL = 1e-3  # nats a token
FAR_KL = 1.0


@dataclass(frozen=True)
class Diagnosis:
    """One thing that goes wrong.

    Args:
        reads: the facts that must be known.
        applies: whether it is so.
        condition: the same in words, for docs/troubleshooting.md.
        sentence: what is said, with the facts in braces.
        change: the key to change, and how; it follows "; try".
    """

    reads: tuple[str, ...]
    applies: Callable[[Any], bool]
    condition: str
    sentence: str
    change: str


# Of the numbers of steps, pairs and a batch, which are known before a training and after it.
SIZES = (
    Diagnosis(
        ("steps", "batch"),
        lambda f: f.steps == 1,
        "the training has one step",
        "the whole training is a single step of {batch}",
        "more {stage}.epochs, or a smaller batch ({stage}.batch_pairs or batch_examples)",
    ),
    Diagnosis(
        ("pairs", "batch"),
        lambda f: f.pairs < f.batch,
        "there are fewer pairs than a step takes",
        "the training data has {counted_pairs}, and a step takes {batch}: every step reads some "
        "of them twice",
        "a smaller batch ({stage}.batch_pairs or batch_examples), or more rows",
    ),
)

BEFORE = (
    Diagnosis(
        ("rate",),
        lambda f: 0 < f.rate < f.low,
        "learning_rate is under what is published",
        "the learning rate {rate:g} is low: for {trained}, {usual} are usual",
        "{stage}.learning_rate = {lowest} or more",
    ),
    Diagnosis(
        ("rate",),
        lambda f: f.rate > f.high,
        "learning_rate is over what is published",
        "the learning rate {rate:g} is high: for {trained}, {usual} are usual",
        "{stage}.learning_rate = {highest} or less, and watch the KL",
    ),
    Diagnosis(
        ("rate", "steps"),
        lambda f: f.low <= f.rate and f.rate * f.steps < f.least_travel,
        "learning_rate × steps is under 5e-4 (LoRA) or 7e-5 (all weights); more for "
        "models under 1e9 weights",
        "a training of {counted_steps} at the rate {rate:g} hardly moves a policy, with {trained} "
        "trained",
        "more pairs, epochs or max_steps{or_a_higher_rate}",
    ),
    *SIZES,
    # A twentieth to ten times the default: of dpo 0.005 to 1, around the 0.01 to 0.5 of the DPO and
    # Zephyr papers.
    Diagnosis(
        ("beta_share",),
        lambda f: f.beta_share < 1 / 20,
        "beta is under 1/20 of the loss's default",
        "beta is {beta_share:.2g} of its default: the policy may go far from the reference",
        "a higher align.loss.beta",
    ),
    Diagnosis(
        ("beta_share",),
        lambda f: f.beta_share > 10,
        "beta is over 10 times the loss's default",
        "beta is {beta_share:.0f} times its default: the policy will hardly leave the reference",
        "a lower align.loss.beta",
    ),
    # DPO makes answers longer where the chosen ones are (arXiv 2403.19159).
    Diagnosis(
        ("length_ratio",),
        lambda f: f.length_ratio > 1.3,
        "chosen responses are over 1.3 times as long",
        "chosen responses are {length_ratio:.1f} times as long as rejected ones: the "
        "policy may learn to be long",
        'pairs of like lengths, or align.loss.name = "simpo", which compares means',
    ),
    Diagnosis(
        ("unaligned",),
        lambda f: f.unaligned > 0.4,
        "alignment leaves out over 40 % of the response tokens",
        "{unaligned:.0%} of the response tokens are past the shorter response of their "
        "pair, and not read",
        'align.loss.name = "dpo" or another loss of whole responses',
    ),
    Diagnosis(
        ("cut",),
        lambda f: f.cut > 0.1,
        "over 10 % of the rows are over data.max_length",
        "{cut:.0%} of the rows are over data.max_length: little is learned about long answers",
        'a higher data.max_length, or data.overlong = "truncate"',
    ),
    # Zephyr's DPO overfits after one epoch; most published runs take one to three.
    Diagnosis(
        ("visits",),
        lambda f: f.visits > 3,
        "each pair is read more than 3 times",
        "each pair is read {visits:.1f} times: beyond 3, held-out metrics usually fall",
        "fewer {stage}.epochs or a lower {stage}.max_steps",
    ),
    Diagnosis(
        ("held_out",),
        lambda f: f.held_out == 0,
        "no pair is held out",
        "no pair is held out: nothing will tell when the policy gets worse",
        "data.eval, or data.eval_fraction above 0",
    ),
    Diagnosis(
        ("memory", "device_memory"),
        lambda f: f.memory > f.device_memory,
        "the forecast is over the device's memory",
        "{stage} needs more memory than the device has",
        "a lower {stage}.max_tokens_per_device, {stage}.activation_checkpointing = true, or more "
        "GPUs",
    ),
    # No mark of n is lower than μ − σ √(n − 1), which is μ − 2σ for n = 5.
    Diagnosis(
        ("two_sigma_answers",),
        lambda f: f.two_sigma_answers < 6,
        'choose.pairs = "best_two_sigma" with fewer than 6 answers a prompt',
        'choose.pairs = "best_two_sigma" takes the worst of {two_sigma_answers} answers, as '
        '"best_worst" does: of fewer than 6, none is under two standard deviations below the mean',
        'rounds.answers = 8 or more, or choose.pairs = "best_worst"',
    ),
)

AFTER = (
    *SIZES,
    Diagnosis(
        ("kl", "steps"),
        lambda f: f.kl < UNMOVED_KL,
        "KL is under 0.001 nats a token at the end",
        "the policy has hardly moved: KL {kl:z.4f} nats a token after {counted_steps}",
        "more pairs, epochs or max_steps{or_a_higher_rate}",
    ),
    # The best runs of tests/benchmarks/results/methods_small_grid.md have 0.07 to 0.4.
    Diagnosis(
        ("kl",),
        lambda f: f.kl > FAR_KL,
        "KL is over 1 nat a token at the end",
        "the policy is far from its reference: KL {kl:.2f} nats a token; read its "
        "answers (tbpo sample)",
        "a lower {stage}.learning_rate, a higher align.loss.beta, or "
        "align.loss.min_ratio where the loss has it",
    ),
    Diagnosis(
        ("entropy_share",),
        lambda f: f.entropy_share < 0.4,
        "entropy fell under 40 % of the reference's",
        "the policy's entropy fell to {entropy_share:.0%} of the reference's: its "
        "answers are getting alike",
        "a lower {stage}.learning_rate, or fewer steps",
    ),
    Diagnosis(
        ("training_accuracy", "accuracy", "held_out"),
        lambda f: f.training_accuracy - f.accuracy > 0.15 + 1 / math.sqrt(max(1, f.held_out)),
        "accuracy in training is over 15 points (and two standard errors) above held-out",
        "accuracy is {training_accuracy:.0%} on the last training pairs and "
        "{accuracy:.0%} on held-out ones: "
        "it learns the pairs by heart",
        "fewer {stage}.epochs, a lower {stage}.learning_rate, or more pairs",
    ),
    Diagnosis(
        ("accuracy", "kl", "held_out"),
        lambda f: (
            f.kl >= UNMOVED_KL
            and f.accuracy < 0.5 + 1 / math.sqrt(max(1, f.held_out))
            and f.held_out >= 50
        ),
        "KL grew, and held-out accuracy is still about 50 % (of 50 pairs or more)",
        "the policy moved, and still prefers the chosen response of only {accuracy:.0%} "
        "of the held-out pairs",
        "a look at pairs with tbpo prepare RECIPE --show 3: labels may be noisy, or the "
        "difference past the shorter response, which losses that align do not read",
    ),
    Diagnosis(
        ("chosen_fall", "kl"),
        lambda f: f.chosen_fall > 0.5 and f.kl > 0.3,
        "log π of a chosen token fell by over 0.5 nats, and KL is over 0.3",
        "log π of the chosen responses fell by {chosen_fall:.2f} nats a token, with KL "
        "{kl:.2f}: chosen answers "
        "get unlikely, too",
        'a lower {stage}.learning_rate, or align.loss.name = "orpo" or "simpo"',
    ),
    Diagnosis(
        ("answer_ratio",),
        lambda f: f.answer_ratio > 1.3,
        "sampled answers are over 1.3 times as long",
        "the policy's answers are {answer_ratio:.1f} times as long as the reference's",
        "a look at the length-controlled win rate, and if it falls, at the length bias in "
        "prepare/report.html",
    ),
    Diagnosis(
        ("unread",),
        lambda f: f.unread > 0,
        "answers of the judge have no verdict that can be read",
        "{unread_by} gave no verdict that can be read to {unread:.1%} of its questions: they are "
        "left out of the win rates",
        "another judge; for a language model a higher max_tokens in judge.body, or another "
        "judge.template, may do",
    ),
    # GPT-4 changes its verdict on 35 % of the pairs of MT-Bench with their order, smaller judges on
    # more (arXiv 2306.05685, table 2).
    Diagnosis(
        ("flips",),
        lambda f: f.flips > MANY_FLIPS,
        "the judge changes its verdict with the order on over 20 % of the comparisons",
        "{flips_by} changes its verdict with the order of the two answers on {flips:.1%} of the "
        "comparisons: these count as ties, and say little",
        "another judge, or another judge.template",
    ),
    # A policy learns what its judge likes, errors and all: the judge's marks rise also where a
    # better one's fall (arXiv 2210.10760).
    Diagnosis(
        ("same_judges",),
        lambda f: bool(f.same_judges),
        "a judge of the evaluation has also chosen the training pairs",
        "the win rate by {same_judges} is no evidence: the training pairs were chosen by the same "
        "judge, and a policy learns its errors, too",
        "[eval.judge], which names another judge for tbpo eval",
    ),
)

ROUNDS = (
    # Judges prefer long answers (arXiv 2404.04475), and each round trains on that again.
    Diagnosis(
        ("round_length",),
        lambda f: f.round_length > 1.5,
        "answers of the last round are over 1.5 times as long as the first policy's",
        "the answers have become {round_length:.1f} times as long: the judge may like length",
        'choose.max_length_difference, fewer rounds, or align.loss.name = "simpo"',
    ),
    Diagnosis(
        ("round_top",),
        lambda f: f.round_top > 0.6,
        "over 60 % of the last policy's answers have the highest mark",
        "{round_top:.0%} of the last policy's answers have the highest mark there is: the judge "
        "can hardly tell them apart any more",
        "another judge.scale, another judge, or harder prompts",
    ),
    Diagnosis(
        ("round_no_pair",),
        lambda f: f.round_no_pair > 0.5,
        "over half of the prompts of the last round gave no pair",
        "{round_no_pair:.0%} of the prompts of the last round gave no pair",
        "a higher rounds.answers or rounds.temperature, or a lower choose.min_margin",
    ),
    Diagnosis(
        ("round_spread",),
        lambda f: f.round_spread < 0.5,
        "marks of the same prompt differ less than half as much as in the first round",
        "the marks of a prompt differ {round_spread:.0%} as much as in the first round: the pairs "
        "have little contrast left",
        "a lower rounds.number, or a higher rounds.temperature or rounds.answers",
    ),
    Diagnosis(
        ("round_kl", "round_kl_before"),
        lambda f: f.round_kl > 0.5 and f.round_kl > 2 * f.round_kl_before,
        "KL more than doubled in the last round, to over 0.5 nats a token",
        "KL went from {round_kl_before:.2f} to {round_kl:.2f} nats a token in the last round",
        "a lower align.learning_rate or a higher align.loss.beta{or_the_first_reference}",
    ),
)

# What is derived from the facts, for the braces of a sentence.
DERIVED = {
    "counted_pairs",
    "counted_steps",
    "highest",
    "lowest",
    "or_a_higher_rate",
    "or_the_first_reference",
    "trained",
    "usual",
}
DIAGNOSES = tuple(dict.fromkeys(BEFORE + AFTER + ROUNDS))


def diagnose(facts: Facts, table: Sequence[Diagnosis] = DIAGNOSES) -> list[str]:
    """What applies, a sentence each with the key to change; nothing about what is not known."""
    names = {each.name for each in fields(Facts)} | DERIVED
    said = []
    for each in table:
        is_known = all(getattr(facts, name) is not None for name in each.reads)
        if is_known and each.applies(facts):
            known = {name: getattr(facts, name) for name in names}
            said.append(f"{each.sentence}; try {each.change}".format(**known))
    return said
