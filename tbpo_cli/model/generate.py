"""Completions of prompts by a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from tbpo_cli.recipe import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPTS_AT_A_TIME = 200


@torch.no_grad()
def complete(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], settings: Sample, seed: int
) -> list[str]:
    """One completion a prompt, without the end-of-turn token.

    Args:
        prompts: texts of one user turn each, rendered with the tokenizer's chat template.
        settings: temperature (0: greedy), top_p and max_new_tokens.
        seed: decides the draws, together with the order of the prompts.

    Returns:
        The completions, in the order of the prompts; one that reached max_new_tokens is cut there.
    """
    torch.manual_seed(seed)
    model.eval()
    draw = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    completions = []
    for start in range(0, len(prompts), PROMPTS_AT_A_TIME):
        rendered = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            for text in prompts[start : start + PROMPTS_AT_A_TIME]
        ]
        rows = tokenizer(rendered, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt").to(
            model.device
        )
        generated = model.generate(
            **rows,
            **(draw if settings.temperature > 0 else {"do_sample": False}),
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
        )
        completions += tokenizer.batch_decode(generated[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)
    return completions
