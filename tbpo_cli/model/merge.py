"""An adapter's weights added to its base: a model that needs no peft."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tbpo_cli.config.recipe import Model
from tbpo_cli.model.load import load_base


def merge_adapter(model: Model, adapter: Path, folder: Path, max_shard_size: str) -> None:
    """Writes the merged model: sharded safetensors in the base's own dtype, its config and its generation config.

    Each sum is made in fp32 and rounded once; a quantized base is taken as it is before quantization. An adapter on a
    head or on embeddings that are tied to each other unties them, since only one of the two changes.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = load_base(replace(model, quantization=None), model.base, torch.device("cpu"), "auto")
    merged = PeftModel.from_pretrained(base, adapter)
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    is_tied = head is not None and head.weight is embeddings.weight
    if is_tied and any(isinstance(module, BaseTunerLayer) for module in (head, embeddings)):
        linear: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        linear.weight = nn.Parameter(linear.weight.detach().clone())
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    for layer in (module for module in merged.modules() if isinstance(module, BaseTunerLayer)):
        weight = layer.get_base_layer().get_parameter("weight")
        dtype, weight.data = weight.dtype, weight.data.float()
        layer.merge()
        weight.data = weight.data.to(dtype)
    merged.unload().save_pretrained(folder, max_shard_size=max_shard_size)
