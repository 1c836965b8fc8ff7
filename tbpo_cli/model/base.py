"""A base model from its folder or Hub repository: all of its weights, and nothing made up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from tbpo_cli import console
from tbpo_cli.config.recipe import Model
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.fused import fuse_norms
from tbpo_cli.model.loading_errors import refused_with_a_reason
from tbpo_cli.model.policy import special_tokens_of
from tbpo_cli.model.probes import check_causality
from tbpo_cli.model.quantization import quantization
from tbpo_cli.model.rotary import fuse_rotary
from tbpo_cli.model.rows import Place, WholeOnlyError, read_rows, shapes_of
from tbpo_cli.model.sharding import LanguageModel, Shards, shard

CPU = torch.device("cpu")
SHOWN_KEYS = 6
# Buffers that old checkpoints hold, and that today's architectures compute.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.masked_bias|\.attn\.bias|\.attention\.bias)$")
# What configs make a model return besides logits.
OUTPUTS = ("output_router_logits", "output_attentions", "output_hidden_states")


def compute_dtype(model: Model, device: torch.device) -> torch.dtype:
    """`model.dtype`; "auto" is bfloat16 on a GPU that has it, float32 elsewhere."""
    if model.dtype != "auto":
        return cast(torch.dtype, getattr(torch, model.dtype))
    if device.type != "cuda":
        return torch.float32
    # Older GPUs emulate it, several times as slow as fp32.
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def load_base(
    model: Model,
    source: str,
    device: torch.device,
    dtype: torch.dtype | str,
    shards: Shards | None = None,
) -> LanguageModel:
    """A causal language model from safetensors, or with random weights from its config.

    1. Read the config, and refuse an index that names other files than safetensors.
    2. Load the weights; refuse what the checkpoint lacks, has too much or in another shape.
    3. Turn off what is the base's own habit: dropout, outputs besides the logits, and the settings
       of its generation config.
    4. Put in the fused layers, move it to the device, and check that no token sees a later one.

    Of sharded weights step 2 gives shapes alone, and each process reads its own rows before the
    check. Where transformers has to change weights as it loads them, each process loads the whole
    model in the CPU's memory, and keeps its rows after the check.

    Args:
        model: the recipe's table; its base is loaded with random weights if it says so.
        source: a folder, or the id of a Hub repository.
        device: where the weights are put; a quantized model is loaded there.
        dtype: of the weights, or "auto": that of the checkpoint.
        shards: how the weights are sharded; None: this process has all of them.

    Raises:
        TbpoError: if it cannot be loaded whole, or is no causal language model.
    """
    torch.backends.cuda.matmul.allow_tf32 = True  # for training and evaluation alike
    if model.trust_remote_code:
        what = "model.trust_remote_code = true: code from"
        console.say(f"WARNING: {what} {source} runs with your rights")
    places: dict[str, Place] = {}
    with refused_with_a_reason(source, "model.base"):
        config = AutoConfig.from_pretrained(source, **_hub(model))
        own_dtype = config.dtype
        loaded = None
        if shards is not None:
            loaded, places = _shapes(model, source, config, dtype)
        if loaded is None:
            place = device if shards is None else CPU
            loaded = _whole_model(model, source, config, dtype, place)
    loaded.config.dtype = own_dtype  # what it is saved in
    _turn_habits_off(loaded)
    fuse_norms(loaded)
    fuse_rotary(loaded)
    if shards is not None and places:
        shard(loaded, shards)
        with refused_with_a_reason(source, "model.base"):
            read_rows(loaded, places, device)
    elif shards is None and model.quantization is None:
        loaded = loaded.to(device)
    check_causality(loaded, source)
    if shards is not None and not places:
        shard(loaded, shards)
    return loaded


def _turn_habits_off(model: LanguageModel) -> None:
    """Turns off what the base does of its own, and notes how it was published."""
    # peft and lm-eval generate with the model's own config: only its tokens may take part.
    model.published_generation_config = model.generation_config
    if model.generation_config is not None:
        model.generation_config = special_tokens_of(model.generation_config)
    model.published_outputs = turn_outputs_off(model.config)
    turn_noise_off(model)


def _hub(model: Model) -> dict[str, Any]:
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def _attention(model: Model) -> str | None:
    return None if model.attention == "auto" else model.attention


def _shapes(
    model: Model, source: str, config: Any, dtype: torch.dtype | str
) -> tuple[LanguageModel | None, dict[str, Place]]:
    """`shapes_of`; None, after a line that says why, if its rows cannot be read alone."""
    try:
        if _is_random(model, source):
            raise WholeOnlyError('model.initial_weights = "random"')
        _check_index(source, "model.base", model.revision)
        assert isinstance(dtype, torch.dtype)
        return shapes_of(config, source, model.revision, dtype, _attention(model))
    except WholeOnlyError as reason:
        console.say(f"each process loads all weights before it keeps its part: {reason}")
        return None, {}


def _is_random(model: Model, source: str) -> bool:
    return model.initial_weights == "random" and source == model.base


def _whole_model(
    model: Model, source: str, config: Any, dtype: torch.dtype | str, device: torch.device
) -> LanguageModel:
    """All weights of a model; on a GPU they are put there one by one."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": _attention(model)}
    if _is_random(model, source):
        options["trust_remote_code"] = model.trust_remote_code
        return AutoModelForCausalLM.from_config(config, **options)
    if model.quantization is not None:
        options["quantization_config"] = quantization(dtype, device)
    if model.quantization is not None or device.type == "cuda":
        options["device_map"] = {"": device}
    return load_whole(AutoModelForCausalLM, source, "model.base", **options, **_hub(model))


def load_whole(kind: Any, source: str, key: str, **options: Any) -> LanguageModel:
    """A model of one of transformers' Auto classes, every weight of which is in the checkpoint.

    Args:
        kind: AutoModelForCausalLM, AutoModelForSequenceClassification, ….
        source: a folder, or the id of a Hub repository.
        key: the recipe's key that names it, for the message.
        options: of `from_pretrained`.

    Raises:
        TbpoError: with the names of the weights that are missing, unexpected or of another shape.
    """
    _check_index(source, key, options.get("revision"))
    loaded, found = kind.from_pretrained(
        source,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, with their names
        **options,
    )
    buffers = {name for name, _ in loaded.named_buffers()}
    tied = set(getattr(loaded, "all_tied_weights_keys", None) or {})
    unexpected = sorted(
        name
        for name in found["unexpected_keys"]
        if name not in buffers | tied and not COMPUTED.search(name)
    )
    faults = {
        "lacks": sorted(set(found["missing_keys"]) - tied),
        "has in another shape": sorted(str(key[0]) for key in found["mismatched_keys"]),
        "has, and the architecture does not,": unexpected,
    }
    said = [f"{how} {_some(names)}" for how, names in faults.items() if names]
    if not said and not found.get("error_msgs"):
        return loaded
    said += [str(message).splitlines()[0] for message in found.get("error_msgs") or ()]
    made = (loaded.config.architectures or ["another model"])[0]
    raise TbpoError(
        f"the checkpoint is not that of a {type(loaded).__name__}: it {'; it '.join(said)}",
        f"{key} = {source!r}",
        f"every weight of a {type(loaded).__name__}, and no others; the config names {made}",
        "copy or download the checkpoint again, or name the model that has these weights",
    )


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN_KEYS
    return ", ".join(names[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")


def _check_index(source: str, key: str, revision: str | None) -> None:
    """An index may name files elsewhere, or pickles: only safetensors beside it are taken."""
    options = {"_raise_exceptions_for_missing_entries": False, "revision": revision}
    path = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
    if path is None:
        return
    fault = TbpoError(
        "the index of the weights is not one",
        str(path),
        "a JSON object whose weight_map gives the *.safetensors beside it that holds each weight",
        f"copy or download the model again: {key} = {source!r}",
    )
    try:
        index = json.loads(Path(path).read_text(encoding="utf-8"))
        files = set(index["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fault from error
    for name in files:
        is_beside = isinstance(name, str) and not {"/", "\\"} & set(name)
        if not is_beside or not name.endswith(".safetensors"):
            fault.what = f"the index of the weights names a file that is not loaded: {name!r}"
            raise fault


def turn_noise_off(model: nn.Module) -> None:
    """Sets every probability of dropout and layer drop in a model to zero.

    `Policy.train` keeps most of a model in evaluation mode. What is left to turn off is in layers
    that have to be in training mode for activation checkpointing, and use a number of their own.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            # Not routers' jitter: they read it in evaluation mode too, as a threshold.
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def turn_outputs_off(config: Any) -> list[tuple[Any, str]]:
    """Makes a model return no router logits, attentions or hidden states besides its logits.

    They take memory, and with router logits transformers' own loss is computed at each pass, for
    which a step of a generation has not the mask.

    Returns:
        The configs, that of the model or of its language part, and what each had turned on.
    """
    found = []
    for part in {id(each): each for each in (config, config.get_text_config())}.values():
        for name in OUTPUTS:
            if getattr(part, name, False):
                setattr(part, name, False)
                found.append((part, name))
    return found
