"""b_φ of TBPO-Q: its start, its number types; it touches neither policy nor global random state."""

import torch

from tbpo_cli.core import StateBaseline


def test_it_starts_at_zero_and_its_seed_alone_decides_the_rest():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = StateBaseline(6), StateBaseline(6, seed=0), StateBaseline(6, seed=1)
    assert torch.equal(torch.rand(3), expected), "the global random state is as it was"
    assert torch.equal(first.hidden.weight, again.hidden.weight) and not torch.equal(
        first.hidden.weight, other.hidden.weight
    )
    assert (first(torch.randn(2, 5, 6)) == 0).all()


def test_it_is_linear_gelu_linear_in_fp32_whatever_the_hidden_states_are():
    torch.set_default_dtype(torch.bfloat16)
    try:
        baseline = StateBaseline(6)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.nn.init.normal_(baseline.out.weight)
    torch.nn.init.ones_(baseline.out.bias)
    hidden = (
        torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = baseline(hidden)
    inner = hidden.detach().float() @ baseline.hidden.weight.T + baseline.hidden.bias
    expected = (0.5 * inner * (1 + torch.erf(inner / 2**0.5))) @ baseline.out.weight[0] + 1
    assert (found.dtype, found.shape) == (
        torch.float32,
        (2, 5),
    ) and baseline.hidden.out_features == 1024
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert hidden.grad is None and baseline.hidden.weight.grad.any()
