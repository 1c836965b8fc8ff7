"""Architectures through the stages: the figures are those of plain transformers, or it is refused.

Here a part of them; all of them: python tests/benchmarks/architectures.py
"""

import pytest
from zoo import compare, families

QUICK = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "granite"),
    *("cohere2", "smollm3", "stablelm", "starcoder2", "arcee", "apertus", "gemma3_text"),
    *("gpt2", "opt", "bloom", "gpt_neox", "phi", "falcon"),
    *("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "afmoe", "aria_text", "axk1", "axk2"),
    *("mamba", "rwkv", "minimax", "recurrent_gemma"),
]


@pytest.mark.parametrize("kind", QUICK)
def test_an_architecture_gives_the_figures_of_plain_transformers(kind, tmp_path, tokenizer):
    found = compare.examine(kind, tmp_path, tokenizer)
    assert not found.refused
    assert not found.faults


def test_every_architecture_of_the_quick_part_is_in_the_registry():
    assert {*QUICK} <= {*families.KINDS}
