"""LoRA's dropout, drawn for a token from what the token is and not from where it stands.

So neither the layout, the micro-batches nor the number of processes change what is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbpo_cli.model.sharding import LanguageModel

BITS = 24  # of a random number: as many as a float32 has
# Odd constants of splitmix64, as signed integers. Source: Steele, Lea and Flood, "Fast splittable
# pseudorandom number generators" (2014), section 5.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


def mixed(values: Tensor) -> Tensor:
    """splitmix64's finalizer: int64 values → values whose bits look random, of the same shape."""
    values = (values ^ _shifted(values, 30)) * FIRST
    values = (values ^ _shifted(values, 27)) * SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's keeps the sign."""
    shifted: Tensor = (values >> bits) & (2 ** (64 - bits) - 1)
    return shifted


@dataclass
class TokenKeys:
    """A key for each token of the model's next pass.

    Args:
        keys: (lines, L) int64; None: dropout is drawn from torch's own generator.
    """

    keys: Tensor | None = None

    def set(self, token_keys: Tensor | None, seed: int, step: int) -> None:
        """Makes the keys of a step from those that say which token of which pair it is."""
        if token_keys is None:
            self.keys = None
            return
        # On the CPU, as a number: a tensor would be copied to the device while that waits.
        of_step = int(mixed(torch.tensor(seed) * GAMMA + step))
        self.keys = mixed(token_keys * GAMMA + of_step)


class TokenDropout(nn.Module):
    """Dropout whose mask is a function of a token's key, the layer and the feature.

    Layers that see other tokens than the model's input, as experts do, draw from torch's generator.
    """

    def __init__(self, p: float, layer: int, source: TokenKeys) -> None:
        super().__init__()
        self.p = p
        self.layer = layer
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        """(…, F) → the same shape: each feature is 0 with probability p, else divided by 1 − p."""
        keys = self.source.keys
        if not self.training or self.p == 0:
            return x
        if keys is None or keys.numel() * x.shape[-1] != x.numel():
            return F.dropout(x, self.p)
        features = torch.arange(x.shape[-1], device=x.device) + self.layer * 2**32
        random = mixed(keys.reshape(*x.shape[:-1], 1) + features * GAMMA)
        is_kept = (random & (2**BITS - 1)) >= int(self.p * 2**BITS)
        scaled: Tensor = x * is_kept.to(x.dtype).div_(1 - self.p)
        return scaled


def use_token_dropout(model: LanguageModel) -> TokenKeys | None:
    """Replaces the dropout of a model's LoRA layers; None if it has none."""
    source = TokenKeys()
    layers = [module for module in model.modules() if hasattr(module, "lora_dropout")]
    num_replaced = 0
    for number, layer in enumerate(layers):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout) and dropout.p > 0:
                layer.lora_dropout[name] = TokenDropout(dropout.p, number, source)
                num_replaced += 1
    return source if num_replaced else None
