"""The layers of a model that a new LoRA adapter is put on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tbpo_cli.model.probes import NOT_TEXT
from tbpo_cli.model.sharding import LanguageModel, causal_model, text_decoder

# What multiplies an expert in a mixture, by the names that transformers gives to such layers.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "classifier"})
# peft would put adapters on all experts at once for these names, router included.
EXPERT_LAYERS = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"})
# The fused kernels of these models read the weight of the layer, past any adapter on it.
MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})


def text_layers(model: LanguageModel) -> list[str]:
    """The linear layers that a new adapter is put on where the recipe says "all-linear".

    All of the language part, but not: the output head; routers of a mixture of experts; its experts
    where they are one tensor (then no layer of an expert is adapted, nor one of the same name);
    what a model has for images or sound; the output projections of Mamba, which its kernels read
    past an adapter; layers that share one weight, which cannot be merged.

    Returns:
        Names of the last part alone ("q_proj") where no other layer has it, else whole names.
    """
    causal = causal_model(model)
    head = causal.get_output_embeddings()
    decoder = text_decoder(causal)
    inside = {id(module) for module in decoder.modules()}
    uses = Counter(id(module.weight) for module in causal.modules() if hasattr(module, "weight"))
    has_fused_experts = any(weight.ndim == 3 for weight in decoder.parameters())
    left_out = ROUTERS | (EXPERT_LAYERS if has_fused_experts else frozenset())
    if getattr(causal.config, "model_type", "") in MAMBA_TYPES:
        left_out = left_out | {"out_proj"}
    chosen: list[str] = []
    others: list[str] = []
    for name, module in causal.named_modules():
        parts = name.split(".")
        takes_part = (
            isinstance(module, nn.Linear | Conv1D)
            and module is not head
            and id(module) in inside
            and uses[id(module.weight)] == 1
            and not _computes_otherwise(module)
            and not left_out & set(parts[-2:])
            and not any(word in part for part in parts for word in NOT_TEXT)
        )
        (chosen if takes_part else others).append(name)
    lasts = {name.rsplit(".", 1)[-1] for name in chosen}
    ambiguous = {name.rsplit(".", 1)[-1] for name in others}
    # peft takes "x" as the end of any name: one that is only a number would match too much.
    is_clear = not lasts & ambiguous and not any(last.isdigit() for last in lasts)
    return sorted(lasts if is_clear else chosen)


def _computes_otherwise(module: nn.Module) -> bool:
    """Whether a model's own kind of linear layer returns something else than a product.

    Routers of Llama 4 return two tensors. Its code is tried on a small linear layer.
    """
    kind: Any = type(module)
    is_of_a_model = kind.__module__.startswith(("transformers.models.", "transformers_modules."))
    if not is_of_a_model or kind.forward is nn.Linear.forward:
        return False
    plain = nn.Linear(3, 2)
    inputs = torch.linspace(-1, 2, 12).reshape(2, 2, 3)
    try:
        return not torch.allclose(kind.forward(plain, inputs), plain(inputs))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return True
