"""What is known of a training, before and after it, for the table of diagnoses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Any

from tbpo_cli.console import counted

# Learning rates that work, by stage and by whether an adapter is trained, for 1e9 weights and more.
# align, LoRA: 5e-7 (arXiv 2605.12288) to 5e-5 (TRL's and peft's DPO examples); all weights: 3e-7 to
# 1e-6 (arXiv 2405.14734, SimPO's search), 5e-7 (arXiv 2310.16944, Zephyr), 8e-6 (arXiv 2403.07691,
# ORPO). sft, LoRA: 2e-4 (arXiv 2305.14314, QLoRA); all weights: 2e-5 (Zephyr). A factor of two is
# left on both sides.
RATES = {
    ("align", True): (2.5e-7, 1e-4),
    ("align", False): (1.5e-7, 1.6e-5),
    ("sft", True): (1e-5, 5e-4),
    ("sft", False): (1e-6, 5e-5),
}
# The least rate × steps that moves a policy. The smallest published ones are 5e-7 × 1,900 with LoRA
# (arXiv 2605.12288) and 3e-7 × 468 with all weights (arXiv 2405.14734); half of each. Measured on
# the quickstart's base (1.9e6 weights, LoRA): 6e-4 gives KL 5e-6, 1.8e-3 gives 5e-5, and KL grows
# with the square, so 1e-3 takes about 8e-3: the bound times `small`, 1.1e-2.
LEAST_TRAVEL = {True: 5e-4, False: 7e-5}


@dataclass(frozen=True)
class Facts:
    """What is known of a training stage; None: it is not known yet, or has no such figure.

    Args:
        stage: "sft" or "align".
        lora: whether an adapter is trained.
        rate: the highest learning rate.
        weights: of the model.
        beta_share: the loss's beta over its default.
        memory: bytes that a device needs. `device_memory`: bytes that it has.
        steps: of the optimizer. `batch`: pairs of a step. `pairs`: in the training data.
        visits: how often each pair is read.
        held_out: pairs that are measured on.
        length_ratio: mean tokens of the chosen responses over those of the rejected ones.
        cut: the share of the rows that data.max_length drops or cuts.
        unaligned: the share of response tokens that the loss leaves out, past the shorter response.
        kl: KL(reference ‖ policy) at the end, nats a token; the other figures are of the end, too.
        entropy_share: the policy's entropy over the reference's.
        accuracy: the share of held-out pairs whose chosen response gets the higher reward.
        training_accuracy: the same over the last steps of the training.
        chosen_fall: by how much log π of a chosen token fell, nats.
        loss_fall: by how much the held-out loss fell.
        answer_ratio: mean length of the policy's samples over that of the reference's.
        two_sigma_answers: in rounds, the answers to a prompt, if "best_two_sigma" chooses of them.
        round_length: in rounds, mean length of the last policy's answers over the first one's.
        round_top: the share of the last policy's answers with the highest mark of all.
        round_no_pair: the share of the prompts of the last round that gave no pair.
        round_spread: standard deviation of a prompt's marks, the last round's over the first's.
        round_kl: KL of the last round. `round_kl_before`: of the round before.
        round_reference: what KL is measured from there: `rounds.reference`.
        unread: the share of a judge's questions whose answer is no verdict. `unread_by`: its name.
        flips: the share of comparisons whose verdict changes with the order of the two answers.
        flips_by: the name of the judge that does so.
        same_judges: the judges, in words, that both chose the training pairs and compared answers.
    """

    stage: str = "align"
    lora: bool = True
    rate: float = 0.0
    weights: float = 1e9
    beta_share: float | None = None
    memory: float | None = None
    device_memory: float | None = None
    steps: int | None = None
    batch: int | None = None
    pairs: int | None = None
    visits: float | None = None
    held_out: int | None = None
    length_ratio: float | None = None
    cut: float | None = None
    unaligned: float | None = None
    kl: float | None = None
    entropy_share: float | None = None
    accuracy: float | None = None
    training_accuracy: float | None = None
    chosen_fall: float | None = None
    loss_fall: float | None = None
    answer_ratio: float | None = None
    two_sigma_answers: int | None = None
    round_length: float | None = None
    round_top: float | None = None
    round_no_pair: float | None = None
    round_spread: float | None = None
    round_kl: float | None = None
    round_kl_before: float | None = None
    round_reference: str | None = None
    unread: float | None = None
    unread_by: str | None = None
    flips: float | None = None
    flips_by: str | None = None
    same_judges: str | None = None

    @property
    def small(self) -> float:
        """How much more a small model takes than one of 1e9 weights.

        Rates fall about with the width (arXiv 2203.03466), and weights are its square.
        """
        return max(1.0, math.sqrt(1e9 / self.weights))

    @property
    def low(self) -> float:
        return RATES[self.stage, self.lora][0]

    @property
    def high(self) -> float:
        return RATES[self.stage, self.lora][1] * self.small

    @property
    def least_travel(self) -> float:
        return LEAST_TRAVEL[self.lora] * self.small

    @property
    def trained(self) -> str:
        return "LoRA" if self.lora else "all weights"

    @property
    def lowest(self) -> str:
        """The lowest usual rate as a text, which is never under the limit itself."""
        return rounded(self.low, ROUND_CEILING)

    @property
    def highest(self) -> str:
        """The highest usual rate as a text, which is never over the limit itself."""
        return rounded(self.high, ROUND_FLOOR)

    @property
    def usual(self) -> str:
        return f"{self.lowest} to {self.highest}"

    @property
    def or_a_higher_rate(self) -> str:
        """The rate that would move the policy in these steps; "" if none that is usual would."""
        steps = max(1, self.steps or 1)
        wanted = rounded(min(self.high, 2 * self.least_travel / steps), ROUND_FLOOR)
        is_enough = float(wanted) * steps >= self.least_travel
        if not is_enough or float(wanted) <= self.rate:
            return ""
        return f", or {self.stage}.learning_rate = {wanted}"

    @property
    def or_the_first_reference(self) -> str:
        """The reference that holds the policy better; "" where it is that already."""
        return ', or rounds.reference = "first"' if self.round_reference == "previous" else ""

    @property
    def counted_steps(self) -> str:
        return counted(self.steps or 0, "step")

    @property
    def counted_pairs(self) -> str:
        return counted(self.pairs or 0, "pair")


def rounded(value: float, direction: str) -> str:
    """A number of two digits, as TOML has it.

    Args:
        direction: of `decimal`: ROUND_FLOOR for what is an upper limit, ROUND_CEILING for a lower.
    """
    # By way of repr: the float 1.6e-5 is a little less than that, and would become 1.5e-5.
    text = Context(prec=2, rounding=direction).create_decimal(repr(value))
    return f"{float(text):g}"


def after_training(metrics: Sequence[Mapping[str, Any]], facts: Facts) -> Facts:
    """The facts of a complete training.

    Args:
        metrics: the lines of its metrics.jsonl.
        facts: what was known before: stage, rate, batch, pairs.
    """
    evaluations = [line for line in metrics if line["split"] == "eval"]
    steps = [line for line in metrics if line["split"] == "train"]
    known: dict[str, Any] = {"steps": len(steps)}
    recent = [line["accuracy"] for line in steps[-20:] if "accuracy" in line]
    if len(recent) >= 5:
        known["training_accuracy"] = sum(recent) / len(recent)
    if len(evaluations) > 1:
        first, last = evaluations[0], evaluations[-1]
        known |= {"kl": last.get("kl"), "accuracy": last.get("accuracy")}
        if first.get("entropy"):
            known["entropy_share"] = last["entropy"] / first["entropy"]
        if "logps_chosen" in last:
            known["chosen_fall"] = first["logps_chosen"] - last["logps_chosen"]
    return replace(facts, **known)


def after_evaluation(results: Mapping[str, Any], lora: bool) -> Facts:
    """The facts of a complete evaluation, from its results.json."""
    policy, reference = (results["models"][name] for name in ("policy", "reference"))
    own = policy["preference"]["all"]
    before = reference["preference"]["all"]
    known: dict[str, Any] = {
        "lora": lora, "kl": own["kl"]["value"], "held_out": results["num_pairs"],
    }  # fmt: skip
    if "accuracy" in own:
        known["accuracy"] = own["accuracy"]["value"]
    if before["entropy"]["value"]:
        known["entropy_share"] = own["entropy"]["value"] / before["entropy"]["value"]
    known["chosen_fall"] = before["logps_chosen"]["value"] - own["logps_chosen"]["value"]
    lengths = [model["diversity"].get("length", {}).get("value") for model in (policy, reference)]
    if all(lengths):
        known["answer_ratio"] = lengths[0] / lengths[1]
    known |= _of_judges(results.get("win_rates", ()))
    known["same_judges"] = " and ".join(results.get("same_judges", ()))
    return Facts(**known)


def _of_judges(rates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The largest shares of unread answers and of flips that a judge has, and which judge it is."""
    found: dict[str, Any] = {}
    for judge in dict.fromkeys(rate["judge"] for rate in rates):
        own = [rate for rate in rates if rate["judge"] == judge]
        flips = [rate["inconsistent"] for rate in own if rate.get("inconsistent")]
        compared = sum(each["n"] for each in flips)
        asked = sum(rate.get("asked", 0) for rate in own)
        changed = sum(each["value"] * each["n"] for each in flips)
        unread = sum(rate.get("unread", 0) for rate in own)
        for name, part, whole in (("unread", unread, asked), ("flips", changed, compared)):
            if whole and part / whole > found.get(name, -1.0):
                found |= {name: part / whole, f"{name}_by": judge}
    return found
