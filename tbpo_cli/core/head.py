"""Exact token statistics from hidden states, without a (tokens × vocabulary) tensor of all tokens.

Write z(v) for the policy's logit of token v, a = log π_θ(y) and b = E_ref[log π_θ]. Every statistic
that a loss differentiates is made of a, b and constants of the reference, and

    ∂a/∂z = e_y − π_θ            ∂b/∂z = π_ref − π_θ

With a linear head z = W h + c whose W is frozen, the gradients with respect to h are known as soon
as the probabilities are. The forward pass therefore keeps one H-vector a token for each of a and b,
and the backward pass needs no logits at all. For a, that vector is W_y − E_θ[W_v], and one online
softmax over tiles of the vocabulary gives it along with the log-normaliser. If W is trained, the
backward pass computes the logits of each chunk of tokens again.

For the advantage A = r + K alone, the policy's log-partition cancels. With one frozen head for
policy and reference

    A(y) = (W_y − E_ref[W_v]) · (h_θ − h_ref)

so the policy side needs no logits, forward or backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tbpo_cli.core.logits import Head as Head
from tbpo_cli.core.logits import at_least_fp32
from tbpo_cli.core.types import SideScores

# What a step that reports all metrics, and every evaluation, computes whatever the loss needs.
DIAGNOSTICS = frozenset({"logps", "log_ratio", "kl", "advantage", "reverse_kl", "entropy"})
STATISTICS = DIAGNOSTICS | {"collision_entropy"}
REFERENCE_FREE = frozenset({"logps", "entropy", "collision_entropy"})
CHUNK_TOKENS = 320  # rows enough for the full speed of a matrix product
CHUNK_TOKENS_ON_GPU = 1024  # of a trained head: all of W's gradient is read and written for each
TILE_ON_CPU = 1024  # tokens of the vocabulary whose logits, for a chunk, stay in the cache
CHUNKED = (  # what `_ChunkedStatistics` returns, in this order
    "logps",
    "mean_logps",
    "reference_logps",
    "reference_mean",
    "reverse_kl",
    "entropy",
    "collision_entropy",
)


def token_statistics(
    needs: frozenset[str],
    tokens: Tensor,
    policy_hidden: Tensor,
    policy_head: Head,
    reference_hidden: Tensor | None = None,
    reference_head: Head | None = None,
) -> SideScores:
    """The statistics in `needs`, and no others, for N tokens, by the cheapest exact way.

    Args:
        needs: names within STATISTICS.
        tokens: (N,) int64, the response tokens.
        policy_hidden: (N, H), the hidden states that predict them; gradients flow here and to the
            policy head.
        policy_head: the policy's output head.
        reference_hidden: (N, H') of the reference; None if `needs` is within REFERENCE_FREE.
        reference_head: its head, the same object if it is the same head; never receives a gradient.

    Returns:
        One row, (1, N), in nats; `reverse_kl`, `entropy` and `collision_entropy` carry no gradient.
    """
    known: dict[str, Tensor] = {}
    identity = reference_hidden is not None and uses_identity(policy_head, reference_head)
    if identity and "advantage" in needs and needs <= {"advantage", "logps"}:
        assert reference_hidden is not None
        known["advantage"] = _advantage_by_identity(
            tokens, policy_hidden, policy_head, reference_hidden
        )
    rest = needs - known.keys()
    if rest <= {"logps", "log_ratio"} and policy_head.frozen and policy_head.is_linear:
        if rest:
            known["logps"] = _logps(tokens, policy_hidden, policy_head)
        if "log_ratio" in rest:
            assert reference_hidden is not None and reference_head is not None
            reference_logps = _logps(tokens, reference_hidden.detach(), reference_head)
            known["log_ratio"] = known["logps"] - reference_logps
    else:
        computed = _ChunkedStatistics.apply(  # type: ignore[no-untyped-call]  # untyped in torch
            policy_hidden, policy_head.weight, policy_head.bias, policy_head, tokens,
            reference_hidden, reference_head, rest,
        )  # fmt: skip
        known |= dict(zip(CHUNKED, computed, strict=True))
        known["log_ratio"] = known["logps"] - known["reference_logps"]  # r_t
        # K_t = E_ref[log π_ref] − E_ref[log π_θ]
        known["kl"] = known["reference_mean"] - known["mean_logps"]
        known["advantage"] = known["log_ratio"] + known["kl"]  # A_t = r_t + K_t
    mask = torch.ones(1, tokens.shape[0], dtype=torch.bool, device=tokens.device)
    return SideScores(mask, **{name: known[name][None] for name in needs})


def uses_identity(policy_head: Head, reference_head: Head | None) -> bool:
    """Whether the advantage needs no policy logits: one frozen, linear head serves both models."""
    return policy_head is reference_head and policy_head.frozen and policy_head.is_linear


def _advantage_by_identity(
    tokens: Tensor, policy_hidden: Tensor, head: Head, reference_hidden: Tensor
) -> Tensor:
    """A = scale · (W_y − E_ref[W_v]) · (h_θ − h_ref), (N,); the bias cancels."""
    _, direction = _of_softmax(tokens, reference_hidden, head, with_direction=True)
    difference = at_least_fp32(policy_hidden) - at_least_fp32(reference_hidden.detach())
    return head.scale * (direction * difference).sum(dim=-1)


def _logps(tokens: Tensor, hidden: Tensor, head: Head) -> Tensor:
    """log π(y), (N,), for a frozen, linear head: its gradient in h is scale · (W_y − E[W_v])."""
    logps, direction = _of_softmax(tokens, hidden, head, with_direction=hidden.requires_grad)
    if not hidden.requires_grad:
        return logps
    zero = at_least_fp32(hidden) - at_least_fp32(hidden.detach())  # 0, whose gradient in h is 1
    return logps + head.scale * (direction * zero).sum(dim=-1)


@torch.no_grad()
def _of_softmax(
    tokens: Tensor, hidden: Tensor, head: Head, with_direction: bool
) -> tuple[Tensor, Tensor]:
    """log π(y), (N,), and W_y − E[W_v] under the head's softmax, (N, H) or empty.

    An online softmax (arXiv 1805.02867), for each chunk of tokens:

    1. Go through the tiles of the vocabulary, and keep the largest logit so far, the sum of
       exp(logit − largest), and the same sum with the rows of W.
    2. When the largest logit grows, scale both sums down to the new one.
    3. After the last tile: log π(y) = z(y) − largest − log sum, and E[W_v] is the second sum over
       the first.
    """
    num_vocabulary = head.weight.shape[0]
    size = TILE_ON_CPU if hidden.is_cpu else num_vocabulary
    logps = hidden.new_empty(tokens.shape[0], dtype=_accumulator(head))
    direction = logps.new_empty((tokens.shape[0], head.weight.shape[1]) if with_direction else 0)
    for part in _chunks(tokens, head):
        highest = logps.new_full((len(tokens[part]), 1), -torch.inf)  # largest logit so far
        target = highest  # becomes the logit of y in the tile that has y
        total = torch.zeros_like(highest)  # Σ_v exp(z(v) − highest)
        rows = torch.zeros_like(highest)  # Σ_v exp(z(v) − highest) W_v
        for start in range(0, num_vocabulary, size):
            tile = head.part(slice(start, start + size))
            logits = tile.logits(hidden[part])
            place = tokens[part, None] - start
            inside = (place >= 0) & (place < logits.shape[-1])
            found = logits.gather(-1, place.clamp(0, logits.shape[-1] - 1))
            target = torch.where(inside, found, target)
            before = highest
            highest = logits.amax(dim=-1, keepdim=True).maximum(highest)
            weights = logits.sub_(highest).exp_()
            shrink = (before - highest).exp_()
            total = total * shrink + weights.sum(dim=-1, keepdim=True)
            if with_direction:
                rows = rows * shrink + tile.to_hidden(weights)
        logps[part] = (target - highest - total.log()).squeeze(-1)
        if with_direction:
            direction[part] = head.weight[tokens[part]] - rows / total
    return logps, direction


class _ChunkedStatistics(torch.autograd.Function):
    """The statistics in CHUNKED, (N,) each; zeros where `needs` does not want one.

    Forward, for each chunk of tokens:

    1. The reference's logits, if one is read: log π_ref(y) and, if K is wanted, π_ref and
       E_ref[log π_ref].
    2. The policy's logits: a = log π_θ(y) and, if K is wanted, b = E_ref[log π_θ].
    3. What no loss differentiates: entropy, reverse KL, collision entropy.
    4. If the head is frozen: ∂a/∂h and ∂b/∂h, one H-vector a token, kept for the backward pass.
       Nothing else of the chunk is kept.

    Backward, with g_a and g_b the gradients of a and b:

    5. If the head is frozen: ∂/∂h = g_a ∂a/∂h + g_b ∂b/∂h.
    6. If it is trained: for each chunk, the logits again, then
       ∂/∂z = g_a (e_y − π_θ) + g_b (π_ref − π_θ), and from it the gradients of h, W and the bias.
    """

    @staticmethod
    def forward(
        ctx: Any, policy_hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head,
        tokens: Tensor, reference_hidden: Tensor | None, reference_head: Head | None,
        needs: frozenset[str],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        with_reference = bool(needs - REFERENCE_FREE)
        with_mean = bool(needs & {"kl", "advantage"})
        differentiated = any(ctx.needs_input_grad)
        zeros = policy_hidden.new_zeros(tokens.shape[0], dtype=_accumulator(head))
        found = {name: zeros.clone() for name in CHUNKED}
        directions = None
        if differentiated and head.frozen:
            directions = zeros.new_zeros(1 + with_mean, *policy_hidden.shape)
        for part in _chunks(tokens, head):
            target = tokens[part, None]
            reference = None
            reference_probs = None
            if with_reference:  # step 1
                assert reference_head is not None and reference_hidden is not None
                reference = reference_head.logits(reference_hidden[part]).log_softmax(dim=-1)
                found["reference_logps"][part] = reference.gather(-1, target).squeeze(-1)
                if with_mean:
                    reference_probs = reference.exp()
                    found["reference_mean"][part] = _expected(reference_probs, reference)
                if "reverse_kl" not in needs:
                    reference = None
            logits = head.logits(policy_hidden[part])  # step 2
            policy = logits.log_softmax(dim=-1)
            capped = logits if head.softcap is not None else None
            del logits  # nothing else needs them: at most three chunks live
            found["logps"][part] = policy.gather(-1, target).squeeze(-1)
            if reference_probs is not None:
                found["mean_logps"][part] = _expected(reference_probs, policy)
            _undifferentiated(needs, policy, reference, found, part)  # step 3
            if directions is not None:  # step 4
                _keep_directions(head, target, policy, reference_probs, capped, directions[:, part])
        if directions is not None:
            ctx.save_for_backward(directions)
        elif differentiated:
            ctx.save_for_backward(policy_hidden, tokens, reference_hidden)
            ctx.reference_head = reference_head
        ctx.head = head
        ctx.with_mean = with_mean
        ctx.mark_non_differentiable(*(found[name] for name in CHUNKED[2:]))
        return tuple(found.values())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logps: Tensor, grad_mean: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.head.frozen:  # step 5
            (directions,) = ctx.saved_tensors
            grad_hidden = directions[0] * grad_logps[:, None]
            if ctx.with_mean:
                grad_hidden += directions[1] * grad_mean[:, None]
            return grad_hidden, *(None,) * 7
        hidden, tokens, reference_hidden = ctx.saved_tensors  # step 6
        head = ctx.head
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(head.weight, dtype=_accumulator(head))
        grad_bias = None
        if head.bias is not None:
            grad_bias = torch.zeros_like(head.bias, dtype=_accumulator(head))
        for part in _chunks(tokens, head):
            logits = head.logits(hidden[part])
            grad = logits.softmax(dim=-1)
            grad.mul_(-(grad_logps + grad_mean)[part, None])  # −(g_a + g_b) π_θ
            grad.scatter_add_(-1, tokens[part, None], grad_logps[part, None])  # + g_a e_y
            if ctx.with_mean:
                reference_probs = ctx.reference_head.logits(reference_hidden[part]).softmax(dim=-1)
                grad.addcmul_(reference_probs, grad_mean[part, None])  # + g_b π_ref
            grad = head.linear_part(grad, logits)
            grad_hidden[part] = head.to_hidden(grad).to(hidden.dtype)
            factors = grad.to(head.weight.dtype).T, hidden[part].to(head.weight.dtype)
            if grad_weight.dtype == head.weight.dtype:  # without a (V, H) product beside it
                grad_weight.addmm_(*factors)
            else:
                grad_weight += factors[0] @ factors[1]
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
        return grad_hidden, grad_weight, grad_bias, *(None,) * 5


def _undifferentiated(
    needs: frozenset[str],
    policy: Tensor,
    reference: Tensor | None,
    found: dict[str, Tensor],
    part: slice,
) -> None:
    """Writes a chunk's entropy, KL(π_θ ‖ π_ref) and −log Σ_v π_θ(v)², as far as they are needed.

    Args:
        policy, reference: (n, V) log π_θ and log π_ref of the chunk; the latter for `reverse_kl`.
        found: by name, (N,), where the values are written.
        part: the chunk's place in it.
    """
    if not needs & {"entropy", "reverse_kl", "collision_entropy"}:
        return
    probs = policy.exp()
    if "collision_entropy" in needs:
        found["collision_entropy"][part] = -_expected(probs, probs).log()
    if needs & {"entropy", "reverse_kl"}:
        found["entropy"][part] = -_expected(probs, policy)
    if reference is not None:
        found["reverse_kl"][part] = -found["entropy"][part] - _expected(probs, reference)


def _keep_directions(
    head: Head,
    target: Tensor,
    policy: Tensor,
    reference_probs: Tensor | None,
    capped: Tensor | None,
    directions: Tensor,
) -> None:
    """Writes a chunk's ∂a/∂h and, with the reference's probabilities, ∂b/∂h.

    Args:
        target: (n, 1), the tokens y.
        policy: (n, V), log π_θ; overwritten.
        reference_probs: (n, V), π_ref, for ∂b/∂h; overwritten.
        capped: (n, V), the policy's logits, which the derivative of a softcap reads.
        directions: (1 or 2, n, H), where the vectors are written.
    """
    probs = policy.exp_()
    if reference_probs is not None:
        grad_mean = reference_probs.sub_(probs)  # π_ref − π_θ
        directions[1] = head.to_hidden(head.linear_part(grad_mean, capped))
    grad_target = probs.neg_()
    grad_target.scatter_add_(-1, target, torch.ones_like(probs[:, :1]))  # e_y − π_θ
    directions[0] = head.to_hidden(head.linear_part(grad_target, capped))


def _expected(probs: Tensor, values: Tensor) -> Tensor:
    """Σ_v p(v) x(v), (n,)."""
    expected: Tensor = torch.linalg.vecdot(probs, values)
    return expected


def chunk_tokens(is_trained: bool, device: str) -> int:
    """Response tokens whose logits are computed at a time.

    Args:
        is_trained: whether the head is.
        device: the type of the device, as "cuda".
    """
    return CHUNK_TOKENS_ON_GPU if is_trained and device != "cpu" else CHUNK_TOKENS


def _chunks(tokens: Tensor, head: Head) -> Iterator[slice]:
    size = chunk_tokens(not head.frozen, tokens.device.type)
    return (slice(start, start + size) for start in range(0, tokens.shape[0], size))


def _accumulator(head: Head) -> torch.dtype:
    return torch.float64 if head.weight.dtype == torch.float64 else torch.float32
