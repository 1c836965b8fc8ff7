"""How logits are computed on a GPU, for which "meta" stands: tensors without numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tbpo_cli.core import head as head_module
from tbpo_cli.core.head import Head, token_statistics

N, H, V = 23, 12, 50


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(head_module, "CHUNK_TOKENS_ON_GPU", 10)


class Shapes(TorchDispatchMode):
    """Notes the matrix products: their names, and the shapes and types of their results."""

    def __init__(self):
        super().__init__()
        self.products = []
        self.casts = 0  # of logits, to fp32

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            self.products.append((name, tuple(result.shape), result.dtype))
        is_logits = name == "_to_copy" and result.shape[-1] == V
        self.casts += is_logits and result.dtype == torch.float32
        return result


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_on_a_gpu_a_trained_head_is_computed_in_larger_chunks(trained):
    """Each chunk reads and writes the whole of its gradient."""
    weight = torch.zeros(V, H, device="meta", requires_grad=trained)
    hidden = torch.zeros(N, H, device="meta", requires_grad=True)
    tokens = torch.zeros(N, dtype=torch.int64, device="meta")
    with Shapes() as seen:
        scores = token_statistics(frozenset({"logps"}), tokens, hidden, Head(weight))
        scores.logps.sum().backward()
    logits = [shape[0] for _, shape, _ in seen.products if shape[1] == V]
    gradients = [name for name, shape, _ in seen.products if shape == (V, H)]
    assert logits == ([10, 10, 3] * 2 if trained else [5, 5, 5, 5, 3])
    assert gradients == (["addmm_"] * 3 if trained else [])


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_on_a_gpu_logits_in_half_precision_are_written_in_fp32(trained):
    weight = torch.zeros(V, H, device="meta", dtype=torch.bfloat16, requires_grad=trained)
    hidden = torch.zeros(N, H, device="meta", dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(N, dtype=torch.int64, device="meta")
    with Shapes() as seen:
        token_statistics(frozenset({"logps"}), tokens, hidden, Head(weight)).logps.sum().backward()
    wide = [dtype for _, shape, dtype in seen.products if shape[1] == V]
    assert wide and {*wide} == {torch.float32}
    assert seen.casts == 0, "nothing is rounded to half precision before"
