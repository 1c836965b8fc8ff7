"""Rotary positions in fewer passes: transformers' own numbers, in each family that has them."""

import copy
from collections import Counter

import pytest
import torch
from conftest import SIZES_OF_A_MODEL
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.glmasr.configuration_glmasr import GlmAsrEncoderConfig
from transformers.models.glmasr.modeling_glmasr import GlmAsrAttention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tbpo_cli.model.rotary import fuse_rotary

SIZES = SIZES_OF_A_MODEL | {"initializer_range": 0.2}
IDS = torch.arange(1, 41).view(2, 20)
# Whether a family's rotation is the plain one: some interleave, or go back to a narrower type.
FUSED = {
    "llama": True,
    "qwen2": True,
    "qwen3": True,
    "mistral": True,
    "gemma2": True,
    "phi3": True,
    "gpt_neox": True,
    "mixtral": True,
    "cohere2": False,
    "olmo2": False,
    "gpt2": False,
}
# Models of which a part of each vector is turned, by the function that is replaced.
PARTS = {"phi3": {"partial_rotary_factor": 0.5}}


def build(kind, fuses, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **options)
    model = AutoModelForCausalLM.from_config(config).eval()
    if fuses:
        fuse_rotary(model)
    return model


def fused_layers(model):
    return [each for each in model.modules() if "forward" in vars(each)]


def found(model):
    """Logits and the gradients of all weights, by name."""
    logits = model(input_ids=IDS.to(model.device)).logits
    names, weights = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(logits.float().square().mean(), weights, allow_unused=True)
    used = {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
    return {"logits": logits.detach(), **used}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        tolerance = 1e-6 if name == "logits" else 1e-5
        # A bias of the keys has no effect, and a gradient of rounding alone.
        assert (got[name] - value).norm() <= tolerance * value.norm() + 1e-7, name


class Operations(TorchDispatchMode):
    """Counts the operations that are no views."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names["all"] += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", FUSED)
def test_a_model_with_fused_positions_is_transformers_model(kind):
    model = build(kind, True)
    assert len(fused_layers(model)) == (2 if FUSED[kind] else 0)
    assert_same(found(model), found(build(kind, False)))


@pytest.mark.parametrize("kind", PARTS)
def test_positions_of_a_part_of_each_vector_are_left_to_transformers(kind):
    options = PARTS[kind]
    assert_same(found(build(kind, True, **options)), found(build(kind, False, **options)))


def test_in_bf16_they_are_as_near_to_fp32_as_transformers():
    exact = found(build("llama", False))

    def distance(fuses):
        result = found(build("llama", fuses).bfloat16())
        assert {value.dtype for value in result.values()} == {torch.bfloat16}
        return sum(
            float((result[name].float() - value).norm() / value.norm())
            for name, value in exact.items()
        )

    assert distance(True) < 1.1 * distance(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wider_positions_give_wider_queries_and_gradients_of_the_narrower_type(dtype):
    """As where all weights are trained: the positions are in fp32, and the queries by autocast."""
    results = []
    for fuses in (False, True):
        attention = Turned()
        if fuses:
            fuse_rotary(attention)
        query, key, cos, sin = states(torch.float32)
        query = query.detach().to(dtype).requires_grad_()
        turned, _ = attention(query, key, cos, sin)
        turned.sum().backward()
        results.append((turned.detach(), query.grad))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        atol = 0.02 if got.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(got, want, rtol=1e-6, atol=atol)


class Turned(nn.Module):
    """An attention's rotation alone."""

    def forward(self, query, key, cos, sin):
        return apply_rotary_pos_emb(query, key, cos, sin)


def states(dtype):
    """Queries and keys as an attention has them; positions whose halves are not the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 4, 6), (2, 5, 2, 6), (1, 5, 6), (1, 5, 6)]
    query, key, *positions = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    turned = [each.transpose(1, 2).requires_grad_() for each in (query, key)]
    return *turned, *positions


def test_gradients_are_those_of_finite_differences():
    attention = Turned()
    fuse_rotary(attention)
    assert "forward" in vars(attention)
    query, key, cos, sin = states(torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: attention(q, k, cos, sin), (query, key))
    for got, want in zip(
        attention(query, key, cos, sin), Turned()(query, key, cos, sin), strict=True
    ):
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()


def test_they_take_fewer_operations():
    """Of 10 for a layer's queries and keys, 6; and fewer still of its gradients."""

    def count(fuses):
        model = build("llama", fuses)
        with Operations() as forward:
            logits = model(input_ids=IDS).logits
        with Operations() as backward:
            logits.sum().backward()
        return forward.names["all"], backward.names["all"]

    plain, fused = count(False), count(True)
    layers = SIZES["num_hidden_layers"]
    assert plain[0] - fused[0] == 4 * layers
    assert plain[1] - fused[1] >= 6 * layers


def test_answers_with_a_cache_are_those_of_transformers():
    answers = [
        build("llama", fuses).generate(input_ids=IDS[:, :5], max_new_tokens=8, do_sample=False)
        for fuses in (False, True)
    ]
    assert torch.equal(*answers)


def test_a_copy_of_a_model_reads_its_own_weights_and_other_models_are_left_alone():
    model = build("llama", True)
    other = copy.deepcopy(model)
    before = other(input_ids=IDS).logits
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()
    assert torch.equal(other(input_ids=IDS).logits, before)
    assert not torch.allclose(model(input_ids=IDS).logits, before)
    assert not fused_layers(build("llama", False))


def test_a_rotation_with_other_arguments_is_left_alone():
    layer = GlmAsrAttention(GlmAsrEncoderConfig(hidden_size=8, num_attention_heads=2), 0)
    fuse_rotary(layer)
    assert not fused_layers(layer)


def test_positions_with_gradients_get_them():
    attention = Turned()
    fuse_rotary(attention)
    query, key, cos, sin = states(torch.float32)
    attention(query, key, cos.requires_grad_(), sin)[0].sum().backward()
    assert cos.grad.norm() > 0
