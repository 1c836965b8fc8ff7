"""The layers of a model that a new LoRA adapter is put on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from tbpo_cli.model.probes import NOT_TEXT
from tbpo_cli.model.sharding import LanguageModel, causal_model, text_decoder

# What multiplies an expert in a mixture, by the names that transformers gives to such layers.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "classifier"})
# The names of an expert's layers. Where experts are one tensor, peft may put an adapter on that for
# such a name, even if it is the whole name of another layer.
EXPERT_LAYERS = frozenset({"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"})
# The fused kernels of these models read the weight of the layer, past any adapter on it.
MAMBA_TYPES = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})


def text_layers(model: LanguageModel) -> list[str]:
    """The linear layers that a new adapter is put on where the recipe says "all-linear".

    All of the language part, but not: the output head; routers of a mixture of experts; its experts
    where they are one tensor, nor other layers whose names peft takes for those of such experts;
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
    left_out = ROUTERS | (EXPERT_LAYERS if _peft_takes_for_experts(causal) else frozenset())
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


def _peft_takes_for_experts(causal: LanguageModel) -> bool:
    """Whether peft takes the names of an expert's layers for experts that are one tensor.

    It does so for the checkpoints of some architectures, in which each expert was a layer.
    """
    config = LoraConfig(target_modules=sorted(EXPERT_LAYERS))
    convert_peft_config_for_transformers(config, causal, conversions=None)
    return bool(config.target_parameters)


def without_adapter(model: LanguageModel) -> list[str]:
    """What multiplies in a model's language part, and has no adapter: linear layers and experts.

    Returns:
        The last three parts of their names, without numbers; each once, in the model's order.
    """
    decoder = text_decoder(causal_model(model))
    found: list[str] = []
    adapted: list[str] = []
    for name, module in decoder.named_modules():
        if any(name.startswith(f"{outer}.") for outer in adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted.append(name)
        elif isinstance(module, nn.Linear | Conv1D):
            found.append(name)
        elif not isinstance(module, nn.Conv1d):
            weights = module.named_parameters(recurse=False)
            found += [f"{name}.{weight}" for weight, tensor in weights if tensor.ndim == 3]
    short = (
        ".".join([part for part in name.split(".") if not part.isdigit()][-3:]) for name in found
    )
    return list(dict.fromkeys(short))


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
