"""Number types: fused norms and LoRA layers, bf16 with fp32 adapters, fp32 weights in full
fine-tuning, 4-bit bases.
"""

import copy
import importlib.util
from dataclasses import replace

import pytest
import torch
from conftest import SIZES_OF_A_MODEL, change_recipe, run_stage
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.fused import fuse_lora, fuse_norms
from tbpo_cli.model.load import load_policy
from tbpo_cli.model.scoring import Scorer

CPU = torch.device("cpu")


def lora_layer(dtype, dropout, bias):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20, bias=bias)).to(dtype)
    model = get_peft_model(
        base, LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=["0"])
    )
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_fused_layer_is_pefts_layer(dtype, dropout, bias):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 7, 12, generator=generator).to(dtype)
    weights = torch.randn(2, 7, 20, generator=generator)
    found = []
    for fused in (False, True):
        model, x = lora_layer(dtype, dropout, bias), rows.clone().requires_grad_()
        if fused:
            fuse_lora(model)
            assert "forward" in vars(model.base_model.model[0])
        torch.manual_seed(2)  # the same tokens are dropped
        y = model(x)
        parameters = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in parameters} == {torch.float32} and y.dtype == dtype
        gradients = torch.autograd.grad((y.float() * weights).sum(), [x, *parameters])
        with model.disable_adapter():
            plain = model(x)
        found.append([y, plain, *gradients])
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    for got, want in zip(found[1], found[0], strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() <= tolerance * want.norm()


def test_a_fused_norm_is_computed_outside_of_autocast(monkeypatch):
    """On a GPU, autocast computes `rms_norm` in fp32 from torch 2.12 on; in bf16 it adds up in fp32
    as it is.
    """
    norm = nn.Module()
    norm.inner = LlamaRMSNorm(8).bfloat16()
    fuse_norms(norm)
    own, seen = torch.nn.functional.rms_norm, []

    def noted(*arguments):
        seen.append(torch.is_autocast_enabled("cpu"))
        return own(*arguments)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", noted)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm.inner(torch.ones(2, 8, dtype=torch.bfloat16))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] and found.dtype == torch.bfloat16


def test_a_frozen_input_and_frozen_weights_get_no_gradient():
    model = lora_layer(torch.float32, 0.0, True)
    fuse_lora(model)
    model(torch.ones(3, 12)).sum().backward()
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None} == {
        "lora_A",
        "lora_B",
    }


@pytest.mark.parametrize(
    ("lora", "weights", "autocast"),
    [(True, torch.bfloat16, None), (False, torch.float32, torch.bfloat16)],
    ids=["lora", "full"],
)
def test_bf16_computes_in_bf16_and_trains_fp32(recipe_file, tmp_path, lora, weights, autocast):
    without = {} if lora else {"lora": None}
    change_recipe(recipe_file, model={"dtype": "bfloat16", **without})
    policy = load_policy(load_recipe(recipe_file), CPU, None, with_reference=True)
    assert {p.dtype for p in policy.trained.values()} == {torch.float32}
    assert (
        policy.model.get_output_embeddings().weight.dtype == weights and policy.autocast == autocast
    )
    run = run_stage(
        "align", recipe_file, tmp_path / "bf16", "model.lora.dropout=0.0" if lora else "run.seed=0"
    )
    change_recipe(recipe_file, model={"dtype": "float32"})
    exact = run_stage(
        "align", recipe_file, tmp_path / "fp32", "model.lora.dropout=0.0" if lora else "run.seed=0"
    )
    for got, want in zip(evaluations(run), evaluations(exact), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], abs=2e-3) and got["kl"] == pytest.approx(
            want["kl"], abs=2e-3
        )
        assert got["logps_chosen"] == pytest.approx(want["logps_chosen"], abs=0.03)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(("dtype", "is_exact"), [("bfloat16", False), ("float32", True)])
def test_products_are_exact_in_fp32_alone_whatever_the_weights_are_kept_in(
    recipe_file, lora, dtype, is_exact
):
    without = {} if lora else {"lora": None}
    change_recipe(recipe_file, model={"dtype": dtype, **without})
    policy = load_policy(load_recipe(recipe_file), CPU, None, with_reference=True)
    assert Scorer.of(policy).is_exact == is_exact
    half = not (lora or is_exact)  # an adapter's base has the dtype already
    assert policy.autocast == (torch.bfloat16 if half else None)


def evaluations(run):
    from tbpo_cli.train.metrics import read_metrics

    return [line for line in read_metrics(run / "align/metrics.jsonl") if line["split"] == "eval"]


def test_policy_and_reference_start_with_the_same_numbers_in_bf16(recipe_file):
    """LoRA's B is zero, and full fine-tuning computes both models in the same way: log-ratios are
    zero, not nearly.
    """
    from test_layouts import LENGTHS

    from tbpo_cli.batch.layouts import collate
    from tbpo_cli.data.tokens import TokenizedPair

    ids = [list(range(n, n + 20)) for n in (5, 50, 100)]
    pairs = [
        TokenizedPair("", *(own[:n] for own, n in zip(ids, lengths, strict=True)))
        for lengths in LENGTHS
    ]
    recipe = load_recipe(recipe_file, ("model.dtype=bfloat16",))
    for one in (recipe, replace(recipe, model=replace(recipe.model, lora=None))):
        policy = load_policy(one, CPU, None, with_reference=True)
        policy.model.eval()
        for frozen in policy.frozen.values():  # its layers are not kept in fp32
            narrow = {p.dtype for name, p in frozen.named_parameters() if "proj" in name}
            assert narrow == {torch.bfloat16}
            assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
        scores = Scorer.of(policy).score(collate(pairs, "padded"), frozenset({"log_ratio"}))
        assert scores.chosen.log_ratio.abs().max() == 0 == scores.rejected.log_ratio.abs().max()


def test_quantization_is_for_lora_on_a_pretrained_base(recipe_file):
    for overrides in (("model.initial_weights=random",), ()):
        if not overrides:
            change_recipe(recipe_file, model={"lora": None})
        with pytest.raises(TbpoError, match="quantization"):
            load_recipe(recipe_file, ("model.quantization=nf4", *overrides))


def test_without_bitsandbytes_4_bit_weights_name_the_command_that_installs_it(
    recipe_file, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(TbpoError, match=r"pip install 'tbpo\[quantization\]'"):
        load_policy(
            load_recipe(recipe_file, ("model.quantization=nf4",)), torch.device("cuda"), None, True
        )


def test_4_bit_weights_are_refused_on_a_cpu(recipe_file):
    """There, bitsandbytes packs a layer for inference as soon as the reference is asked, without
    a gradient.
    """
    with pytest.raises(TbpoError, match="need a GPU"):
        load_policy(
            load_recipe(recipe_file, ("model.quantization=nf4",)), CPU, None, with_reference=True
        )


TINY = SIZES_OF_A_MODEL | {"initializer_range": 0.2}
NORMS = {
    "llama": True,
    "qwen2": True,
    "qwen3": True,
    "mistral": True,
    "phi3": True,
    "gemma2": False,
    "gpt2": False,
}


@pytest.mark.parametrize("kind", NORMS)
def test_a_model_with_fused_norms_is_transformers_model(kind):
    """Logits and gradients: the same in fp32, and in bf16 as close to those. Gemma's weight of 1
    + w is left alone.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 4} if kind == "gpt2" else TINY
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight, 1.0, 0.3)

    def distance(
        fused: bool, dtype: torch.dtype, to: list[Tensor] | None = None
    ) -> tuple[list[Tensor], float]:
        """Logits and gradients, and the larger relative distance of the two to others."""
        other = copy.deepcopy(model).to(dtype)
        if fused:
            fuse_norms(other)
            norms = [module for module in other.modules() if "Norm" in type(module).__name__]
            assert len(norms) > 4 and {"forward" in vars(norm) for norm in norms} == {NORMS[kind]}
        logits = other(input_ids=torch.arange(1, 41).view(2, 20)).logits
        assert logits.dtype == dtype
        gradients = torch.autograd.grad(logits.float().square().mean(), list(other.parameters()))
        found = [logits.detach().float(), torch.cat([each.float().flatten() for each in gradients])]
        pairs = zip(found, to or found, strict=True)
        return found, max(float((got - want).norm() / want.norm()) for got, want in pairs)

    exact, _ = distance(False, torch.float32)
    assert distance(True, torch.float32, exact)[1] < 1e-5
    assert (
        distance(True, torch.bfloat16, exact)[1]
        < 1.2 * distance(False, torch.bfloat16, exact)[1] + 1e-9
    )


def test_a_fused_norm_keeps_its_type_under_autocast_and_beside_wider_weights():
    norm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).model.norm
    x, plain = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), copy.deepcopy(norm)
    fuse_norms(norm)
    for states in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(states).dtype == plain(states).dtype
            torch.testing.assert_close(norm(states), plain(states))


def test_a_copy_of_a_model_with_fused_norms_reads_its_own_weights():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    fuse_norms(model)
    other, ids = copy.deepcopy(model), torch.arange(1, 9)[None]
    before = other(input_ids=ids).logits
    model.model.norm.weight.data.zero_()
    assert (
        torch.equal(other(input_ids=ids).logits, before) and not model(input_ids=ids).logits.any()
    )
