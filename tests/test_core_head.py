"""`core/head.py` computes what the dense oracle computes, without dense logits."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tbpo_cli.core import head as head_module
from tbpo_cli.core import oracle
from tbpo_cli.core.head import REFERENCE_FREE, STATISTICS, Head, token_statistics, uses_identity

DIFFERENTIABLE = ("logps", "log_ratio", "kl", "advantage")
UNDIFFERENTIATED = ("reverse_kl", "entropy", "collision_entropy")
N, H, V = 23, 12, 50
HEADS = {
    "linear": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "everything": {"bias": True, "scale": 2.0, "softcap": 5.0},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_TOKENS", 5)  # 23 tokens end in a short chunk
    monkeypatch.setattr(head_module, "TILE_ON_CPU", 16)  # and a vocabulary of 50 in a short tile


def make_head(
    generator, *, bias=False, scale=1.0, softcap=None, trained=False, dtype=torch.float64
):
    weight = (
        torch.randn(V, H, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_(trained)
    )
    bias = (
        torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(trained)
        if bias
        else None
    )
    return Head(weight, bias, scale, softcap)


def dense_logits(head, hidden):
    logits = hidden @ head.weight.T
    logits = head.scale * (logits if head.bias is None else logits + head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def gradients(statistic, weights, inputs):
    return torch.autograd.grad((statistic * weights).sum(), inputs, allow_unused=True)


@pytest.mark.parametrize(("trained", "shared"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("need", DIFFERENTIABLE)
def test_values_and_gradients_equal_the_dense_oracle(need, kind, trained, shared):
    generator = torch.Generator().manual_seed(0)
    policy_head = make_head(generator, trained=trained, **HEADS[kind])
    reference_head = (
        policy_head if shared else replace(policy_head, weight=1.5 * policy_head.weight.detach())
    )
    policy, reference = (
        torch.randn(N, H, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    policy.requires_grad_()
    tokens = torch.randint(V, (N,), generator=generator)
    weights = torch.randn(N, generator=generator, dtype=torch.float64)
    inputs = [
        policy,
        *(t for t in (policy_head.weight, policy_head.bias) if trained and t is not None),
    ]

    fast = token_statistics(
        frozenset({need}), tokens, policy, policy_head, reference, reference_head
    )
    dense = oracle.side_scores(
        dense_logits(policy_head, policy)[None],
        dense_logits(reference_head, reference)[None],
        tokens[None],
        torch.ones(1, N, dtype=torch.bool),
    )

    torch.testing.assert_close(getattr(fast, need), getattr(dense, need), rtol=1e-9, atol=1e-9)
    for got, want in zip(
        gradients(getattr(fast, need), weights, inputs),
        gradients(getattr(dense, need), weights, inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("need", DIFFERENTIABLE)
def test_no_gradient_reaches_the_reference(need):
    generator = torch.Generator().manual_seed(6)
    head = make_head(generator)
    policy, reference = (
        torch.randn(N, H, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    tokens = torch.randint(V, (N,), generator=generator)
    getattr(
        token_statistics(frozenset({need}), tokens, policy, head, reference, head), need
    ).sum().backward()
    assert policy.grad.abs().sum() > 0 and reference.grad is None


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_all_statistics_at_once_have_the_values_and_gradients_of_each_alone(trained):
    generator = torch.Generator().manual_seed(7)
    head = make_head(generator, trained=trained, **HEADS["everything"])
    reference_head = replace(head, weight=head.weight.detach() + 0.1, bias=head.bias.detach())
    policy, reference = (
        torch.randn(N, H, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    tokens, weights = (
        torch.randint(V, (N,), generator=generator),
        torch.randn(4, N, generator=generator).double(),
    )
    inputs = [policy.requires_grad_(), *([head.weight, head.bias] if trained else [])]
    fast = token_statistics(STATISTICS, tokens, policy, head, reference, reference_head)
    dense = oracle.side_scores(
        dense_logits(head, policy)[None], dense_logits(reference_head, reference)[None],
        tokens[None], torch.ones(1, N, dtype=torch.bool),
    )  # fmt: skip
    for name in STATISTICS:
        torch.testing.assert_close(getattr(fast, name), getattr(dense, name), rtol=1e-9, atol=1e-9)
    found, expected = (
        gradients(torch.cat([getattr(scores, name) for name in DIFFERENTIABLE]), weights, inputs)
        for scores in (fast, dense)
    )
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for scores in (fast, dense):
        for name in UNDIFFERENTIATED:
            assert not getattr(scores, name).requires_grad


@pytest.mark.parametrize(
    "needs",
    [
        {"reverse_kl"},
        {"entropy"},
        {"collision_entropy"},
        {"entropy", "kl"},
        {"collision_entropy", "log_ratio"},
        set(UNDIFFERENTIATED),
    ],
)
def test_what_no_loss_differentiates_equals_the_dense_oracle_and_only_what_is_needed_is_returned(
    needs,
):
    generator = torch.Generator().manual_seed(1)
    head = make_head(generator)
    policy, reference = (
        torch.randn(N, H, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    tokens = torch.randint(V, (N,), generator=generator)
    fast = token_statistics(frozenset(needs), tokens, policy, head, reference, head)
    dense = oracle.side_scores(
        dense_logits(head, policy)[None],
        dense_logits(head, reference)[None],
        tokens[None],
        torch.ones(1, N).bool(),
    )
    for name in needs:
        torch.testing.assert_close(getattr(fast, name), getattr(dense, name), rtol=1e-9, atol=1e-9)
    assert all(getattr(fast, name) is None for name in STATISTICS - needs)


class Widths(TorchDispatchMode):
    """The last dimensions of the tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim:
            self.seen.add(result.shape[-1])
        return result


@pytest.mark.parametrize(
    "needs",
    [{"advantage"}, {"logps"}, {"log_ratio"}, {"logps", "log_ratio"}, {"advantage", "logps"}],
)
def test_no_tensor_of_a_frozen_linear_head_is_as_wide_as_the_vocabulary(needs):
    generator = torch.Generator().manual_seed(8)
    head = make_head(generator, bias=True, scale=0.5)
    policy, reference = (
        torch.randn(N, H, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    tokens = torch.randint(V, (N,), generator=generator)
    with Widths() as widths:
        token_statistics(frozenset(needs), tokens, policy.requires_grad_(), head, reference, head)
    assert 16 in widths.seen and V not in widths.seen


def test_the_advantage_by_the_identity_beside_logps_has_the_values_and_gradients_of_the_oracle():
    generator = torch.Generator().manual_seed(9)
    head = make_head(generator, bias=True, scale=0.5)
    policy, reference = (
        torch.randn(N, H, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    policy.requires_grad_()
    tokens = torch.randint(V, (N,), generator=generator)
    needs = frozenset({"advantage", "logps"})
    fast = token_statistics(needs, tokens, policy, head, reference, head)
    dense = oracle.side_scores(
        dense_logits(head, policy)[None],
        dense_logits(head, reference)[None],
        tokens[None],
        torch.ones(1, N, dtype=torch.bool),
    )
    for name, factor in (("advantage", 2.0), ("logps", -3.0)):
        got, want = getattr(fast, name), getattr(dense, name)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            *(
                torch.autograd.grad(factor * each.sum(), policy, retain_graph=True)[0]
                for each in (got, want)
            ),
            rtol=1e-9,
            atol=1e-9,
        )


def test_the_identity_is_taken_for_one_frozen_linear_head_only():
    generator = torch.Generator().manual_seed(2)
    frozen, trained, capped = (
        make_head(generator),
        make_head(generator, trained=True),
        make_head(generator, softcap=9.0),
    )
    assert uses_identity(frozen, frozen)
    assert uses_identity(make := make_head(generator, bias=True, scale=0.5), make)
    assert not uses_identity(trained, trained)
    assert not uses_identity(capped, capped)
    learns_bias = Head(frozen.weight, torch.zeros(V, dtype=torch.float64, requires_grad=True))
    assert not uses_identity(learns_bias, learns_bias)
    assert not uses_identity(frozen, replace(frozen, weight=frozen.weight.clone()))
    assert not uses_identity(frozen, None)


def test_without_a_reference_only_the_policy_is_read():
    generator = torch.Generator().manual_seed(3)
    head = make_head(generator)
    policy = torch.randn(N, H, generator=generator, dtype=torch.float64)
    tokens = torch.randint(V, (N,), generator=generator)
    found = token_statistics(REFERENCE_FREE, tokens, policy, head)
    dense = dense_logits(head, policy).log_softmax(-1)
    torch.testing.assert_close(
        found.logps[0], dense[torch.arange(N), tokens], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        found.entropy[0], -(dense.exp() * dense).sum(-1), rtol=1e-12, atol=1e-12
    )
    assert found.mask.all() and found.log_ratio is None
    alone = token_statistics(frozenset({"logps"}), tokens, policy, head, reference_head=head)
    torch.testing.assert_close(alone.logps, found.logps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need", DIFFERENTIABLE)
def test_half_precision_stays_within_its_rounding_error(need, dtype):
    """Inputs rounded to `dtype` once; then 12 products of unit size.

    Their logits round to ±2^-8 of up to ~10.
    """
    generator = torch.Generator().manual_seed(4)
    head = make_head(generator, dtype=dtype)
    policy, reference = (
        torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    tokens = torch.randint(V, (N,), generator=generator)
    statistic = getattr(
        token_statistics(frozenset({need}), tokens, policy, head, reference, head), need
    )
    exact_head = Head(head.weight.double())
    exact = token_statistics(
        frozenset({need}), tokens, policy.double(), exact_head, reference.double(), exact_head
    )
    assert statistic.dtype == torch.float32
    torch.testing.assert_close(statistic.double(), getattr(exact, need), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("need", DIFFERENTIABLE)
def test_hidden_states_in_fp32_are_read_in_the_heads_number_type_and_get_gradients_in_their_own(
    need, trained
):
    generator = torch.Generator().manual_seed(5)
    head = make_head(generator, trained=trained, dtype=torch.bfloat16)
    rounded = torch.randn(N, H, generator=generator).bfloat16().requires_grad_()
    exact = rounded.detach().float().requires_grad_()
    reference = torch.randn(N, H, generator=generator).bfloat16()
    tokens, found = torch.randint(V, (N,), generator=generator), []
    for hidden in (rounded, exact):
        statistic = getattr(
            token_statistics(frozenset({need}), tokens, hidden, head, reference, head), need
        )
        (gradient,) = torch.autograd.grad(statistic.sum(), hidden)
        assert gradient.dtype == hidden.dtype
        found.append((statistic, gradient.float()))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2**-8, atol=0)


def test_gradients_of_a_bf16_head_are_added_up_in_fp32(monkeypatch):
    """600 chunks that give 3/4 or −1/4 each: in bf16, 256 + 3/4 is 256."""
    monkeypatch.setattr(head_module, "CHUNK_TOKENS", 1)
    weight, bias = (
        torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((4, 1), (4,))
    )
    hidden = torch.ones(600, 1, dtype=torch.bfloat16)
    tokens = torch.zeros(600, dtype=torch.int64)
    token_statistics(
        frozenset({"logps"}), tokens, hidden, Head(weight, bias)
    ).logps.sum().backward()
    assert weight.grad.flatten().tolist() == bias.grad.tolist() == [450.0, -150.0, -150.0, -150.0]


@pytest.mark.parametrize("need", DIFFERENTIABLE)
def test_extreme_logits_stay_finite(need):
    """Of ±1e4, beside a token of which all logits are 0."""
    head = Head(torch.tensor([[1e4], [-1e4]], dtype=torch.bfloat16))
    policy = torch.tensor([[1.0], [-1.0], [1.0], [0.0]], dtype=torch.bfloat16).requires_grad_()
    reference = torch.tensor([[1.0], [1.0], [-1.0], [0.0]], dtype=torch.bfloat16)
    tokens = torch.tensor([0, 0, 1, 0])
    statistic = getattr(
        token_statistics(frozenset({need}), tokens, policy, head, reference, head), need
    )
    statistic.sum().backward()
    assert statistic.isfinite().all() and policy.grad.isfinite().all()
