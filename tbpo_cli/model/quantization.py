"""Weights in 4 bits, by bitsandbytes."""

from __future__ import annotations

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from tbpo_cli.errors import TbpoError


def quantization(dtype: torch.dtype | str, device: torch.device) -> BitsAndBytesConfig:
    """How a base is loaded in 4 bits (NF4, with the scales quantized, too).

    Args:
        dtype: of the matrix products.

    Raises:
        TbpoError: on a CPU, or without bitsandbytes.
    """
    key = 'model.quantization = "nf4"'
    if device.type == "cpu":  # there, bitsandbytes has no gradient after a pass for inference
        raise TbpoError(
            "4-bit weights need a GPU", key, "a CUDA device", "leave model.quantization out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TbpoError(
            "4-bit weights need bitsandbytes, which is not installed",
            key,
            "the optional extra `quantization`",
            "pip install 'tbpo[quantization]'",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )
