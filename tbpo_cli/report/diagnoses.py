"""What usually goes wrong with a preference training, as a table: when to say it, and what."""

from __future__ import annotations

import math

# Learning rates that work, by stage and by whether an adapter is trained, for models of 1e9 weights
# and more. align, LoRA: 5e-7 (arXiv 2605.12288) to 5e-5 (TRL's and peft's DPO examples); full: 3e-7
# to 1e-6 (arXiv 2405.14734, SimPO's search), 5e-7 (arXiv 2310.16944, Zephyr), 8e-6 (arXiv
# 2403.07691, ORPO). sft, LoRA: 2e-4 (arXiv 2305.14314, QLoRA); full: 2e-5 (Zephyr). A factor of two
# is left on both sides.
RATES = {
    ("align", True): (2.5e-7, 1e-4),
    ("align", False): (1.5e-7, 1.6e-5),
    ("sft", True): (1e-5, 5e-4),
    ("sft", False): (1e-6, 5e-5),
}


def advice(
    stage: str,
    lora: bool,
    rate: float,
    beta: float,
    *,
    weights: float = 1e9,
    memory: float = 0.0,
    room: float = 0.0,
    visits: float = 1.0,
    held_out: int = 1,
    length_ratio: float = 1.0,
    cut: float = 0.0,
) -> list[str]:
    """What to say about a training stage, "sft" or "align"; what is not known of it is as it should
    be.

    Args:
        beta: that of the loss, over its default.
        weights: of the model; `memory`: bytes that a device needs, `room`: and has.
        visits: how often a pair is read.
        length_ratio: mean tokens of the chosen responses over those of the rejected ones.
        cut: share of the rows that data.max_length drops or cuts.
    """
    low, high = RATES[stage, lora]
    high *= max(
        1.0, math.sqrt(1e9 / weights)
    )  # rates fall about with the width (arXiv 2203.03466), weights its square
    given, usual = f"{stage}.learning_rate = {rate:g}", f"{low:.2g} to {high:.2g}"
    # beta: a twentieth to ten times the default; of dpo 0.005 to 1, around 0.01 to 0.5 of the DPO
    # and Zephyr papers. Lengths: DPO makes answers longer where the chosen ones are (arXiv
    # 2403.19159). Visits: Zephyr's DPO overfits after one epoch; most published runs take 1 to 3.
    table = (
        (rate > high and not lora,
         f"{given} is high: all weights take a tenth of LoRA's, usually {usual}"),
        (rate > high and lora, f"{given} is high: LoRA usually takes {usual}; watch the KL"),
        (rate < low, f"{given} is low: usual are {usual}; little will change"),
        (beta < 1 / 20,
         f"beta is {beta:.2g} of its default: the policy may go far from the reference"),
        (beta > 10,
         f"beta is {beta:.0f} times its default: the policy will hardly leave the reference"),
        (length_ratio > 1.3, f"chosen responses are {length_ratio:.1f} times as long as rejected "
         "ones: the policy may learn to be long"),
        (cut > 0.1,
         f"{cut:.0%} of the rows are over data.max_length: little is learned about long answers"),
        (visits > 3,
         f"each pair is read {visits:.1f} times: beyond 3, held-out metrics usually fall"),
        (not held_out, "no pair is held out: nothing will show when the policy gets worse"),
        (memory > room, f"{stage} needs more memory than the device has: lower "
         f"{stage}.max_tokens_per_device, set {stage}.activation_checkpointing, or take more GPUs"),
    )  # fmt: skip
    return [text for applies, text in table if applies]
