"""LoRA layers that read one input, computed together: peft's own numbers, in fewer passes."""

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from conftest import SIZES_OF_A_MODEL
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from tbpo_cli.model.fused import cast_once, fuse_lora

SIZES = SIZES_OF_A_MODEL | {"initializer_range": 0.2}
IDS = torch.arange(1, 41).view(2, 20)
TARGETS = {"all": "all-linear", "some": ["q_proj", "v_proj", "up_proj"], "one": ["k_proj"]}


def adapted(kind="llama", fuses=True, targets="all", **options):
    """A small model with an adapter that does something; the same in each call."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS[targets], **options)
    model = get_peft_model(base, config)
    disturb(model)
    if fuses:
        fuse_lora(model)
    return model.eval()


def disturb(model):
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)


def in_half(model):
    """The base in bf16, the adapters in fp32, as on a GPU."""
    for name, weight in model.named_parameters():
        if "lora" not in name:
            weight.data = weight.data.bfloat16()
    return model


def found(model):
    """Logits and the gradients of all that is trained, by name."""
    model.zero_grad()
    logits = model(input_ids=IDS.to(model.device)).logits
    logits.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_same(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (got[name] - value).norm() <= tolerance * value.norm(), name


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names["products"] += name in ("mm", "addmm", "addmm_")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"])
def test_an_adapted_model_is_pefts_model(kind, targets):
    if kind == "phi3" and targets != "all":
        return  # its layers have other names
    want = found(adapted(kind, False, targets))
    got = found(adapted(kind, True, targets))
    assert_same(got, want)
    assert (got["logits"] - want["logits"]).norm() <= 1e-6 * want["logits"].norm()


def test_ranks_and_scalings_may_differ_between_the_layers():
    options = {"rank_pattern": {"q_proj": 5, "up_proj": 1}, "alpha_pattern": {"v_proj": 11}}
    assert_same(found(adapted(**options)), found(adapted(fuses=False, **options)))


def test_activation_checkpointing_computes_the_same():
    model = adapted().train()
    want = found(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert_same(found(model), want)


def test_dropout_is_drawn_for_each_layer():
    results = []
    for fuses in (False, True):
        model = adapted(fuses=fuses, lora_dropout=0.4).train()
        torch.manual_seed(1)
        results.append(found(model))
    assert_same(*results)


def test_a_model_in_bf16_is_as_near_to_fp32_as_pefts():
    exact = found(adapted(fuses=False))

    def distances(fuses):
        result = found(in_half(adapted(fuses=fuses)))
        assert result["logits"].dtype == torch.bfloat16
        return {
            name: float((result[name] - value).norm() / value.norm())
            for name, value in exact.items()
        }

    plain = distances(False)
    fused = distances(True)
    assert sum(fused.values()) < 1.1 * sum(plain.values())
    assert max(fused.values()) < 1.3 * max(plain.values())


def test_gradients_are_those_of_finite_differences():
    """Of layers with a common input in float64, and of one that has dropout's mask of its own."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(4, 3)
            self.k_proj = nn.Linear(4, 2, bias=False)
            self.v_proj = nn.Linear(4, 2)

        def forward(self, x):
            return torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x).sin()), dim=-1)

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(nn.Sequential(Attention()), config).double()
    disturb(model)
    fuse_lora(model)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(2, 3, 4, dtype=torch.float64)

    def compute(x, *values):
        named = dict(zip(weights, values, strict=True))
        return torch.func.functional_call(model, named, (x,))

    leaves = [each.clone().requires_grad_() for each in (x, *weights.values())]
    assert torch.autograd.gradcheck(compute, leaves)


def test_the_products_of_a_common_input_are_made_once():
    """A layer's 7 products with A become 4: forward, for their gradients, and for that of x."""

    def count(fuses):
        model = adapted(fuses=fuses)
        with Products() as seen:
            found(model)
        return seen.names["products"]

    without = 2  # the first layer's q, k, v: the gradient of the embeddings, which are frozen
    assert count(True) == count(False) - 3 * 3 * SIZES["num_hidden_layers"] + without


def test_views_are_those_of_peft():
    """Another adapter, none, and one that is merged."""

    def views(fuses):
        model = adapted(fuses=False)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
        disturb(model)
        if fuses:
            fuse_lora(model)
        results = {"first": found(model)["logits"]}
        model.set_adapter("other")
        results["other"] = found(model)["logits"]
        with model.disable_adapter():
            results["none"] = model(input_ids=IDS).logits.detach()
        model.merge_adapter()
        results["merged"] = model(input_ids=IDS).logits.detach()
        model.unmerge_adapter()
        model.base_model.set_adapter(["default", "other"])
        results["both"] = model(input_ids=IDS).logits.detach()
        return results

    got = views(True)
    assert_same(got, views(False))
    different = [got[name].sum().item() for name in ("first", "other", "none", "both")]
    assert len({round(value, 3) for value in different}) == 4


def test_answers_with_a_cache_are_those_of_peft():
    answers = [
        adapted(fuses=fuses).generate(input_ids=IDS[:, :5], max_new_tokens=8, do_sample=False)
        for fuses in (False, True)
    ]
    assert torch.equal(*answers)


class Parts(nn.Module):
    """An attention whose layers have several inputs, or of which one is left out."""

    def __init__(self, reads):
        super().__init__()
        self.q_proj = nn.Linear(4, 3)
        self.k_proj = nn.Linear(4, 3)
        self.v_proj = nn.Linear(4, 3)
        self.reads = reads

    def forward(self, x):
        return self.reads(self, x)


PARTS = {
    "left out": lambda self, x: self.k_proj(x) * self.q_proj(x),
    "several inputs": lambda self, x: self.q_proj(x) * self.k_proj(x.sin()) * self.v_proj(x.cos()),
    "twice": lambda self, x: self.q_proj(x) * self.q_proj(x) * self.k_proj(x) * self.v_proj(x),
}


@pytest.mark.parametrize("reads", PARTS)
def test_layers_that_do_not_all_read_one_input_are_pefts_as_well(reads):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(nn.Sequential(Parts(PARTS[reads])), config)
    disturb(model)
    x = torch.randn(2, 5, 4, requires_grad=True)

    def passes(model):
        """Two passes, of which the first shows what is read."""
        results = []
        for _ in range(2):
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            results.append({"y": y.detach(), "x": x.grad.clone(), **grads})
            x.grad = None
        return results

    want = passes(copy.deepcopy(model))
    fuse_lora(model)
    for got, each in zip(passes(model), want, strict=True):
        assert_same(got, each)
    if reads == "left out":
        with Products() as seen:
            model(x)
        assert seen.names["products"] == 2 * 3, "nothing is computed for the layer that is left out"


def test_nothing_of_a_pass_that_fails_is_kept():
    """As of one that runs out of memory: what it has kept would be held until the next."""

    def fails(self, x):
        self.q_proj(x)
        raise MemoryError

    model = get_peft_model(
        nn.Sequential(Parts(fails)), LoraConfig(r=2, target_modules=["q_proj", "k_proj"])
    )
    fuse_lora(model)
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(MemoryError):
        model(states := x * 2)
    kept = weakref.ref(states)
    del states
    gc.collect()
    assert kept() is None


def test_a_copy_of_an_adapted_model_reads_its_own_weights():
    model = adapted()
    other = copy.deepcopy(model)
    before = other(input_ids=IDS).logits
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    assert torch.equal(other(input_ids=IDS).logits, before)
    assert not torch.allclose(model(input_ids=IDS).logits, before)


def test_a_pass_keeps_no_more_than_with_layers_of_their_own():
    """Bytes kept for the backward pass, beside the weights: once for each input."""

    def kept(fuses):
        model = adapted(fuses=fuses)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(input_ids=IDS).logits
        del logits
        return sum(sizes.values())

    # Beside them, the A of common inputs stand once more, in one tensor.
    rows = SIZES["num_hidden_layers"] * 5 * 3 * SIZES["hidden_size"] * 4
    assert kept(True) <= kept(False) + rows


@pytest.mark.parametrize("way", ["plain", "dropout", "checkpointing"])
def test_copies_that_are_made_once_are_what_each_pass_casts(way):
    def passes(number):
        torch.manual_seed(number)
        return found(model)

    model = adapted(fuses=False, lora_dropout=0.3 if way == "dropout" else 0.0)
    groups = fuse_lora(in_half(model))
    model.train(way != "plain")
    if way == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    want = [passes(0), passes(1)]
    with cast_once(groups):
        got = [passes(0), passes(1)]
    for each, other in zip(got, want, strict=True):
        assert_same(each, other, 0)
    assert (want[0]["logits"] != want[1]["logits"]).any() == (way == "dropout")

    disturb(model)
    changed = passes(0)
    with cast_once(groups):
        assert_same(passes(0), changed, 0)
    assert (changed["logits"] != got[0]["logits"]).any()


def test_within_a_step_nothing_casts_an_adapter_again():
    class Casts(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function.overloadpacket.__name__ in ("_to_copy", "cat"):
                self.number += 3 in result.shape  # r
            return result

    model = adapted(fuses=False)
    groups = fuse_lora(in_half(model))
    with torch.no_grad(), Casts() as seen:
        model(input_ids=IDS)
        each_pass = seen.number
        with cast_once(groups):
            model(input_ids=IDS)
            model(input_ids=IDS)
    num_matrices = 2 * 7 * SIZES["num_hidden_layers"]
    assert each_pass > num_matrices / 2
    assert seen.number == each_pass


def test_another_adapter_does_not_read_the_copies_of_the_first():
    model = adapted(fuses=False)
    model.add_adapter("other", LoraConfig(r=3, target_modules=TARGETS["some"]))
    disturb(model)
    groups = fuse_lora(in_half(model))

    def views():
        model.set_adapter("other")
        other = found(model)["logits"]
        with model.disable_adapter():
            base = model(input_ids=IDS).logits.detach()
        model.set_adapter("default")
        return {"other": other, "base": base, "first": found(model)["logits"]}

    want = views()
    with cast_once(groups):
        got = views()
    assert_same(got, want, 0)
    assert len({value.sum().item() for value in got.values()}) == 3
