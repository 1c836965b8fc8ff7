"""Plots every generator's loss L_h and its gradient over z = log R: results/generators.svg.

pip install matplotlib && python tests/benchmarks/generators.py
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from common import RESULTS

from tbpo_cli.core import build_generator

SHOWN = {
    "logistic (DPO)": ("logistic", {}),
    "kliep": ("kliep", {}),
    "lsif": ("lsif", {}),
    "ba λ = 0.5": ("ba", {"lam": 0.5}),
    "sba λ = −0.5, s = 4": ("sba", {"lam": -0.5}),
    "sba λ = 0, s = 4 (TBPO)": ("sba", {"lam": 0.0}),
    "sba λ = 0.5, s = 4 (BPO)": ("sba", {"lam": 0.5}),
}


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "tbpo"})
    figure, (losses, gradients) = plt.subplots(1, 2, figsize=(9, 3.6))
    z = torch.linspace(-4, 2, 241, dtype=torch.float64, requires_grad=True)
    for label, (name, fields) in SHOWN.items():
        loss = build_generator(name, **fields).loss(z)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        at_zero = loss[160].item()  # z = 0
        width = 2.2 if "TBPO" in label else 1.2
        losses.plot(z.detach(), loss.detach() - at_zero, label=label, linewidth=width)
        gradients.plot(z.detach(), gradient, linewidth=width)
    losses.set(xlabel="z = log R", ylabel="L_h(z) − L_h(0)", ylim=(-4, 4), title="loss")
    gradients.set(
        xlabel="z = log R",
        ylabel="dL_h / dz",
        ylim=(0, 3),
        title="gradient (0: a learned token stops pulling)",
    )
    for axes in (losses, gradients):
        axes.axvline(0, color="0.8", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    losses.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "generators.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
