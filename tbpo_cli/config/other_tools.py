"""The keys of TRL, axolotl and LLaMA-Factory, and what stands for them in a recipe.

Source: TRL 1.x (DPOConfig, SFTConfig, ModelConfig, ScriptArguments and the transformers arguments
that they extend), axolotl's config reference, LLaMA-Factory's hyper-parameter classes and examples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TRL, AXOLOTL, FACTORY, ALL = "TRL", "axolotl", "LLaMA-Factory", "TRL, axolotl, LLaMA-Factory"


@dataclass(frozen=True)
class Theirs:
    """A key of another tool.

    Args:
        tool: whose key it is.
        ours: our key; "" if a recipe needs none.
        note: what to know about it, after "here"; it is a whole sentence where `ours` is "".
        values: their values that have another name here; None: the key is left out.
        notes: what to write instead, by their value, where `ours` is "".
    """

    tool: str
    ours: str = ""
    note: str = ""
    values: Mapping[Any, Any] = field(default_factory=dict)
    notes: Mapping[Any, str] = field(default_factory=dict)


# their name: our name
LOSS_NAMES = {
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo_norm",
    "dpo": "dpo",
    "ipo": "ipo",
    "hinge": "hinge",
    "robust": "robust",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "simpo": "simpo",
    "orpo": "orpo",
    "cpo": "cpo",
    "sft": "sft",
}
# Of TRL's CPOConfig, which has a key cpo_alpha.
CPO_NAMES = {**LOSS_NAMES, "sigmoid": "cpo"}
# Methods without a loss here, by their names: why, and what to write.
_SINGLE = (
    "it trains on single answers that are marked good or bad, and is not offered: pairs are needed "
    "(rows of one prompt with both labels make them: docs/data.md); "
)
_SAMPLES = "it trains on a reward of sampled answers, and is not offered; "
_PAIRS = "it is not offered; of the losses of pairs, "
# No loss can stand in their place.
REFUSED = ("ppo", "grpo", "gdpo", "rloo", "reinforce", "rm", "pt")
NOT_OFFERED = {
    **dict.fromkeys(("kto", "kto_pair", "bco"), f'{_SINGLE}then name = "dpo"'),
    "apo_zero_unpaired": f'{_SINGLE}then name = "apo_zero"',
    **dict.fromkeys(
        ("ppo", "grpo", "gdpo", "rloo", "reinforce"),
        f"{_SAMPLES}a table [rounds] chooses pairs by the marks of a judge (docs/rounds.md)",
    ),
    **dict.fromkeys(
        ("bco_pair", "nca_pair", "exo_pair", "sppo_hard", "aot", "aot_pair", "aot_unpaired",
         "discopop"),
        f'{_PAIRS}name = "dpo" is the usual one; tbpo losses lists all',
    ),
    "ebft": "it is not offered, and no loss here is like it; tbpo losses lists all",
    "rm": "a reward model is not trained here; judge.reward_model names one that is there",
    "pt": "there is no pre-training here; a table [sft] trains on demonstrations",
}  # fmt: skip
SCHEDULES = {"constant_with_warmup": "constant", "cosine_with_restarts": "cosine"}
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw",
    "adamw_8bit": "adamw",
    "paged_adamw_32bit": "adamw",
    "paged_adamw_8bit": "adamw",
}
DTYPES = {"torch.bfloat16": "bfloat16", "torch.float16": "float16", "torch.float32": "float32"}
ATTENTION = {"flash_attention_2": "auto", "fa2": "auto", "flash_attention_3": "auto"}
TARGETS = {"all": "all-linear"}
NOTHING = "there is nothing to set: "
PACKED = NOTHING + "rows are packed where the model allows it"
NO_LOGITS = NOTHING + "no step holds all its logits"
FSDP = 'align.sharding = "fsdp" shards weights; --gpus N starts processes'
RESPONSES = "data.max_length counts prompt and response; no prompt is cut"
LONG = 'longer pairs are left out here, or lose their ends with data.overlong = "truncate"'
NO_8_BIT = 'there is no 8-bit base; model.quantization = "nf4" has 4 bits'
NO_REFERENCE = NOTHING + "the reference follows from the recipe; tbpo show names it"
CACHED = NOTHING + "log π_ref is read from disk after the first epoch"
ADAPTER = "a table [model.lora] trains an adapter"
WITH_ADAPTER = "remove it, and write a table [model.lora], which trains an adapter"
IN_4_BITS = f'{WITH_ADAPTER}, and model.quantization = "nf4"'
ALL_WEIGHTS = "remove it: without a table [model.lora], all weights are trained"
BATCH = "pairs of a whole step; their batch size × accumulation steps × GPUs"

THEIRS: dict[str, Theirs] = {
    # the model
    "model_name_or_path": Theirs("TRL, LLaMA-Factory", "model.base"),
    "base_model": Theirs(AXOLOTL, "model.base"),
    "model_revision": Theirs(TRL, "model.revision"),
    "revision_of_model": Theirs(AXOLOTL, "model.revision"),
    "torch_dtype": Theirs(ALL, "model.dtype", values=DTYPES),
    "bf16": Theirs(ALL, note=NOTHING + "a GPU that has bfloat16 computes in it (model.dtype)"),
    "fp16": Theirs(ALL, note=NOTHING + "model.dtype = \"auto\" chooses"),
    "tf32": Theirs(ALL, note=NOTHING + "TF32 is on"),
    "attn_implementation": Theirs(ALL, "model.attention", values=ATTENTION),
    "flash_attention": Theirs(AXOLOTL, note=NOTHING + "model.attention = \"auto\" chooses"),
    "flash_attn": Theirs(FACTORY, note=NOTHING + "model.attention = \"auto\" chooses"),
    "load_in_4bit": Theirs("TRL, axolotl", "model.quantization", values={True: "nf4", False: None}),
    "quantization_bit": Theirs(FACTORY, "model.quantization", values={4: "nf4"}),
    "load_in_8bit": Theirs("TRL, axolotl", note=NO_8_BIT),
    "ref_model": Theirs(TRL, note=NO_REFERENCE),
    "chat_template": Theirs("axolotl", "model.chat_template", "a Jinja file"),
    "template": Theirs(FACTORY, note=NOTHING + "the tokenizer's chat template is used"),
    "max_length": Theirs(TRL, "data.max_length"),
    "sequence_len": Theirs(AXOLOTL, "data.max_length"),
    "cutoff_len": Theirs(FACTORY, "data.max_length"),
    # the adapter
    "use_peft": Theirs(TRL, note=ADAPTER, notes={True: WITH_ADAPTER, False: ALL_WEIGHTS}),
    "adapter": Theirs(AXOLOTL, note=ADAPTER, notes={"lora": WITH_ADAPTER, "qlora": IN_4_BITS}),
    "finetuning_type": Theirs(
        FACTORY, note=ADAPTER, notes={"lora": WITH_ADAPTER, "full": ALL_WEIGHTS}
    ),
    "peft_config": Theirs(TRL, note="it is the table [model.lora]"),
    "lora_r": Theirs("TRL, axolotl", "model.lora.r"),
    "lora_rank": Theirs(FACTORY, "model.lora.r"),
    "lora_alpha": Theirs(ALL, "model.lora.alpha"),
    "lora_dropout": Theirs(ALL, "model.lora.dropout"),
    "lora_target_modules": Theirs("TRL, axolotl", "model.lora.target_modules"),
    "lora_target": Theirs(FACTORY, "model.lora.target_modules", values=TARGETS),
    "lora_target_linear": Theirs(
        AXOLOTL, "model.lora.target_modules", values={True: "all-linear", False: None}
    ),
    "lora_model_dir": Theirs(AXOLOTL, "model.adapter"),
    "adapter_name_or_path": Theirs(FACTORY, "model.adapter"),
    # the rows
    "dataset_name": Theirs(TRL, "data.train"),
    "dataset_config": Theirs(TRL, "data.train.config"),
    "dataset_train_split": Theirs(TRL, "data.train_split"),
    "dataset_test_split": Theirs(TRL, "data.eval_split"),
    "datasets": Theirs(AXOLOTL, "data.train"),
    "test_datasets": Theirs(AXOLOTL, "data.eval"),
    "dataset": Theirs(FACTORY, "data.train"),
    "eval_dataset": Theirs(FACTORY, "data.eval"),
    "val_set_size": Theirs(AXOLOTL, "data.eval_fraction"),
    "val_size": Theirs(FACTORY, "data.eval_fraction"),
    "max_prompt_length": Theirs(TRL, note=RESPONSES),
    "max_completion_length": Theirs(TRL, note=RESPONSES),
    "truncation_mode": Theirs(TRL, "data.overlong", values={"keep_start": "truncate"}),
    "excess_length_strategy": Theirs(
        AXOLOTL, "data.overlong", values={"truncate": "truncate", "drop": "drop"}
    ),
    "dataset_num_proc": Theirs(TRL, "data.workers"),
    "dataset_processes": Theirs(AXOLOTL, "data.workers"),
    "preprocessing_num_workers": Theirs(FACTORY, "data.workers"),
    # the loss
    "stage": Theirs(FACTORY, note="a stage is a table here: [sft] or [align]"),
    "loss_weights": Theirs(TRL, note="align.loss.sft_weight is the weight of the sft term"),
    "loss_type": Theirs(TRL, "align.loss.name", "with other names", LOSS_NAMES),
    "pref_loss": Theirs(FACTORY, "align.loss.name", "with other names", LOSS_NAMES),
    "rl": Theirs(AXOLOTL, "align.loss.name", "with other names", LOSS_NAMES),
    "rl_beta": Theirs(AXOLOTL, "align.loss.beta"),
    "dpo_beta": Theirs(AXOLOTL, "align.loss.beta"),
    "pref_beta": Theirs(FACTORY, "align.loss.beta"),
    "beta": Theirs("TRL", "align.loss.beta"),
    "label_smoothing": Theirs("TRL", "align.loss.label_smoothing"),
    "orpo_alpha": Theirs(AXOLOTL, "align.loss.lam"),
    "dpo_label_smoothing": Theirs(FACTORY, "align.loss.label_smoothing"),
    "simpo_gamma": Theirs("TRL, LLaMA-Factory", "align.loss.gamma"),
    "rpo_alpha": Theirs("TRL, axolotl", "align.loss.sft_weight"),
    "cpo_alpha": Theirs(TRL, "align.loss.sft_weight"),
    "pref_ftx": Theirs(FACTORY, "align.loss.sft_weight"),
    "precompute_ref_log_probs": Theirs(TRL, note=CACHED),
    "reference_free": Theirs(TRL, note="simpo, orpo and cpo are the losses without a reference"),
    # the training
    "per_device_train_batch_size": Theirs("TRL, LLaMA-Factory", "align.batch_pairs", BATCH),
    "micro_batch_size": Theirs(AXOLOTL, "align.batch_pairs", BATCH),
    "gradient_accumulation_steps": Theirs(ALL, "align.batch_pairs", BATCH),
    "per_device_eval_batch_size": Theirs("TRL", note=NOTHING + "how rows are cut is found out"),
    "auto_find_batch_size": Theirs(TRL, note=NOTHING + "how a step is cut is found out"),
    "learning_rate": Theirs(ALL, "align.learning_rate"),
    "num_train_epochs": Theirs("TRL, LLaMA-Factory", "align.epochs"),
    "num_epochs": Theirs(AXOLOTL, "align.epochs"),
    "max_steps": Theirs(ALL, "align.max_steps", values={-1: None}),
    "lr_scheduler_type": Theirs("TRL, LLaMA-Factory", "align.schedule", values=SCHEDULES),
    "lr_scheduler": Theirs(AXOLOTL, "align.schedule", values=SCHEDULES),
    "warmup_ratio": Theirs(ALL, "align.warmup", "a share of the steps"),
    "warmup_steps": Theirs(ALL, note="align.warmup is the share of the steps, from 0 to 1"),
    "optim": Theirs("TRL, LLaMA-Factory", "align.optimizer", values=OPTIMIZERS),
    "optimizer": Theirs(AXOLOTL, "align.optimizer", values=OPTIMIZERS),
    "weight_decay": Theirs(ALL, "align.weight_decay"),
    "max_grad_norm": Theirs(ALL, "align.max_grad_norm"),
    "gradient_checkpointing": Theirs(ALL, "align.activation_checkpointing"),
    "logging_steps": Theirs(ALL, "align.log_every"),
    "eval_steps": Theirs(ALL, "align.eval_every"),
    "save_steps": Theirs(ALL, "align.checkpoint_every"),
    "save_total_limit": Theirs(ALL, note=NOTHING + "the two newest checkpoints are kept"),
    "resume_from_checkpoint": Theirs(ALL, note=NOTHING + "the same command goes on"),
    "padding_free": Theirs(TRL, note=NOTHING + "no row is padded where the model allows it"),
    "packing": Theirs("TRL, LLaMA-Factory", note=PACKED),
    "sample_packing": Theirs(AXOLOTL, note=PACKED),
    "use_liger_kernel": Theirs(TRL, note=NO_LOGITS),
    "enable_liger_kernel": Theirs(FACTORY, note=NO_LOGITS),
    "deepspeed": Theirs(ALL, note=FSDP),
    "fsdp": Theirs(ALL, note=FSDP),
    # the run
    "output_dir": Theirs(ALL, "run.dir", "the folder of all runs"),
    "run_name": Theirs("TRL, LLaMA-Factory", "run.name"),
    "seed": Theirs(ALL, "run.seed"),
    "report_to": Theirs("TRL, LLaMA-Factory", "run.trackers", values={"none": None, "all": None}),
    "wandb_project": Theirs(AXOLOTL, note="run.trackers = [\"wandb\"]"),
    "hub_model_id": Theirs("TRL", "push.repo"),
    "push_to_hub": Theirs(TRL, note="tbpo push is a command of its own"),
    "hub_private_repo": Theirs(TRL, "push.private"),
}  # fmt: skip

# What holds where a config leaves a key out. Read in the source files, at these commits:
# transformers 5.24, training_args.py: _ARGUMENTS, and learning_rate = 5e-5 as in LLaMA-Factory.
# TRL, trl/trainer: dpo_config.py (3da2424: beta, learning_rate, max_length,
# truncation_mode), sft_config.py (016013e: learning_rate, max_length), model_config.py (040e32d:
# lora_r, lora_alpha, lora_dropout).
# LLaMA-Factory, src/llamafactory/hparams: finetuning_args.py (00577a8: pref_beta, simpo_gamma,
# lora_rank, lora_alpha, lora_dropout, stage = sft), data_args.py (072bfe2: cutoff_len).
# axolotl, src/axolotl: core/builders/base.py (00f1318: warmup_ratio; max_grad_norm is that of
# transformers), utils/schemas/training.py (002a637: num_epochs, micro_batch_size, lr_scheduler),
# and its config reference (sequence_len).
_ARGUMENTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "max_grad_norm": 1.0,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    TRL: {
        **_ARGUMENTS,
        "beta": 0.1,
        "learning_rate": 1e-6,
        "max_length": 1024,
        "truncation_mode": "keep_start",
    },
    FACTORY: {
        **_ARGUMENTS,
        "pref_beta": 0.1,
        "simpo_gamma": 0.5,
        "learning_rate": 5e-5,
        "cutoff_len": 2048,
    },
    AXOLOTL: {
        "num_epochs": 1.0,
        "micro_batch_size": 1,
        "sequence_len": 512,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "max_grad_norm": 1.0,
    },
}
# Of TRL, where loss_type is of its CPOConfig alone (cpo_config.py: cpo_alpha, simpo_gamma).
DEFAULTS_BY_LOSS: dict[str, dict[str, Any]] = {"simpo": {"cpo_alpha": 1.0, "simpo_gamma": 0.5}}
# Keys of TRL's SFTConfig that its DPOConfig does not have.
SFT_KEYS = {
    "assistant_only_loss",
    "completion_only_loss",
    "dataset_text_field",
    "eval_packing",
    "packing_strategy",
}
SFT_DEFAULTS: dict[str, dict[str, Any]] = {TRL: {"learning_rate": 2e-5}, FACTORY: {}, AXOLOTL: {}}
LORA_DEFAULTS: dict[str, dict[str, Any]] = {
    TRL: {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    FACTORY: {"lora_rank": 8, "lora_dropout": 0.0},
    AXOLOTL: {},
}


def counterpart(name: str, given: Any = None) -> str:
    """What another tool's key is called here, in words; "" for a key that none of them has.

    Args:
        given: its value, whose name here is said as well.
    """
    theirs = THEIRS.get(name)
    if theirs is None:
        return ""
    is_plain = isinstance(given, str | int | float)
    if not theirs.ours:
        note = theirs.notes.get(given, theirs.note) if is_plain else theirs.note
        return f"a key of {theirs.tool}; {note}"
    if theirs.values is LOSS_NAMES and str(given).lower() in NOT_OFFERED:
        return f"here it is {theirs.ours}; of {given}: {NOT_OFFERED[str(given).lower()]}"
    value = theirs.values.get(given) if is_plain else None
    if value is None and is_plain and not theirs.values and not theirs.note:
        value = given
    if value is not None:
        return f"here it is {theirs.ours} = {json.dumps(value, ensure_ascii=False)}"
    note = f" ({theirs.note})" if theirs.note else ""
    return f"here it is {theirs.ours}{note}"
