"""LoRA's dropout: its share, its independence, and what decides it."""

import torch

from tbpo_cli.model.dropout import TokenDropout, TokenKeys

NUM_TOKENS, NUM_FEATURES = 400, 256


def mask_of(token_keys, p=0.25, seed=0, step=0, layer=0):
    """(tokens, features): whether a feature is kept."""
    source = TokenKeys()
    source.set(token_keys, seed, step)
    dropped = TokenDropout(p, layer, source).train()(torch.ones(*token_keys.shape, NUM_FEATURES))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    return dropped.flatten(0, -2) > 0


def test_a_quarter_is_dropped_of_every_token_and_every_feature():
    """Of 256 and of 400 draws with p = 1/4: within five standard deviations, 0.027 and 0.022."""
    kept = mask_of(torch.arange(NUM_TOKENS)[None]).float()
    assert abs(kept.mean() - 0.75) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5
    assert (kept.mean(1) - 0.75).abs().max() < 5 * 0.0271
    assert (kept.mean(0) - 0.75).abs().max() < 5 * 0.0217


def test_masks_of_other_tokens_steps_seeds_and_layers_are_independent():
    """Two independent masks with p = 1/4 agree in 1/16 + 9/16 of the places."""
    keys = torch.arange(NUM_TOKENS)[None]
    first = mask_of(keys)
    others = {
        "token": mask_of(keys + 1),
        "pair": mask_of(keys + (1 << 26)),
        "side": mask_of(keys + (1 << 24)),
        "step": mask_of(keys, step=1),
        "seed": mask_of(keys, seed=1),
        "largest seed": mask_of(keys, seed=2**32 - 1),
        "layer": mask_of(keys, layer=1),
        "feature": first.roll(1, dims=1),
    }
    for name, other in others.items():
        agreement = (first == other).float().mean()
        assert abs(agreement - 0.625) < 0.01, name


def test_the_mask_of_a_token_does_not_depend_on_its_place():
    keys = torch.arange(NUM_TOKENS)
    order = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(0))
    moved = mask_of(keys[order].view(4, -1))
    assert torch.equal(moved, mask_of(keys[None])[order])


def test_without_a_key_for_each_token_torchs_generator_decides():
    """Of no batch, or where a layer sees other tokens than the model's input, as experts do."""
    for token_keys in (None, torch.arange(NUM_TOKENS)[None]):
        source = TokenKeys()
        source.set(token_keys, 0, 0)
        dropout = TokenDropout(0.25, 0, source).train()
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(dropout(torch.ones(NUM_TOKENS // 2, NUM_FEATURES)))
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        assert set(found[0].unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert abs((found[0] > 0).float().mean() - 0.75) < 0.01


def test_nothing_is_dropped_outside_of_training():
    source = TokenKeys()
    source.set(torch.zeros(1, 3, dtype=torch.int64), 0, 0)
    x = torch.randn(1, 3, 5)
    assert TokenDropout(0.5, 0, source).eval()(x) is x
