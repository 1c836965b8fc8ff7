"""The output head of a model, read once."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tbpo_cli.core.head import Head
from tbpo_cli.model.out_of_memory import refuse_as_answer
from tbpo_cli.model.probes import evaluating, text_config
from tbpo_cli.model.sharding import LanguageModel, backbone, causal_model, gathered

PROBE_TOKENS = 8


def hidden_states(model: LanguageModel, inputs: dict[str, Any]) -> Tensor:
    """(lines, L, H): what the output head reads."""
    causal = causal_model(model)
    run = getattr(causal, "sharded_backbone", None) or backbone(causal)
    states: Tensor = run(**inputs).last_hidden_state
    return states


def gathered_head(head: Head) -> Head:
    """The head with whole weights, where they are sharded; all processes call it."""
    return replace(head, weight=gathered(head.weight), bias=gathered(head.bias))


def read_head(model: LanguageModel, compute: torch.dtype | None = None) -> Head | None:
    """What the model's output head computes, checked against the model's own logits.

    Weights without numbers ("meta") are not checked.

    Args:
        compute: the dtype of the model's own logits; None: that of the head's weight.

    Returns:
        None, after a warning, if it is no linear layer on the last hidden state.
    """
    linear = causal_model(model).get_output_embeddings()
    config = text_config(model)
    if getattr(type(linear), "forward", None) is not nn.Linear.forward:
        return _unknown_head(f"it is a {type(linear).__name__}")
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is None:
        softcap = getattr(config, "logits_soft_cap", None)
    head = Head(weight=linear.weight, bias=linear.bias, scale=scale / divisor, softcap=softcap)
    if linear.weight.is_meta:
        return head
    ids = torch.arange(1, 1 + PROBE_TOKENS, device=linear.weight.device) % config.vocab_size
    inputs = {"input_ids": ids[None], "use_cache": False}
    try:
        with evaluating(model):
            logits = model(**inputs).logits[0].float()
            rebuilt = gathered_head(head).logits(hidden_states(model, inputs)[0]).float()
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        refuse_as_answer(error)
        return _unknown_head(f"its hidden states cannot be read: {str(error).splitlines()[0]}")
    is_half = (compute or linear.weight.dtype) in (torch.bfloat16, torch.float16)
    tolerance = 0.02 if is_half else 1e-4
    shapes_differ = logits.shape != rebuilt.shape
    if shapes_differ or (logits - rebuilt).abs().max() > tolerance * (1 + logits.abs().max()):
        return _unknown_head("its logits are not those of a linear layer on the last hidden state")
    return head


def _unknown_head(reason: str) -> Head | None:
    logging.getLogger("tbpo").warning(
        "the output head is unknown (%s): scoring falls back to dense logits", reason
    )
    return None
