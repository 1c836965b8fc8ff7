"""`tbpo init --from`: configs of other tools become recipes; the rest of them is listed."""

import json
import tomllib

import pytest

from tbpo_cli.cli.convert import convert
from tbpo_cli.config.keys import all_keys
from tbpo_cli.config.other_tools import LOSS_NAMES, THEIRS
from tbpo_cli.config.recipe import Data, Recipe, load_recipe

TRL = """
model_name_or_path: org/model
dataset_name: org/pairs
dataset_train_split: train_prefs
learning_rate: 5e-7
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
loss_type: sigmoid
beta: 0.05
use_peft: true
lora_r: 16
lora_alpha: 32
warmup_ratio: 0.1
lr_scheduler_type: cosine
num_train_epochs: 2
padding_free: true
report_to: wandb
eval_strategy: steps
"""
AXOLOTL = """
base_model: org/model
rl: ipo
datasets:
  - path: org/pairs
    split: train
    type: chatml.intel
adapter: lora
lora_r: 8
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
optimizer: adamw_bnb_8bit
learning_rate: 0.00001
sequence_len: 1024
val_set_size: 0.02
load_in_4bit: true
num_epochs: 1
"""
FACTORY = """
model_name_or_path: org/model
stage: dpo
finetuning_type: lora
lora_rank: 8
lora_target: all
pref_beta: 0.1
pref_loss: sigmoid
dataset: dpo_en_demo
cutoff_len: 2048
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
"""
SCRIPT = """
trl dpo --model_name_or_path org/model \\
    --dataset_name org/pairs --learning_rate 5e-7 --gradient_checkpointing \\
    --per_device_train_batch_size=2
"""
PYTHON = """
from trl import DPOConfig
args = DPOConfig(output_dir="out", beta=0.2, max_grad_norm=1.0, per_device_train_batch_size=8)
lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type=get())
"""


def written(tbpo, tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tbpo("init", "mine", "--from", name)


def test_a_config_of_trl(tbpo, tmp_path):
    """4 pairs × 8 steps of accumulation are 32 pairs a step."""
    done = written(tbpo, tmp_path, "dpo.yaml", TRL)
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(tmp_path / "mine.toml")
    assert (recipe.align.batch_pairs, recipe.align.learning_rate) == (32, 5e-7)
    assert (recipe.align.loss_name, recipe.align.loss.beta) == ("dpo", 0.05)
    assert (recipe.model.lora.r, recipe.model.lora.alpha) == (16, 32.0)
    assert (recipe.align.epochs, recipe.align.warmup) == (2.0, 0.1)
    assert recipe.data.train_split == "train_prefs" and recipe.run.trackers == ("wandb",)
    left = done.stdout.partition("left out:")[2]
    assert "eval_strategy" in left and "no counterpart" in left and "padding_free" in left


def test_a_config_of_axolotl(tbpo, tmp_path):
    written(tbpo, tmp_path, "axolotl.yml", AXOLOTL)
    recipe = load_recipe(tmp_path / "mine.toml")
    assert (recipe.data.train[0].path, recipe.data.train[0].split) == ("org/pairs", "train")
    assert recipe.align.loss_name == "ipo" and recipe.align.batch_pairs == 8
    assert recipe.model.lora.target_modules == "all-linear" and recipe.model.quantization == "nf4"
    assert (recipe.data.max_length, recipe.data.eval_fraction) == (1024, 0.02)


def test_a_config_of_llama_factory(tbpo, tmp_path):
    written(tbpo, tmp_path, "factory.yaml", FACTORY)
    recipe = load_recipe(tmp_path / "mine.toml")
    assert recipe.align.loss_name == "dpo" and recipe.model.lora.r == 8


def test_json_a_script_and_a_python_file(tbpo, tmp_path):
    config = {"model_name_or_path": "org/model", "dataset_name": "a/b", "max_steps": -1}
    written(tbpo, tmp_path, "config.json", json.dumps(config))
    assert load_recipe(tmp_path / "mine.toml").align.epochs == 3.0, "-1 is no number of steps"
    (tmp_path / "mine.toml").unlink()
    written(tbpo, tmp_path, "run.sh", SCRIPT)
    recipe = load_recipe(tmp_path / "mine.toml")
    assert (recipe.align.learning_rate, recipe.align.activation_checkpointing) == (5e-7, True)
    (tmp_path / "mine.toml").unlink()
    done = written(tbpo, tmp_path, "train.py", PYTHON)
    tables = tomllib.loads((tmp_path / "mine.toml").read_text())
    assert tables["align"]["loss"]["beta"] == 0.2 and tables["align"]["batch_pairs"] == 8
    assert tables["model"]["lora"] == {
        "r": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "target_modules": ["q_proj"],
    }
    assert "still to be mended" in done.stdout and "model.base is missing" in done.stdout


def test_an_sft_config_fills_the_table_sft():
    theirs = {"stage": "sft", "learning_rate": 1e-5, "per_device_train_batch_size": 4}
    tables = convert(theirs).tables
    assert (tables["sft"]["learning_rate"], tables["sft"]["batch_examples"]) == (1e-5, 4)
    assert "align" not in tables


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("- a\n- b\n", "there is no config"),
        ("a: [\n", "cannot be read"),
        ("", "there is no config"),
    ],
)
def test_what_is_no_config_is_a_message(tbpo, tmp_path, text, what):
    done = written(tbpo, tmp_path, "x.yaml", text)
    assert done.returncode == 2 and what in done.stderr and not (tmp_path / "mine.toml").exists()


def test_nothing_is_overwritten(tbpo, tmp_path):
    (tmp_path / "mine.toml").write_text("")
    done = written(tbpo, tmp_path, "x.yaml", TRL)
    assert done.returncode == 2 and "is there already" in done.stderr


def test_every_counterpart_is_a_key_of_a_recipe():
    known = {key for key, _ in all_keys(Recipe)} | {"align.loss.name", "data.train.config"}
    ours = {each.ours for each in THEIRS.values() if each.ours}
    assert {key for key in ours - known if not key.startswith("align.loss.")} == set()
    assert all(each.ours or each.note for each in THEIRS.values())
    assert LOSS_NAMES["sigmoid"] == "dpo"


TRL_KEYS = {"model_name_or_path": "a/b", "dataset_name": "c/d"}
AXOLOTL_KEYS = {"base_model": "a/b", "datasets": [{"path": "c/d"}]}
FACTORY_KEYS = {"model_name_or_path": "a/b", "dataset": "c", "stage": "dpo"}


@pytest.mark.parametrize(
    ("theirs", "loss"),
    [
        (TRL_KEYS, {"name": "dpo", "beta": 0.1}),
        ({**TRL_KEYS, "loss_type": ["ipo"]}, {"name": "ipo", "beta": 0.1}),
        (
            {**TRL_KEYS, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
            {"name": "dpo", "sft_weight": 0.5, "beta": 0.1},
        ),
        ({**TRL_KEYS, "loss_type": "sft"}, {"name": "sft"}),
        (
            {**TRL_KEYS, "loss_type": "simpo", "cpo_alpha": 0.25, "simpo_gamma": 0.6},
            {"name": "simpo", "beta": 0.1, "gamma": 0.6, "sft_weight": 0.25},
        ),
        (
            {**TRL_KEYS, "loss_type": "simpo"},
            {"name": "simpo", "beta": 0.1, "gamma": 0.5, "sft_weight": 1.0},
        ),
        ({**TRL_KEYS, "cpo_alpha": 0.5}, {"name": "cpo", "beta": 0.1, "sft_weight": 0.5}),
        (FACTORY_KEYS, {"name": "dpo", "beta": 0.1}),
        ({**FACTORY_KEYS, "pref_loss": "orpo", "pref_beta": 0.2}, {"name": "orpo", "lam": 0.2}),
        ({**AXOLOTL_KEYS, "rl": "orpo", "orpo_alpha": 0.3}, {"name": "orpo", "lam": 0.3}),
        ({**AXOLOTL_KEYS, "rl": "dpo", "rl_beta": 0.4}, {"name": "dpo", "beta": 0.4}),
    ],
)
def test_the_loss_is_theirs_also_where_they_leave_it_out(theirs, loss):
    assert convert(theirs).tables["align"]["loss"] == loss


@pytest.mark.parametrize(
    "theirs",
    [
        {**FACTORY_KEYS, "stage": "kto"},
        {**AXOLOTL_KEYS, "rl": "kto"},
        {**TRL_KEYS, "loss_type": "nca_pair"},
        {**TRL_KEYS, "loss_type": ["sigmoid", "bco_pair"]},
    ],
)
def test_a_loss_that_is_not_here_is_listed_and_dpo_stands_in_its_place(theirs):
    converted = convert(theirs)
    assert converted.tables["align"]["loss"]["name"] == "dpo"
    assert any("dpo stands in its place" in why for _, why in converted.left)


@pytest.mark.parametrize(
    ("theirs", "lora"),
    [
        ({**TRL_KEYS, "lora_r": 16}, None),
        ({**TRL_KEYS, "use_peft": True}, {"r": 16, "alpha": 32.0, "dropout": 0.05}),
        ({**FACTORY_KEYS, "lora_rank": 4}, {"r": 4, "alpha": 8.0, "dropout": 0.0}),
        ({**FACTORY_KEYS, "finetuning_type": "full"}, None),
        ({**AXOLOTL_KEYS, "rl": "dpo", "adapter": "qlora", "lora_r": 8}, {"r": 8}),
    ],
)
def test_an_adapter_is_as_theirs(theirs, lora):
    assert convert(theirs).tables["model"].get("lora") == lora


def test_their_defaults_are_written_where_ours_differ():
    align = convert(TRL_KEYS).tables["align"]
    assert (align["learning_rate"], align["batch_pairs"], align["epochs"]) == (1e-6, 8, 3.0)
    assert convert(TRL_KEYS).tables["data"]["max_length"] == 1024
    assert "epochs" not in convert({**TRL_KEYS, "max_steps": 10}).tables["align"]
    ours = convert({**AXOLOTL_KEYS, "rl": "dpo"}).tables["align"]
    assert (ours["epochs"], ours["batch_pairs"], ours["warmup"]) == (1.0, 1, 0.03)
    assert convert({**AXOLOTL_KEYS, "rl": "dpo"}).tables["data"]["max_length"] == 512
    assert (ours["schedule"], ours["max_grad_norm"]) == ("cosine", 1.0)
    theirs = convert({**FACTORY_KEYS, "pref_loss": "simpo"})
    assert theirs.tables["align"]["loss"] == {"name": "simpo", "beta": 0.1, "gamma": 0.5}
    assert theirs.tables["align"]["learning_rate"] == 5e-5
    assert "simpo_gamma" not in dict(convert(FACTORY_KEYS).left), "a default that dpo does not read"
    assert theirs.tables["data"]["max_length"] == 2048


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (TRL_KEYS, "truncate"),
        (FACTORY_KEYS, "truncate"),
        ({**AXOLOTL_KEYS, "rl": "dpo"}, "drop"),
        ({**AXOLOTL_KEYS, "rl": "dpo", "excess_length_strategy": "truncate"}, "truncate"),
        ({**TRL_KEYS, "truncation_mode": "keep_end"}, "drop"),
    ],
)
def test_what_becomes_of_long_pairs_is_as_theirs_where_that_is_offered(theirs, ours):
    converted = convert(theirs)
    assert converted.tables["data"].get("overlong", Data.overlong) == ours
    assert ("truncation_mode" in dict(converted.left)) == (
        theirs.get("truncation_mode") == "keep_end"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_length", None),
        ("max_steps", -1),
        ("load_in_4bit", False),
        ("optim", "adamw_8bit"),
        ("save_steps", 0.1),
        ("eval_steps", 0.25),
        ("warmup_steps", 100),
        ("simpo_gamma", 0.5),
        ("unknown_key", 1),
    ],
)
def test_what_is_not_taken_over_is_listed(key, value):
    left = convert({**TRL_KEYS, key: value}).left
    assert [why for name, why in left if name == key]


def test_keys_of_a_data_set_that_are_not_taken_over_are_listed():
    each = {"path": "json", "data_files": "a.jsonl", "ds_type": "json", "type": "x", "weight": 2}
    converted = convert({**AXOLOTL_KEYS, "rl": "dpo", "datasets": [each]})
    assert converted.tables["data"]["train"] == [{"path": "a.jsonl", "weight": 2}]
    assert {"datasets.type", "datasets.ds_type"} <= {name for name, _ in converted.left}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sft.yaml", "model_name_or_path: a/b\ndataset_name: c/d\nassistant_only_loss: true\n"),
        ("sft.sh", "trl sft --model_name_or_path a/b --dataset_name c/d\n"),
        ("sft.py", "args = SFTConfig(model_name_or_path='a/b', dataset_name='c/d')\n"),
    ],
)
def test_a_training_on_demonstrations_of_trl_becomes_the_table_sft(tbpo, tmp_path, name, text):
    done = written(tbpo, tmp_path, name, text)
    assert done.returncode == 0, done.stderr
    tables = tomllib.loads((tmp_path / "mine.toml").read_text())
    assert "align" not in tables and tables["data"]["max_length"] == 1024
    assert (tables["sft"]["learning_rate"], tables["sft"]["batch_examples"]) == (2e-5, 8)


def test_every_one_of_several_data_files_is_taken_over():
    each = {"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "weight": 2}
    converted = convert({**AXOLOTL_KEYS, "rl": "dpo", "datasets": [each]})
    sources = [{"path": "a.jsonl", "weight": 2}, {"path": "b.jsonl", "weight": 2}]
    assert converted.tables["data"]["train"] == sources


def test_files_of_a_data_set_on_the_hub_are_listed():
    each = {"path": "org/pairs", "data_files": ["a.jsonl", "b.jsonl"]}
    converted = convert({**AXOLOTL_KEYS, "rl": "dpo", "datasets": [each]})
    assert converted.tables["data"]["train"] == [{"path": "org/pairs"}]
    (why,) = [why for name, why in converted.left if name == "datasets.data_files"]
    assert "b.jsonl" in why and "all files of org/pairs are read" in why


@pytest.mark.parametrize(
    ("key", "method", "says"),
    [
        ("stage", "rm", "judge.reward_model names one"),
        ("stage", "ppo", "a table [rounds] chooses pairs"),
        ("stage", "pt", "there is no pre-training"),
        ("rl", "grpo", "a table [rounds] chooses pairs"),
    ],
)
def test_a_training_of_another_kind_is_refused_with_a_sentence(tbpo, tmp_path, key, method, says):
    done = written(tbpo, tmp_path, "x.yaml", f"model_name_or_path: a/b\n{key}: {method}\n")
    assert done.returncode == 2 and f"{method} is not offered" in done.stderr
    assert says in done.stderr and not (tmp_path / "mine.toml").exists()


def test_variables_of_a_python_file_are_followed_or_listed(tbpo, tmp_path):
    text = "RATE = 2e-6\nargs = DPOConfig(learning_rate=RATE, beta=find(), dataset_num_proc=None)\n"
    done = written(tbpo, tmp_path, "train.py", text)
    assert tomllib.loads((tmp_path / "mine.toml").read_text())["align"]["learning_rate"] == 2e-6
    assert "find() is no plain value" in done.stdout and "dataset_num_proc" in done.stdout


def test_a_recipe_in_yaml_is_kept_whole(tbpo, tmp_path):
    text = "model: {base: org/model}\ndata: {train: org/pairs}\nalign: {epochs: 2.0, loss: dpo}\n"
    done = written(tbpo, tmp_path, "ours.yaml", text)
    assert done.returncode == 0 and "is a recipe already" in done.stdout
    recipe = load_recipe(tmp_path / "mine.toml")
    assert (recipe.align.epochs, recipe.align.loss_name) == (2.0, "dpo")


def test_a_config_without_a_known_key_gives_no_recipe(tbpo, tmp_path):
    done = written(tbpo, tmp_path, "x.yaml", "services: {web: 1}\n")
    assert done.returncode == 2 and not (tmp_path / "mine.toml").exists()


def test_an_incomplete_recipe_is_to_be_mended_first(tbpo, tmp_path):
    done = written(tbpo, tmp_path, "x.yaml", "loss_type: ipo\n")
    assert "next: mend mine.toml" in done.stdout + done.stderr
