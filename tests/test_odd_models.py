"""Models, adapters and checkpoints with something unusual: the right values, or a true reason."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_loading import TINY as OTHERS
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from tbpo_cli.config.recipe import Lora, Model, Sample
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.adapters import continued_adapter, new_adapter
from tbpo_cli.model.base import load_base
from tbpo_cli.model.generate import completions
from tbpo_cli.model.merge import merge_adapter
from tbpo_cli.model.policy import POLICY, Policy
from tbpo_cli.model.targets import without_adapter

CPU = torch.device("cpu")
TINY = OTHERS | {"max_position_embeddings": 16, "initializer_range": 0.5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LONG = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.0],
        "long_factor": [2.0, 9.0],
    },
}


def make(kind, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY | settings)).eval()


def load(folder):
    return load_base(Model(base=str(folder)), str(folder), CPU, torch.float32)


def greedy(model, prompt, count):
    """Token by token, each by a pass over the whole sequence."""
    ids, logp = list(prompt), 0.0
    for _ in range(count):
        with torch.no_grad():
            logps = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        ids.append(int(logps.argmax()))
        logp += float(logps.max())
    return ids[len(prompt) :], logp


@pytest.mark.parametrize("rope", LONG)
def test_samples_past_the_length_of_scaled_positions_are_those_of_passes_over_all_tokens(rope):
    settings = {"rope_parameters": LONG[rope]}
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12], [*range(5, 25)], [*range(20, 45)], [3, 4]]
    sample = Sample(temperature=0.0, max_new_tokens=24, batch_size=4)
    model = make("llama", **settings)
    model(torch.ones(1, 50, dtype=torch.long))  # leaves the frequencies of its length behind
    found = {}
    for batch in completions(model, prompts, range(5), sample, [60]):
        found |= dict(batch)
    for place, prompt in enumerate(prompts):
        count = len(found[place].token_ids)
        ids, logp = greedy(make("llama", **settings), prompt, count)
        assert list(found[place].token_ids) == ids
        assert found[place].logp == pytest.approx(logp, abs=1e-3)
    # What is scored next has the frequencies of its own length.
    again = torch.tensor([[*range(2, 18)]])
    want = make("llama", **settings)(again).logits
    torch.testing.assert_close(model(again).logits, want)


def test_a_base_that_returns_router_logits_is_sampled_and_saved_as_it_was(tmp_path):
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    make("mixtral", output_router_logits=True, **sizes).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    prompts, sample = [[5, 6, 7], [8, 9]], Sample(temperature=0.0, max_new_tokens=5, batch_size=2)
    found = {}
    for batch in completions(model, prompts, [1, 2], sample, [60]):
        found |= dict(batch)
    plain = make("mixtral", **sizes)
    for place, prompt in enumerate(prompts):
        ids = list(found[place].token_ids)
        assert ids == greedy(plain, prompt, len(ids))[0]
    Policy(model).save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["output_router_logits"] is True
    assert model.config.output_router_logits is False


def adapted_layers(model):
    return {name.split(".lora_A")[0] for name, _ in model.named_modules() if "lora_A." in name}


def test_lora_by_default_is_on_shared_experts_and_is_loaded_back(tmp_path):
    settings = EXPERTS | {"shared_expert_intermediate_size": 8}
    policy = new_adapter(make("qwen2_moe", **settings), Model(base="base", lora=Lora()))
    layers = {name.rpartition("layers.0.")[2] for name in adapted_layers(policy)}
    shared = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert shared < layers and not any("experts" in name for name in layers)
    assert without_adapter(policy) == [
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        "layers.mlp.shared_expert_gate",
    ]
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    policy.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("qwen2_moe", **settings), tmp_path).eval()
    ids = torch.arange(1, 12)[None]
    torch.testing.assert_close(loaded(ids).logits, policy.eval()(ids).logits)


def test_lora_by_default_leaves_shared_experts_out_where_peft_takes_them_for_fused_ones():
    kinds = {"layer_types": ["full_attention"] * 2, "shared_expert_intermediate_size": 8}
    policy = new_adapter(make("qwen3_next", **EXPERTS, **kinds), Model(base="base", lora=Lora()))
    assert {name.rpartition(".")[2] for name in adapted_layers(policy)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert "mlp.shared_expert.up_proj" in without_adapter(policy)
    assert not policy.peft_config[POLICY].target_parameters


def test_lora_by_default_is_on_the_feed_forward_layers_beside_convolutions():
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    policy = new_adapter(make("lfm2", **layers), Model(base="base", lora=Lora()))
    assert {"w1", "w2", "w3"} < {name.rpartition(".")[2] for name in adapted_layers(policy)}
    assert without_adapter(policy) == []


def test_a_weight_that_is_no_number_is_named(tmp_path):
    make("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        TbpoError, match=r"NaN.*: model\.layers\.1\.mlp\.up_proj\.weight\n"
    ) as error:
        load(tmp_path)
    assert "causal" not in error.value.what


def test_a_file_of_the_weights_that_is_missing_is_to_be_copied_and_not_converted(tmp_path):
    make("llama").save_pretrained(tmp_path, max_shard_size="5KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(TbpoError, match=shard.name) as error:
        load(tmp_path)
    assert "copy or download the model again" in error.value.fix
    assert "convert" not in error.value.fix


def test_an_encoder_with_a_decoder_is_refused_in_a_line(tmp_path):
    sizes = {"vocab_size": 61, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(TbpoError, match="T5Config") as error:
        load(tmp_path)
    assert len(error.value.what) < 250
    assert error.value.fix == "take a decoder: a causal language model"


def test_what_cannot_be_trained_by_its_kind_is_refused_before_weights_are_loaded(tmp_path):
    settings = {"is_decoder": True, "attn_layers": ["local"], "attention_head_size": 4}
    settings |= {"feed_forward_size": 24, "axial_pos_embds": False, "num_hidden_layers": 1}
    make("reformer", **settings).config.save_pretrained(tmp_path)
    shapes = Model(base=str(tmp_path), initial_weights="random")
    with torch.device("meta"), pytest.raises(TbpoError, match="cannot be trained: reformer"):
        load_base(shapes, str(tmp_path), torch.device("meta"), torch.float32)


def test_an_adapter_that_holds_biases_of_its_base_is_refused_by_the_name_of_the_key(tmp_path):
    make("llama", attention_bias=True).save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], bias="all"))
    torch.nn.init.ones_(base.model.layers[0].self_attn.k_proj.bias)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(TbpoError, match="bias = 'all'") as error:
        continued_adapter(
            load(tmp_path / "base"), tmp_path / "adapter", None, Model(base=str(tmp_path / "base"))
        )
    assert 'bias = "none"' in error.value.fix


def test_trained_tokens_of_tied_embeddings_are_not_merged_and_the_key_is_named(tmp_path):
    base = make("llama", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(TbpoError, match="trainable_token_indices") as error:
        merge_adapter(
            Model(base=str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged", "5GB"
        )
    assert error.value.fix.endswith("train one without trainable_token_indices")
