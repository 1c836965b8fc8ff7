"""Of sharded weights each process reads its own rows from the files, and computes the same."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_loading import change_weights, make
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import initialization as init

from tbpo_cli.config.recipe import Lora, Model, load_recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.base import load_base
from tbpo_cli.model.load import add_helper, load_policy
from tbpo_cli.model.policy import REFERENCE, Policy
from tbpo_cli.model.shapes import policy_of_shapes
from tbpo_cli.model.sharding import Shards, gathered, save_gathered

CPU = torch.device("cpu")
IDS = torch.arange(5, 25)[None]
WHOLE = "each process loads all weights before it keeps its part"


def load(folder, mesh=None, dtype=torch.float32, **model):
    shards = None if mesh is None else Shards(mesh)
    return load_base(Model(base=str(folder), **model), str(folder), CPU, dtype, shards)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_same(sharded, whole):
    assert torch.equal(logits(sharded), logits(whole))
    state = whole.state_dict()
    for name, tensor in sharded.state_dict().items():
        assert torch.equal(gathered(tensor), state[name]) and tensor.dtype == state[name].dtype
    for (name, mine), theirs in zip(sharded.named_buffers(), whole.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    assert sharded.generation_config.to_dict() == whole.generation_config.to_dict()
    assert sharded.config.to_dict() == whole.config.to_dict()


LATENT = {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "num_key_value_heads": 4}
MIXER = {"mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 4}),
        ("gptj", {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
        ("mistral", {}),
        ("gemma2", {}),
        ("falcon_h1", {"ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9], **MIXER}),
        ("zamba", {"num_hidden_layers": 5, "attn_layer_offset": 1, "attn_layer_period": 2}),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_rows_from_the_files_and_what_no_file_holds_make_the_same_model(
    tmp_path, mesh, capsys, kind, settings, dtype
):
    """In one file, and in several; tied heads, rotary frequencies and other buffers."""
    for size in ("1GB", "3KB"):
        model = make(kind, **settings)
        model.generation_config.update(eos_token_id=5, do_sample=True, temperature=0.6)
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        found, whole = (load(tmp_path / size, one, dtype) for one in (mesh, None))
        assert_same(found, whole)
    assert len([*(tmp_path / "3KB").glob("*.safetensors")]) > 1
    assert WHOLE not in capsys.readouterr().err


def untied_with_two_heads(folder):
    """A config that ties the head, and files that have another one."""
    make("llama", tie_word_embeddings=True).save_pretrained(folder)
    embeddings = "model.embed_tokens.weight"
    change_weights(folder, lambda t: t.update({"lm_head.weight": t[embeddings].flip(0)}))


def of_a_mixture(folder):
    """transformers puts the experts of a layer together as it loads them."""
    make("mixtral", num_local_experts=4).save_pretrained(folder)


def with_other_names(folder):
    """transformers gives weights other names as it loads them."""
    make("gpt_neox").save_pretrained(folder)


def of_the_body_alone(folder):
    """Names without the prefix of the model with a head: those of its body alone."""
    make("llama", tie_word_embeddings=True).model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (untied_with_two_heads, "or of another shape"),
        (of_a_mixture, "transformers converts its weights"),
        (with_other_names, "transformers converts its weights"),
        (of_the_body_alone, None),
    ],
)
def test_where_transformers_changes_weights_it_loads_them_and_that_is_said(
    tmp_path, mesh, capsys, write, reason
):
    write(tmp_path)
    found = load(tmp_path, mesh)
    said = capsys.readouterr().err
    assert (WHOLE in said) == (reason is not None) and (reason or "") in said
    assert_same(found, load(tmp_path))


class NormedConfig(LlamaConfig):
    """Of a model with a buffer that no file holds, and that is made of its weights."""

    model_type = "normed"


class NormedModel(LlamaForCausalLM):
    config_class = NormedConfig

    def __init__(self, config):
        super().__init__(config)
        start = self.lm_head.weight.sum() if config.starts_with_weights else torch.zeros(())
        self.register_buffer("total", start, persistent=False)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            init.copy_(self.total, self.lm_head.weight.sum())

    def forward(self, *args, **inputs):
        output = super().forward(*args, **inputs)
        output.logits = output.logits * self.total
        return output


AutoConfig.register("normed", NormedConfig)
AutoModelForCausalLM.register(NormedConfig, NormedModel)


@pytest.mark.parametrize("starts_with_weights", [True, False])
def test_what_is_made_of_weights_is_not_made_up(tmp_path, mesh, capsys, starts_with_weights):
    """Then each process loads the whole model."""
    make("normed", starts_with_weights=starts_with_weights).save_pretrained(tmp_path)
    found, whole = load(tmp_path, mesh), load(tmp_path)
    said = capsys.readouterr().err
    assert WHOLE in said and ("total" in said or "cannot be built without" in said)
    assert found.total == whole.lm_head.weight.sum() != 0
    assert_same(found, whole)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop("lm_head.weight"), "it lacks lm_head.weight"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(62, 16)}), "in another shape lm_head"),
        (lambda t: t["lm_head.weight"].fill_(torch.nan), "no numbers"),
    ],
)
def test_what_is_refused_unsharded_is_refused_sharded(tmp_path, mesh, change, what):
    """More rows than the model has would else be cut off without a word."""
    make("llama").save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(TbpoError, match=what):
        load(tmp_path, mesh)


def test_a_damaged_file_is_a_message(tmp_path, mesh):
    make("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TbpoError, match="copy them again"):
        load(tmp_path, mesh)


def test_frozen_weights_of_which_some_are_kept_in_fp32_are_sharded(tmp_path, mesh):
    """FSDP takes no weights of several dtypes that are trained: such are the routers of experts."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    make("deepseek_v2", first_k_dense_replace=0, **experts, **LATENT).save_pretrained(tmp_path)
    found, whole = (load(tmp_path, one, torch.bfloat16) for one in (mesh, None))
    assert {weight.dtype for weight in found.parameters()} == {torch.float32, torch.bfloat16}
    assert_same(found, whole)


@pytest.mark.parametrize("copies", [None, ["lm_head"]])
def test_an_adapter_stands_on_a_sharded_base_as_on_a_whole_one(recipe_file, tmp_path, mesh, copies):
    """An adapter that brings a copy of the head, which is sharded with the base, as well."""
    make("llama").save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=copies, task_type="CAUSAL_LM")
    adapted = get_peft_model(make("llama"), config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    model = Model(base=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), lora=Lora())
    recipe = replace(load_recipe(recipe_file), model=model)
    policy, sharded = (
        load_policy(recipe, CPU, None, with_reference=True, mesh=one) for one in (None, mesh)
    )
    assert sharded.is_sharded and not policy.is_sharded
    assert sharded.trained.keys() == policy.trained.keys()
    assert torch.equal(logits(sharded.model), logits(policy.model))
    for view in policy.views:
        with policy.view(view) as whole, sharded.view(view) as found:
            assert torch.equal(logits(found), logits(whole))
    saved = [
        {path.name: path.read_bytes() for path in each.save(tmp_path / name)}
        for name, each in (("whole", policy), ("sharded", sharded))
    ]
    assert saved[0].keys() == saved[1].keys()
    weights = "adapter_model.safetensors"
    assert saved[0][weights] == saved[1][weights]


@pytest.mark.parametrize("copies", [None, ["lm_head"]])
def test_a_helper_stands_on_a_sharded_base_unless_it_copies_its_layers(
    recipe_file, tmp_path, mesh, copies
):
    make("llama").save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=copies, task_type="CAUSAL_LM")
    get_peft_model(make("llama"), config).save_pretrained(tmp_path / "helper")
    model = Model(base=str(tmp_path / "base"), lora=Lora())
    recipe = replace(load_recipe(recipe_file), model=model)
    policy = load_policy(recipe, CPU, None, with_reference=True, mesh=mesh)
    if copies:
        with pytest.raises(TbpoError, match='sharding = "ddp"'):
            add_helper(policy, "positive", str(tmp_path / "helper"), model, CPU, mesh=mesh)
    else:
        add_helper(policy, "positive", str(tmp_path / "helper"), model, CPU, mesh=mesh)
        with policy.view("positive") as helper:
            assert torch.equal(logits(helper), logits(load(tmp_path / "base")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {}),
        ("mixtral", {"num_local_experts": 4}),
    ],
)
def test_a_sharded_model_is_saved_with_the_bytes_of_a_whole_one(
    tmp_path, mesh, kind, settings, dtype
):
    """In the dtype of the base, with its habits; of experts, with the names of the checkpoint."""
    base = make(kind, **settings).to(dtype)
    base.generation_config.update(eos_token_id=5, do_sample=True, temperature=0.6)
    base.save_pretrained(tmp_path / "base")
    contents = []
    for one in (mesh, None):
        policy = Policy(load(tmp_path / "base", one))
        folder = tmp_path / f"saved-{policy.is_sharded}"
        files = policy.save(folder, end_ids=(7, 5))
        contents.append({path.name: path.read_bytes() for path in files})
    assert contents[0].keys() == contents[1].keys()
    weights = [each.pop("model.safetensors") for each in contents]
    assert contents[0] == contents[1], "config and generation config"
    assert weights[0] == weights[1]


def test_a_sharded_model_is_saved_a_file_at_a_time(tmp_path, mesh):
    base = make("llama", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    base.config.save_pretrained(tmp_path)
    save_gathered(load(tmp_path / "base", mesh), tmp_path, torch.float32, True, "5KB")
    sizes = [path.stat().st_size for path in tmp_path.glob("model-*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 8000
    found, whole = load(tmp_path), load(tmp_path / "base")
    assert torch.equal(logits(found), logits(whole))
    assert found.state_dict().keys() == whole.state_dict().keys()


MEMORY = """
import json
import sys
import threading
import time
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tbpo_cli.config.recipe import Model
from tbpo_cli.model.base import load_base
from tbpo_cli.model.sharding import Shards
rank, store, folder, how = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
shards = Shards(init_device_mesh("cpu", (2,))) if how == "sharded" else None
peak, done = 0, False
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
load = lambda name, shards: load_base(
    Model(base=name), name, torch.device("cpu"), torch.float32, shards)
load(folder + "/small", shards)  # what the libraries take
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = load(folder + "/large", shards)
done = True
thread.join()
tensors = {id(p): getattr(p, "to_local", lambda: p)() for p in model.parameters()}
own = sum(each.nbytes for each in tensors.values())
whole = sum(p.nbytes for p in model.parameters())
with torch.no_grad():
    logits = model(input_ids=torch.arange(9)[None] + int(rank)).logits.sum().item()
print(json.dumps({"rise": peak - before, "own": own, "whole": whole, "logits": logits}))
"""


def test_no_process_ever_has_memory_for_the_whole_model(tmp_path):
    """Of 140 MB each of two processes has a half, and gathers a layer of 9 MB at a time for the
    check of the loaded model. The files, in bf16, are mapped: their pages are not counted.
    """
    freed_at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc keeps it otherwise
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    make("llama").save_pretrained(tmp_path / "small")
    large = make("llama", **sizes, vocab_size=2000, num_hidden_layers=14).to(torch.bfloat16)
    large.save_pretrained(tmp_path / "large")
    found = {}
    for how in ("sharded", "whole"):
        both = [
            subprocess.Popen(
                [sys.executable, "-c", MEMORY, str(rank), tmp_path / how, str(tmp_path), how],
                env=freed_at_once,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        ends = [process.communicate(timeout=200)[0] for process in both]
        found[how] = [json.loads(end.splitlines()[-1]) for end in ends]
    for mine, whole in zip(found["sharded"], found["whole"], strict=True):
        assert mine["logits"] == whole["logits"]
        assert mine["own"] <= 0.51 * mine["whole"] and whole["own"] == whole["whole"]
        assert mine["rise"] < 0.85 * mine["whole"] and whole["rise"] > 0.95 * whole["whole"], found
    assert found["sharded"][0]["logits"] != found["sharded"][1]["logits"]


def test_shapes_of_an_adapter_that_exists_are_known_without_its_numbers(recipe_file, tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(make("llama"), config).save_pretrained(tmp_path / "adapter")
    model = Model(base=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"), lora=Lora())
    recipe = replace(load_recipe(recipe_file), model=model)
    policy = policy_of_shapes(recipe, recipe.align.loss, CPU, after_sft=False)
    assert {weight.device.type for weight in policy.model.parameters()} == {"meta"}
    assert REFERENCE in policy.adapters
