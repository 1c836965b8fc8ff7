"""An adapter's weights added to its base: a model that needs no peft."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from tbpo_cli.config.recipe import Model
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.adapters import continued_adapter
from tbpo_cli.model.base import load_base
from tbpo_cli.model.policy import generation_config, published_config
from tbpo_cli.model.sharding import LanguageModel


def merge_adapter(model: Model, adapter: Path, folder: Path, max_shard_size: str) -> None:
    """Writes the merged model: sharded safetensors, its config and its generation config.

    1. Load the base in its own dtype; a quantized one as it is before quantization.
    2. Untie head and embeddings if an adapter is on one of them: only that one changes.
    3. Add each product to its weight, in fp32, and round the sum once.
    4. Take the adapter's layers out, and write the model with the end tokens of the adapter.

    Raises:
        TbpoError: if layers share a weight, so that no sum is right for all.
    """
    base = load_base(replace(model, quantization=None), model.base, torch.device("cpu"), "auto")
    was_tied = _is_tied(base)
    adapted = continued_adapter(base, adapter, None, model, trains=False)
    ends = (base.get_output_embeddings(), base.get_input_embeddings())
    if was_tied and any(isinstance(module, BaseTunerLayer) for module in ends):
        head: Any = ends[0].get_base_layer() if isinstance(ends[0], BaseTunerLayer) else ends[0]
        head.weight = nn.Parameter(head.weight.detach().clone())
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    # An adapter on the fused experts of a mixture names the parameter that it changes.
    names = [getattr(layer, "parameter_name", "weight") for layer in layers]
    weights = [
        layer.get_base_layer().get_parameter(name)
        for layer, name in zip(layers, names, strict=True)
    ]
    _check_shares_nothing(layers, weights, adapter)
    for layer, weight in zip(layers, weights, strict=True):
        dtype = weight.dtype
        weight.data = weight.data.float()
        layer.merge()
        weight.data = weight.data.to(dtype)
    merged = adapted.unload()
    if was_tied and not _is_tied(merged):
        merged.config.tie_word_embeddings = False
        merged.config.get_text_config().tie_word_embeddings = False
    published = generation_config(merged, saved_end_ids(adapter))
    with published_config(merged):
        merged.save_pretrained(folder, max_shard_size=max_shard_size)
    published.save_pretrained(folder)


def _check_shares_nothing(
    layers: list[BaseTunerLayer], weights: list[nn.Parameter], adapter: Path
) -> None:
    """Raises TbpoError if two layers with adapters of their own share one weight.

    They do in Zamba, and where tokens of tied embeddings are trained.
    """
    uses = Counter(map(id, weights))
    shared = [layer for layer, weight in zip(layers, weights, strict=True) if uses[id(weight)] > 1]
    if not shared:
        return
    what = "layers that share one weight have adapters of their own"
    fix = "publish the adapter without merging, or leave those layers out of target_modules"
    if any(isinstance(layer, TrainableTokensLayer) for layer in shared):
        what = "its trainable_token_indices change the embeddings, which the head shares (tied)"
        fix = "publish the adapter without merging, or train one without trainable_token_indices"
    expected = "an adapter on layers whose weights are their own"
    raise TbpoError(f"the adapter cannot be merged: {what}", str(adapter), expected, fix)


def _is_tied(model: LanguageModel) -> bool:
    head = model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def saved_end_ids(trained: Path) -> list[int]:
    """The tokens at which generation stops, as they were saved beside trained weights."""
    if not (trained / GENERATION_CONFIG_NAME).exists():
        return []
    ends = GenerationConfig.from_pretrained(str(trained)).eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list) else [ends]
