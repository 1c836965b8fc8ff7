"""The state baseline b_φ of TBPO-Q."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StateBaseline(nn.Module):
    """b_φ(s): Linear(H, 1024) – GELU – Linear(1024, 1), in fp32.

    It reads the detached hidden state that predicts a token. It has no target of its own: the
    TBPO-Q loss trains it, through its own optimizer. Its last layer starts at zero, so that
    training starts with log w = 0 and with the policy equal to the reference.

    Source: arXiv 2605.12288, section 3.1.

    Args:
        hidden_size: H, of the model.
        seed: decides the first layer's start, whatever the global random state.
    """

    WIDTH = 1024

    def __init__(self, hidden_size: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = nn.Linear(hidden_size, self.WIDTH, dtype=torch.float32)
            self.out = nn.Linear(self.WIDTH, 1, dtype=torch.float32)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, H) hidden states of any float type → (…) in fp32; no gradient reaches `hidden`."""
        with torch.autocast(hidden.device.type, enabled=False):
            activated = nn.functional.gelu(self.hidden(hidden.detach().float()))
            baseline: Tensor = self.out(activated)
            return baseline.squeeze(-1)
