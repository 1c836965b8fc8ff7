"""One training step of a small policy: of any loss, layout, precision, and kind of training."""

import copy

import numpy as np
import torch

from tbpo_cli.batch.batches import cut_to_span
from tbpo_cli.batch.layouts import collate
from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.core import StateBaseline
from tbpo_cli.data.tokens import TokenizedPair
from tbpo_cli.model.load import load_policy
from tbpo_cli.model.scoring import Scorer

TRAINED = {"adapter": (), "all weights": ("model.lora=none",)}
LENGTHS = [(5, 6, 4), (3, 1, 7), (9, 4, 1), (2, 5, 5), (1, 1, 1)]  # prompt, chosen, rejected


def make_pairs(vocab_size):
    """Pairs of random tokens, of LENGTHS."""
    rng = np.random.default_rng(0)
    return [
        TokenizedPair(str(number), *(rng.integers(3, vocab_size, size=n).tolist() for n in lengths))
        for number, lengths in enumerate(LENGTHS)
    ]


def make_scorer(recipe_file, loss, trained, dtype, device):
    """A policy that differs from its reference, the loss's helpers, and a baseline not of zeros."""
    sets = (f"model.dtype={dtype}", *TRAINED[trained])
    if trained == "adapter":
        sets += ("model.lora.dropout=0.0",)
    policy = load_policy(load_recipe(recipe_file, sets), torch.device(device), None, True)
    generator = torch.Generator().manual_seed(1)

    def disturb(weights):
        for weight in weights:
            noise = 0.05 * torch.randn(weight.shape, generator=generator)
            weight.data.add_(noise.to(weight.device, weight.dtype))

    disturb(policy.trained.values())
    for view in loss.helpers:
        other = copy.deepcopy(policy.model).requires_grad_(False)
        disturb(p for name, p in other.named_parameters() if name in policy.trained)
        policy.frozen[view] = other
    baseline = None
    if "state_baseline" in loss.needs:
        baseline = StateBaseline(policy.model.get_input_embeddings().weight.shape[1], 0).to(device)
        disturb(baseline.parameters())
    return Scorer.of(policy, baseline)


def losses_and_gradients(scorer, loss, batches):
    """({pair: loss}, {name of a trained weight: gradient}), on the CPU in fp32."""
    weights = scorer.policy.trained
    if scorer.baseline is not None:
        weights = weights | dict(scorer.baseline.named_parameters())
    losses = {}
    for weight in weights.values():
        weight.grad = None
    scorer.policy.train()
    for batch in batches:
        values = loss(scorer.score(batch, loss.needs)).per_pair
        values.sum().backward()
        losses |= dict(zip(batch.pair_ids, values.tolist(), strict=True))
    grads = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    return losses, {name: grad.cpu().float() for name, grad in grads.items()}


def collated(pairs, loss, layout, device):
    """The pairs as the loss reads them, in one batch."""
    cut = [cut_to_span(pair, loss.span) for pair in pairs]
    return collate(cut, layout, tuple(range(len(cut))), True).to(torch.device(device))
