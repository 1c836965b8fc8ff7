"""Architectures through the stages: the figures are those of plain transformers, or it is refused.

Here a part of them; all of them: python tests/benchmarks/architectures.py
"""

import pytest
import torch
from zoo import compare, families

from tbpo_cli.config.training import Lora, Model
from tbpo_cli.model.adapters import continued_adapter, new_adapter
from tbpo_cli.model.base import load_base
from tbpo_cli.model.probes import num_positions, set_attention

QUICK = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "granite"),
    *("cohere2", "smollm3", "stablelm", "starcoder2", "arcee", "apertus", "gemma3_text"),
    *("gpt2", "opt", "bloom", "gpt_neox", "phi", "falcon"),
    *("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "afmoe", "aria_text", "axk1", "axk2"),
    *("mamba", "rwkv", "minimax", "recurrent_gemma", "blt", "gemma3n_text"),
]


@pytest.mark.parametrize("kind", QUICK)
def test_an_architecture_gives_the_figures_of_plain_transformers(kind, tmp_path, tokenizer):
    found = compare.examine(kind, tmp_path, tokenizer)
    assert not found.refused
    assert not found.faults


def test_every_architecture_of_the_quick_part_is_in_the_registry():
    assert {*QUICK} <= {*families.KINDS}


@pytest.mark.parametrize(
    "kind",
    [
        "gemma3",  # its vision tower has a table of a few positions
        "gemma4",  # layers of its vision tower have the names of text layers; its sound, no SDPA
        "deepseek_v4",  # a linear layer of its own kind returns a product for each group
        "inkling2_text",  # peft renames some of an adapter's weights as it loads them
    ],
)
def test_a_new_adapter_of_a_model_with_parts_of_its_own_loads_as_it_was_saved(
    kind, tmp_path, tokenizer
):
    families.build(kind, tokenizer).save_pretrained(tmp_path / "base")
    model = Model(base=str(tmp_path / "base"), lora=Lora(r=2, dropout=0.0))
    ids = torch.arange(3, 11)[None]

    def loaded():
        return load_base(model, model.base, torch.device("cpu"), torch.float32)

    adapted = new_adapter(loaded(), model)
    before = adapted(input_ids=ids).logits
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    trained = adapted(input_ids=ids).logits
    assert not torch.allclose(trained, before)
    adapted.save_pretrained(tmp_path / "adapter")
    again = continued_adapter(loaded(), tmp_path / "adapter", None, model)
    assert torch.allclose(again(input_ids=ids).logits, trained, atol=1e-5)
    assert (num_positions(again) or 512) >= 512
    if kind == "gemma4":
        set_attention(again, "sdpa")
