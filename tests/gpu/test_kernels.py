"""What the program computes by kernels of its own choice, against plain code in float64 or fp32."""

import copy

import pytest
import test_fused
import test_rotary
import torch
from devices import DEVICES, ON_GPU
from peft import LoraConfig, get_peft_model
from test_layouts import SEQUENCES, llama_attention, random_states
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tbpo_cli.batch.packing import segments_of
from tbpo_cli.core import oracle
from tbpo_cli.core.head import STATISTICS, Head, token_statistics
from tbpo_cli.model.attention import attend_by_sequence, describe_attention, in_one_kernel
from tbpo_cli.model.dropout import TokenDropout, TokenKeys
from tbpo_cli.model.fused import fuse_lora, fuse_norms

DTYPES = [torch.float32, torch.bfloat16]
DIFFERENTIABLE = ("logps", "log_ratio", "kl", "advantage")
N, H, V = 1_100, 64, 3_000  # more tokens than a chunk has


def near(found, wanted, tolerance):
    """Within a tolerance, as a share of the wanted tensor's norm."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    assert found.shape == wanted.shape and wanted.norm() > 0
    return float((found - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    "needs", [{"advantage"}, {"logps"}, {"log_ratio"}, {"kl", "log_ratio"}, STATISTICS]
)
def test_token_statistics_are_those_of_dense_logits(needs, trained, dtype, device):
    generator = torch.Generator().manual_seed(0)
    weight = (0.2 * torch.randn(V, H, generator=generator)).to(dtype)
    reference = torch.randn(N, H, generator=generator).to(dtype)
    policy = reference + (0.3 * torch.randn(N, H, generator=generator)).to(dtype)
    tokens = torch.randint(V, (N,), generator=generator)
    pull = torch.randn(len(DIFFERENTIABLE), N, generator=generator)

    def with_gradients(dense, device, to):
        inputs = [policy.to(device, to).requires_grad_()]
        inputs += [weight.to(device, to).requires_grad_(trained)]
        head, other = Head(inputs[1]), reference.to(device, to)
        if dense:
            logits = [states @ inputs[1].T for states in (inputs[0], other)]
            mask = torch.ones(1, N, dtype=torch.bool)
            scores = oracle.side_scores(
                logits[0][None], logits[1].detach()[None], tokens[None], mask
            )
        else:
            # A trained head's reference has another one, as that of a frozen copy.
            old = Head(weight.to(device, to)) if trained else head
            moved = tokens.to(device)
            scores = token_statistics(frozenset(needs), moved, inputs[0], head, other, old)
        values = {name: getattr(scores, name).reshape(-1) for name in needs}
        pulled = [
            (values[name] * pull[place].to(device, values[name].dtype)).sum()
            for place, name in enumerate(DIFFERENTIABLE)
            if name in needs
        ]
        leaves = [each for each in inputs if each.requires_grad]
        return values, torch.autograd.grad(torch.stack(pulled).sum(), leaves)

    found, gradients = with_gradients(False, device, dtype)
    wanted, true_gradients = with_gradients(True, "cpu", torch.float64)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4 if device == "cpu" else 5e-3
    for name, values in wanted.items():
        assert near(found[name], values, tolerance), name
    for gradient, true in zip(gradients, true_gradients, strict=True):
        assert near(gradient, true, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_fused_adapter_layer_is_pefts_layer(dtype, dropout, device):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(96, 160, bias=True)).to(device, dtype)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=["0"])
    model = get_peft_model(base, config)
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    x = torch.randn(2, 50, 96).to(device, dtype)
    pull = torch.randn(2, 50, 160).to(device)
    found = []
    for fuses in (False, True):
        if fuses:
            fuse_lora(model)
        rows = x.clone().requires_grad_()
        torch.manual_seed(1)
        y = model(rows)
        leaves = [rows, *(p for p in model.parameters() if p.requires_grad)]
        found.append([y, *torch.autograd.grad((y.float() * pull).sum(), leaves)])
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5 if device == "cpu" else 5e-3
    assert all(near(got, want, tolerance) for want, got in zip(*found, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["adapters", "positions"])
def test_a_fused_model_is_pefts_and_transformers_model(what, dtype, device):
    """Logits and gradients, of LoRA layers with a common input and of rotary positions."""
    values = {"adapters": test_fused.found, "positions": test_rotary.found}[what]

    def built(fuses):
        if what == "adapters":
            return test_fused.adapted(fuses=fuses)
        return test_rotary.build("llama", fuses)

    wanted = values(built(False))
    model = built(True).to(device)
    for weight in model.parameters():
        if what == "positions" or not weight.requires_grad:  # adapters are kept in fp32
            weight.data = weight.data.to(dtype)
    found = values(model)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5 if device == "cpu" else 5e-3
    assert found.keys() == wanted.keys()
    assert all(near(found[name], value, tolerance) for name, value in wanted.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fused_norm_is_transformers_norm(dtype, device):
    torch.manual_seed(0)
    holder = nn.Module()
    holder.norm = LlamaRMSNorm(96).to(device, dtype)
    nn.init.normal_(holder.norm.weight, 1.0, 0.3)
    plain = copy.deepcopy(holder.norm).cpu().double()
    fuse_norms(holder)
    x = torch.randn(50, 96).to(dtype)
    found, wanted = (
        [y, *torch.autograd.grad(y.double().square().sum(), [rows, norm.weight])]
        for norm, rows in (
            (holder.norm, x.to(device).requires_grad_()),
            (plain, x.double().requires_grad_()),
        )
        for y in [norm(rows)]
    )
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert all(near(got, want, tolerance) for got, want in zip(found, wanted, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_drops_the_same_everywhere(device):
    keys = torch.arange(1000).view(2, 500)

    def dropped(device):
        source = TokenKeys()
        source.set(keys.to(device), seed=3, step=7)
        return TokenDropout(0.25, 1, source).train()(torch.ones(2, 500, 16, device=device)).cpu()

    assert torch.equal(dropped(device), dropped("cpu"))


@pytest.mark.parametrize("device", [ON_GPU])  # a CPU has no such kernel
@pytest.mark.parametrize("kind", SEQUENCES)
def test_the_varlen_kernel_gives_the_numbers_of_a_call_for_each_sequence(kind, device):
    """Outputs and gradients in bf16, against fp32 on the CPU."""
    found = []
    for states in (
        random_states(SEQUENCES[kind]),
        random_states(SEQUENCES[kind], device, torch.bfloat16),
    ):
        if states[0].is_cuda:
            result = in_one_kernel(*states, segments_of(SEQUENCES[kind]).to(device), None)
        else:
            result, _ = attend_by_sequence(llama_attention(), *states, None, SEQUENCES[kind])
        gradients = torch.autograd.grad(result.float().square().sum(), states)
        found.append([each.detach().cpu().float() for each in (result, *gradients)])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("device", [ON_GPU])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_the_varlen_kernel_is_taken_with_grouped_heads_too(kv_heads, device):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_key_value_heads=kv_heads, num_hidden_layers=1, vocab_size=99)
    model = LlamaForCausalLM(config)
    how, why = describe_attention([model], torch.bfloat16, torch.device(device))
    assert (how, why) == ("one varlen kernel for all sequences of a row", "")
