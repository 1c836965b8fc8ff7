"""Exact token statistics from hidden states, without a (tokens × vocabulary) tensor for more than one chunk of tokens.

Write z(v) for the policy's logit of token v, a = log π_θ(y) and b = E_ref[log π_θ]. Every statistic that a loss
differentiates is made of a, b and constants of the reference, and

    ∂a/∂z = e_y − π_θ            ∂b/∂z = π_ref − π_θ

With a linear head z = W h + c whose W is frozen, the gradients with respect to h are known as soon as the
probabilities are, so the forward pass keeps one H-vector a token for each of a and b, and the backward pass needs no
logits at all. For a that vector is W_y − E_θ[W_v], and one online softmax over tiles of the vocabulary gives it along
with the log-normaliser. If W is trained, the backward pass recomputes each chunk.

For the advantage A = r + K alone, the policy's log-partition cancels. With one frozen head for policy and reference

    A(y) = (W_y − E_ref[W_v]) · (h_θ − h_ref)

so the policy side needs no logits, forward or backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tbpo_cli.core.types import SideScores

STATISTICS = frozenset({"logps", "log_ratio", "kl", "advantage", "reverse_kl", "entropy"})
REFERENCE_FREE = frozenset({"logps", "entropy"})
CHUNK_TOKENS = 320  # rows enough for the full speed of a matrix product
TILE_ON_CPU = 1024  # tokens of the vocabulary whose logits, for a chunk, stay in the cache


@dataclass(frozen=True)
class Head:
    """An output head: logits = cap(scale · (W h + bias)), cap(x) = softcap · tanh(x / softcap).

    Args:
        weight: (V, H), in any float type; products run in it and are accumulated in fp32.
        bias: (V,) or None.
        scale: constant factor of the logits.
        softcap: Gemma-2's cap of the logits; None for a linear head.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def frozen(self) -> bool:
        """Whether no gradient goes to the head itself."""
        return not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)

    @property
    def is_linear(self) -> bool:
        """Whether the logits are a linear function of h."""
        return self.softcap is None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) → (n, V), at least fp32."""
        logits = _at_least_fp32(hidden.to(self.weight.dtype) @ self.weight.detach().T)
        if self.bias is not None:
            logits += self.bias.detach()
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def part(self, vocabulary: slice) -> Head:
        """The head of some of the tokens."""
        bias = None if self.bias is None else self.bias[vocabulary]
        return replace(self, weight=self.weight[vocabulary], bias=bias)

    def linear_part(self, grad: Tensor, logits: Tensor | None) -> Tensor:
        """∂/∂logits → ∂/∂(W h + bias), both (n, V); `grad` is overwritten. The logits matter to a softcap only."""
        if self.softcap is not None:
            assert logits is not None
            grad *= 1 - (logits / self.softcap) ** 2
        if self.scale != 1.0:
            grad *= self.scale
        return grad

    def to_hidden(self, linear_grad: Tensor) -> Tensor:
        """∂/∂(W h + bias), (n, V) → ∂/∂h, (n, H), at least fp32."""
        return _at_least_fp32(linear_grad.to(self.weight.dtype) @ self.weight.detach())


def token_statistics(
    needs: frozenset[str],
    tokens: Tensor,
    policy_hidden: Tensor,
    policy_head: Head,
    reference_hidden: Tensor | None = None,
    reference_head: Head | None = None,
) -> SideScores:
    """The statistics in `needs`, and no others, for N tokens.

    Args:
        needs: names within STATISTICS.
        tokens: (N,) int64, the response tokens.
        policy_hidden: (N, H), the hidden states that predict them; gradients flow here and to the policy head.
        policy_head: the policy's output head.
        reference_hidden: (N, H') of the reference; None if `needs` is within REFERENCE_FREE.
        reference_head: its head, the same object if it is the same head; never receives a gradient.

    Returns:
        One row, (1, N), in nats; `reverse_kl` and `entropy` carry no gradient.
    """
    if (
        needs == {"advantage"}
        and reference_hidden is not None
        and uses_identity(policy_head, reference_head)
    ):
        known = {
            "advantage": _advantage_by_identity(
                tokens, policy_hidden, policy_head, reference_hidden
            )
        }
    elif needs <= {"logps", "log_ratio"} and policy_head.frozen and policy_head.is_linear:
        known = {"logps": _logps(tokens, policy_hidden, policy_head)}
        if "log_ratio" in needs:
            assert reference_hidden is not None and reference_head is not None
            known["log_ratio"] = known["logps"] - _logps(
                tokens, reference_hidden.detach(), reference_head
            )
    else:
        statistics = _ChunkedStatistics.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
            policy_hidden, policy_head.weight, policy_head.bias, policy_head, tokens, reference_hidden, reference_head,
            needs,
        )  # fmt: skip
        logps, mean_logps, reference_logps, reference_mean, reverse_kl, entropy = statistics
        log_ratio = logps - reference_logps  # r_t
        kl = reference_mean - mean_logps  # K_t = E_ref[log π_ref] − E_ref[log π_θ]
        known = {
            "logps": logps,
            "log_ratio": log_ratio,
            "kl": kl,
            "advantage": log_ratio + kl,
        }  # A_t = r_t + K_t
        known |= {"reverse_kl": reverse_kl, "entropy": entropy}
    mask = torch.ones(1, tokens.shape[0], dtype=torch.bool, device=tokens.device)
    return SideScores(mask, **{name: known[name][None] for name in needs})


def uses_identity(policy_head: Head, reference_head: Head | None) -> bool:
    """Whether the advantage can be had without policy logits: one frozen, linear head for policy and reference."""
    return policy_head is reference_head and policy_head.frozen and policy_head.is_linear


def _advantage_by_identity(
    tokens: Tensor, policy_hidden: Tensor, head: Head, reference_hidden: Tensor
) -> Tensor:
    """A = scale · (W_y − E_ref[W_v]) · (h_θ − h_ref), (N,); the bias cancels."""
    _, direction = _of_softmax(tokens, reference_hidden, head, with_direction=True)
    difference = _at_least_fp32(policy_hidden) - _at_least_fp32(reference_hidden.detach())
    return head.scale * (direction * difference).sum(dim=-1)


def _logps(tokens: Tensor, hidden: Tensor, head: Head) -> Tensor:
    """log π(y), (N,), whose gradient with respect to h is scale · (W_y − E[W_v]) for a frozen, linear head."""
    logps, direction = _of_softmax(tokens, hidden, head, with_direction=hidden.requires_grad)
    if not hidden.requires_grad:
        return logps
    zero = _at_least_fp32(hidden) - _at_least_fp32(hidden.detach())  # that has a gradient
    return logps + head.scale * (direction * zero).sum(dim=-1)


@torch.no_grad()
def _of_softmax(
    tokens: Tensor, hidden: Tensor, head: Head, with_direction: bool
) -> tuple[Tensor, Tensor]:
    """log π(y), (N,), and W_y − E[W_v] under the head's softmax, (N, H) or empty.

    An online softmax over tiles of the vocabulary, chunk by chunk. Source: arXiv 1805.02867.
    """
    size = TILE_ON_CPU if hidden.is_cpu else head.weight.shape[0]
    logps = hidden.new_empty(tokens.shape[0], dtype=_accumulator(head))
    direction = logps.new_empty((tokens.shape[0], head.weight.shape[1]) if with_direction else 0)
    for part in _chunks(tokens):
        column = logps.new_full((len(tokens[part]), 1), -torch.inf)
        target, highest, total, rows = (
            column,
            column,
            torch.zeros_like(column),
            torch.zeros_like(column),
        )
        for start in range(0, head.weight.shape[0], size):
            tile = head.part(slice(start, start + size))
            logits, place = tile.logits(hidden[part]), tokens[part, None] - start
            inside = (place >= 0) & (place < logits.shape[-1])
            target = torch.where(
                inside, logits.gather(-1, place.clamp(0, logits.shape[-1] - 1)), target
            )
            before, highest = highest, logits.amax(dim=-1, keepdim=True).maximum(highest)
            weights, shrink = logits.sub_(highest).exp_(), (before - highest).exp_()
            total = total * shrink + weights.sum(dim=-1, keepdim=True)
            if with_direction:
                rows = rows * shrink + tile.to_hidden(weights)
        logps[part] = (target - highest - total.log()).squeeze(-1)
        if with_direction:
            direction[part] = head.weight[tokens[part]] - rows / total
    return logps, direction


class _ChunkedStatistics(torch.autograd.Function):
    """a, b and the constants of the reference, chunk by chunk; (N,) each, zeros for what `needs` does not want."""

    @staticmethod
    def forward(
        ctx: Any, policy_hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, tokens: Tensor,
        reference_hidden: Tensor | None, reference_head: Head | None, needs: frozenset[str],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        with_reference, with_mean = bool(needs - REFERENCE_FREE), bool(needs & {"kl", "advantage"})
        differentiated = any(ctx.needs_input_grad)
        keep_directions = differentiated and head.frozen
        zeros = policy_hidden.new_zeros(tokens.shape[0], dtype=_accumulator(head))
        logps, mean_logps, reference_logps, reference_mean, reverse_kl, entropy = (
            zeros.clone() for _ in range(6)
        )
        directions = (
            zeros.new_zeros(1 + with_mean, *policy_hidden.shape) if keep_directions else None
        )
        for part in _chunks(tokens):
            target, reference, reference_probs = tokens[part, None], None, None
            if with_reference:
                assert reference_head is not None and reference_hidden is not None
                reference = reference_head.logits(reference_hidden[part]).log_softmax(dim=-1)
                reference_logps[part] = reference.gather(-1, target).squeeze(-1)
                if with_mean:
                    reference_probs = reference.exp()
                    reference_mean[part] = torch.linalg.vecdot(reference_probs, reference)
                if "reverse_kl" not in needs:
                    reference = None
            logits = head.logits(policy_hidden[part])
            policy = logits.log_softmax(dim=-1)
            capped = logits if head.softcap is not None else None
            del logits  # nothing else needs them: at most three chunks live
            logps[part] = policy.gather(-1, target).squeeze(-1)
            if reference_probs is not None:
                mean_logps[part] = torch.linalg.vecdot(reference_probs, policy)
            if needs & {"entropy", "reverse_kl"}:
                probs = policy.exp()
                entropy[part] = -torch.linalg.vecdot(probs, policy)
                if reference is not None:
                    reverse_kl[part] = -entropy[part] - torch.linalg.vecdot(probs, reference)
            if directions is not None:
                probs = policy.exp_()
                if reference_probs is not None:
                    grad_mean = reference_probs.sub_(probs)  # π_ref − π_θ
                    directions[1, part] = head.to_hidden(head.linear_part(grad_mean, capped))
                grad_target = probs.neg_().scatter_add_(
                    -1, target, torch.ones_like(probs[:, :1])
                )  # e_y − π_θ
                directions[0, part] = head.to_hidden(head.linear_part(grad_target, capped))
        if directions is not None:
            ctx.save_for_backward(directions)
        elif differentiated:
            ctx.save_for_backward(policy_hidden, tokens, reference_hidden)
            ctx.reference_head = reference_head
        ctx.head, ctx.with_mean = head, with_mean
        ctx.mark_non_differentiable(reference_logps, reference_mean, reverse_kl, entropy)
        return logps, mean_logps, reference_logps, reference_mean, reverse_kl, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logps: Tensor, grad_mean: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.head.frozen:
            (directions,) = ctx.saved_tensors
            grad_hidden = directions[0] * grad_logps[:, None]
            if ctx.with_mean:
                grad_hidden += directions[1] * grad_mean[:, None]
            return grad_hidden, *(None,) * 7
        hidden, tokens, reference_hidden = ctx.saved_tensors
        head, grad_hidden = ctx.head, torch.empty_like(hidden)
        grad_weight = torch.zeros_like(head.weight, dtype=_accumulator(head))
        grad_bias = (
            None if head.bias is None else torch.zeros_like(head.bias, dtype=_accumulator(head))
        )
        for part in _chunks(tokens):
            logits = head.logits(hidden[part])
            grad = logits.softmax(dim=-1).mul_(
                -(grad_logps + grad_mean)[part, None]
            )  # −(g_a + g_b) π_θ
            grad.scatter_add_(-1, tokens[part, None], grad_logps[part, None])  # + g_a e_y
            if ctx.with_mean:
                reference_probs = ctx.reference_head.logits(reference_hidden[part]).softmax(dim=-1)
                grad.addcmul_(reference_probs, grad_mean[part, None])  # + g_b π_ref
            grad = head.linear_part(grad, logits)
            grad_hidden[part] = head.to_hidden(grad).to(hidden.dtype)
            grad_weight += grad.to(head.weight.dtype).T @ hidden[part].to(head.weight.dtype)
            if grad_bias is not None:
                grad_bias += grad.sum(dim=0)
        return grad_hidden, grad_weight, grad_bias, *(None,) * 5


def _chunks(tokens: Tensor) -> Iterator[slice]:
    return (slice(start, start + CHUNK_TOKENS) for start in range(0, tokens.shape[0], CHUNK_TOKENS))


def _at_least_fp32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _accumulator(head: Head) -> torch.dtype:
    return torch.float64 if head.weight.dtype == torch.float64 else torch.float32
