"""Every statistic from dense logits: slow, and easy to check by eye.

The tests compare everything else with it. It is also what the scorer falls back to for an output
head that `core/head.py` does not know.
"""

from __future__ import annotations

from torch import Tensor

from tbpo_cli.core.types import PairScores, SideScores


def side_scores(
    policy_logits: Tensor, reference_logits: Tensor, tokens: Tensor, mask: Tensor
) -> SideScores:
    """All statistics of one side.

    Args:
        policy_logits, reference_logits: (B, T, V); row t is the distribution that response token t
            is drawn from (already shifted). Gradients flow to the policy's only.
        tokens: (B, T) response token ids; any valid id where the mask is False.
        mask: (B, T) bool.

    Returns:
        All but `state_baseline` and `weights`, which the caller adds with `dataclasses.replace`.
    """
    policy = policy_logits.log_softmax(dim=-1)  # log π_θ(·|s_t), (B, T, V)
    reference = reference_logits.detach().log_softmax(dim=-1)  # log π_ref(·|s_t)
    logps = policy.gather(-1, tokens[..., None]).squeeze(-1)
    log_ratio = logps - reference.gather(-1, tokens[..., None]).squeeze(-1)  # r_t
    kl = (reference.exp() * (reference - policy)).sum(dim=-1)  # K_t = KL(π_ref ‖ π_θ)
    return SideScores(
        mask=mask,
        logps=logps,
        log_ratio=log_ratio,
        kl=kl,
        advantage=log_ratio + kl,  # A_t = r_t + K_t
        reverse_kl=(policy.exp() * (policy - reference)).sum(dim=-1).detach(),
        entropy=-(policy.exp() * policy).sum(dim=-1).detach(),
        collision_entropy=-(policy.exp() ** 2).sum(dim=-1).log().detach(),  # −log Σ_v π_θ(v)²
    )


def pair_scores(
    chosen_policy_logits: Tensor, chosen_reference_logits: Tensor,
    chosen_tokens: Tensor, chosen_mask: Tensor,
    rejected_policy_logits: Tensor, rejected_reference_logits: Tensor,
    rejected_tokens: Tensor, rejected_mask: Tensor,
) -> PairScores:  # fmt: skip
    """`side_scores` of both sides; T may differ between them."""
    return PairScores(
        chosen=side_scores(
            chosen_policy_logits, chosen_reference_logits, chosen_tokens, chosen_mask
        ),
        rejected=side_scores(
            rejected_policy_logits, rejected_reference_logits, rejected_tokens, rejected_mask
        ),
    )
