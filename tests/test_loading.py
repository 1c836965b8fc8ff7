"""A base is loaded with all of its weights, and is causal; adapters fit it exactly."""

import json

import pytest
import torch
from conftest import SIZES_OF_A_MODEL
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM

from tbpo_cli.config.recipe import Model, Sample
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.adapters import continued_adapter
from tbpo_cli.model.base import load_base
from tbpo_cli.model.generate import completions
from tbpo_cli.model.heads import read_head
from tbpo_cli.model.layout import choose_layout
from tbpo_cli.model.load import add_helper
from tbpo_cli.model.merge import merge_adapter
from tbpo_cli.model.policy import Policy
from tbpo_cli.model.probes import check_causality, reads_padding
from tbpo_cli.model.targets import text_layers

CPU = torch.device("cpu")
TINY = SIZES_OF_A_MODEL | {"max_position_embeddings": 64}


def make(kind, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY | settings)).eval()


def load(folder):
    return load_base(Model(base=str(folder)), str(folder), CPU, torch.float32)


@pytest.fixture
def checkpoint(tmp_path):
    make("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


CHANGES = {
    "missing": (lambda t: t.pop("lm_head.weight"), "it lacks lm_head.weight"),
    "too many": (
        lambda t: t.update({"score.weight": torch.zeros(1, 16)}),
        "the architecture does not, score.weight",
    ),
    "of another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(8)}),
        "in another shape model.norm.weight",
    ),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_a_weight_that_is_not_in_its_place_is_named(checkpoint, fault):
    change, words = CHANGES[fault]
    change_weights(checkpoint, change)
    with pytest.raises(TbpoError, match=words):
        load(checkpoint)


def test_a_buffer_that_the_architecture_computes_may_be_in_the_checkpoint(checkpoint):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(checkpoint, lambda tensors: tensors.update({name: torch.ones(2)}))
    load(checkpoint)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    sizes = {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    config = BertConfig(**sizes, num_attention_heads=4, intermediate_size=24)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(TbpoError, match="the model is not causal"):
        load(tmp_path / "bert")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../llama/model.safetensors"])
def test_an_index_names_only_safetensors_beside_it(checkpoint, name):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TbpoError, match="the index of the weights names a file"):
        load(checkpoint)


def test_the_base_drops_nothing_in_training_and_lora_does(tmp_path):
    make("gpt2").save_pretrained(tmp_path / "gpt2")
    model = load(tmp_path / "gpt2")
    ids = torch.arange(1, 20)[None]
    want = model.eval()(input_ids=ids).logits
    Policy(model).train()
    torch.testing.assert_close(model(input_ids=ids).logits, want)
    adapted = get_peft_model(model, LoraConfig(lora_dropout=0.5, target_modules=["c_attn"]))
    Policy(adapted).train()
    dropouts = [m for name, m in adapted.named_modules() if name.endswith("lora_dropout.default")]
    assert dropouts and all(module.training for module in dropouts)
    with Policy(adapted).view("reference") as reference:
        assert not any(module.training for module in reference.modules())
    assert all(module.training for module in dropouts)


def save_adapter(base, folder, **settings):
    settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "r": 2} | settings
    get_peft_model(base, LoraConfig(**settings)).save_pretrained(folder)
    return folder


def test_an_adapter_that_finds_no_place_is_refused_with_the_names(checkpoint, tmp_path):
    adapter = save_adapter(load(checkpoint), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("layers.1", "layers.7"): each for name, each in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors", {"format": "pt"})
    model = Model(base=str(checkpoint))
    with pytest.raises(
        TbpoError, match=r"its file lacks .*layers\.1.*has no place for .*layers\.7"
    ):
        continued_adapter(load(checkpoint), adapter, None, model)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_changes_its_base_is_refused(checkpoint, tmp_path, start):
    adapter = save_adapter(load(checkpoint), tmp_path / "adapter", init_lora_weights=start)
    with pytest.raises(TbpoError, match="changes its base as it is loaded"):
        continued_adapter(load(checkpoint), adapter, None, Model(base=str(checkpoint)))


def test_an_adapter_with_tied_embeddings_is_loaded_and_saved(tmp_path):
    make("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    whole = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = save_adapter(load(tmp_path / "tied"), tmp_path / "adapter", **whole)
    model = Model(base=str(tmp_path / "tied"))
    policy = Policy(continued_adapter(load(tmp_path / "tied"), adapter, adapter, model))
    policy.save(tmp_path / "again")
    saved = [
        load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "again")
    ]
    for name, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][name], tensor)


def test_the_lists_of_an_adapters_config_have_the_same_order_in_each_process(tmp_path, checkpoint):
    targets = ["v_proj", "k_proj", "up_proj", "o_proj", "gate_proj", "down_proj", "q_proj"]
    adapter = save_adapter(load(checkpoint), tmp_path / "adapter", target_modules=targets)
    model = Model(base=str(checkpoint))
    Policy(continued_adapter(load(checkpoint), adapter, None, model)).save(tmp_path / "again")
    config = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(targets)


def test_lora_by_default_leaves_routers_and_fused_experts_alone():
    dense = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(text_layers(make("llama"))) == dense
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    assert set(text_layers(make("qwen3_moe", **experts))) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    mamba = text_layers(make("mamba", state_size=4))
    assert "out_proj" not in mamba and "x_proj" in mamba


def shares_its_weights():
    """A model whose third and sixth layer share their attention and feed-forward weights."""
    kinds = ["mamba", "mamba", "hybrid"] * 2
    return make("zamba", num_hidden_layers=6, layers_block_type=kinds, attention_head_dim=8)


def test_lora_by_default_leaves_layers_alone_that_share_a_weight():
    found = {name.rpartition(".")[2] for name in text_layers(shares_its_weights())}
    assert found and not found & {"q_proj", "o_proj", "gate_proj"}


def test_adapters_of_layers_that_share_a_weight_are_not_merged(tmp_path):
    base = shares_its_weights()
    base.save_pretrained(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(TbpoError, match="layers that share one weight have adapters"):
        merge_adapter(Model(base=str(tmp_path / "base")), adapter, tmp_path / "merged", "5GB")


def test_lora_by_default_takes_the_layers_of_a_model_whose_head_is_called_its_decoder():
    layers = ["q_proj", "k_proj", "v_proj", "Wi"]
    found = text_layers(make("modernbert-decoder", layer_types=["full_attention"] * 2))
    assert {name.rpartition(".")[2] for name in found} == {*layers, "Wo"}


def test_a_model_that_refuses_gradients_without_its_dropout_is_refused(tmp_path):
    settings = {"is_decoder": True, "attn_layers": ["local"] * 2, "attention_head_size": 4}
    settings |= {"feed_forward_size": 24, "axial_pos_embds": False}
    make("reformer", **settings).save_pretrained(tmp_path)
    with pytest.raises(TbpoError, match="cannot be trained: reformer"):
        load(tmp_path)


def test_whole_weights_are_saved_with_the_end_tokens_and_a_tied_head_once(tmp_path):
    bf16 = make("llama", tie_word_embeddings=True).to(torch.bfloat16)
    habits = {"temperature": 0.6, "top_p": 0.9, "do_sample": True}
    bf16.generation_config.update(eos_token_id=5, **habits)
    bf16.save_pretrained(tmp_path / "base")
    Policy(load(tmp_path / "base")).save(tmp_path / "saved", end_ids=(7, 5))
    names = [set(load_file(tmp_path / one / "model.safetensors")) for one in ("base", "saved")]
    assert names[0] == names[1]
    config = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert config["eos_token_id"] == [7, 5]
    assert {name: config.get(name) for name in habits} == habits, "as the base was published"


def test_a_helper_is_loaded_where_the_weights_are_and_not_where_they_will_be(checkpoint):
    policy = Policy(load(checkpoint))
    model = Model(base=str(checkpoint))
    for name, devices in {"one": (CPU,), "other": (torch.device("meta"), CPU)}.items():
        add_helper(policy, name, str(checkpoint), model, *devices)
        weights = [*policy.frozen[name].parameters()]
        assert {weight.device for weight in weights} == {CPU}
        assert not any(weight.requires_grad for weight in weights)


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("llama", {}, None),
        ("gpt_neox", {}, None),
        ("rwkv", {"attention_hidden_size": 16, "context_length": 64}, "recurrent state"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "the longest sequence of a batch",
        ),
    ],
)
def test_what_makes_samples_depend_on_padding_is_said_and_nothing_where_nothing_does(
    kind, settings, why
):
    reason = reads_padding(make(kind, **settings))
    assert reason is None if why is None else why in reason


NO_ANSWERS = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"),
    "processes": RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection reset by peer"),
}
TRIALS = {
    "causality": lambda model: check_causality(model, "base"),
    "padding": reads_padding,
    "head": read_head,
    "layout": lambda model: choose_layout([model], "auto", 8),
}


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize("kind", NO_ANSWERS)
def test_memory_that_runs_out_in_a_trial_and_a_process_that_ends_are_no_answers_about_the_model(
    trial, kind
):
    model = make("llama")

    def fail(*_arguments):
        raise NO_ANSWERS[kind]

    model.get_input_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError) as error:
        TRIALS[trial](model)
    assert error.value is NO_ANSWERS[kind]


@pytest.mark.parametrize(
    ("error", "says", "helps"),
    [
        (NO_ANSWERS["memory"], "out of memory while the model is loaded", "model.quantization"),
        (OSError(28, "No space left on device"), "No space left on device", "HF_HOME"),
    ],
)
def test_too_little_memory_or_disk_for_a_model_is_not_a_fault_of_the_model(
    checkpoint, monkeypatch, error, says, helps
):
    def fail(*_arguments, **_named):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(TbpoError, match=says) as caught:
        load(checkpoint)
    assert helps in caught.value.fix and str(checkpoint) in caught.value.where


def test_the_bases_generation_config_takes_no_part_in_samples(checkpoint):
    prompts, seeds = [[5, 6, 7], [8, 9]], [1, 2]
    settings = Sample(temperature=0.0, max_new_tokens=8)

    def answers():
        batches = completions(load(checkpoint), prompts, seeds, settings, [2])
        return [completion for batch in batches for completion in batch]

    plain = answers()
    habits = {"repetition_penalty": 1.8, "top_k": 1, "num_beams": 3, "do_sample": True}
    (checkpoint / "generation_config.json").write_text(json.dumps(habits))
    assert answers() == plain


def test_samples_of_a_model_whose_state_reads_padding_do_not_depend_on_the_batch():
    rwkv = make("rwkv", attention_hidden_size=16, context_length=64)
    prompts, seeds = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15, 16]], [1, 2, 3, 4]
    found = []
    for size in (1, 4):  # two prompts of one length: transformers' state of RWKV mixes a batch
        settings = Sample(temperature=1.0, top_p=1.0, max_new_tokens=6, batch_size=size)
        batches = completions(rwkv, prompts, seeds, settings, [2])
        found.append({place: one.token_ids for batch in batches for place, one in batch})
    assert found[0] == found[1]


def test_samples_past_the_positions_of_a_model_are_refused():
    gpt2 = make("gpt2", max_position_embeddings=16)
    with pytest.raises(TbpoError, match="the model has 16 positions"):
        list(completions(gpt2, [[1] * 10], [0], Sample(max_new_tokens=7), [2]))


def test_positions_that_depend_on_the_batch_are_refused_past_their_length():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make("llama", rope_parameters=rope)
    assert choose_layout([model], "auto", longest=64)[0] == "shared_prompt"
    with pytest.raises(TbpoError, match=r"depend on the longest sequence") as error:
        choose_layout([model], "padded", longest=65)
    assert error.value.fix == "data.max_length = 64"


def test_a_convolution_over_tokens_pads_the_rows_and_says_so():
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    layout, reason = choose_layout([make("lfm2", **layers)], "auto", longest=20)
    assert layout == "padded" and "conv" in reason
