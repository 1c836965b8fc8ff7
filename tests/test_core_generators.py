"""Generators against their definitions, and what they are for: recovery of the optimal policy."""

import math

import pytest
import torch

from tbpo_cli.core import GENERATORS, build_generator

GENERATOR_FIELDS = {
    "logistic": [{}],
    "kliep": [{}],
    "lsif": [{}],
    "ba": [{"lam": -0.5}, {"lam": 0.0}, {"lam": 0.5}, {"lam": 1.0}],
    "sba": [{"lam": lam, "scale": scale} for lam in (-0.5, 0.0, 0.5, 1.0) for scale in (2.0, 4.0)],
}
EVERY_GENERATOR = [
    (name, kwargs) for name, settings in GENERATOR_FIELDS.items() for kwargs in settings
]


# ---- generators


@pytest.mark.parametrize(("name", "kwargs"), EVERY_GENERATOR)
def test_every_generators_loss_is_its_definition_up_to_a_constant(name, kwargs):
    """L_h = h'(R) R − h(R) − h'(1/R), with h' by automatic differentiation."""
    generator = build_generator(name, **kwargs)
    z = torch.linspace(-3, 3, 41, dtype=torch.float64)

    def derivative(ratio):
        ratio = ratio.detach().requires_grad_()
        return torch.autograd.grad(generator.h(ratio).sum(), ratio)[0]

    ratio = z.exp()
    definition = derivative(ratio) * ratio - generator.h(ratio) - derivative(1 / ratio)
    difference = generator.loss(z) - definition
    torch.testing.assert_close(
        difference, difference[:1].expand_as(difference), rtol=1e-9, atol=1e-9
    )


def test_h_of_every_generator_is_the_one_of_its_paper():
    """At R = 4. The loss does not tell: a linear part of h is a constant in it."""
    four = torch.tensor(4.0, dtype=torch.float64)
    for (name, given), value in {
        ("logistic", ()): (4 * math.log(4) - 5 * math.log(5)) / 2,
        ("kliep", ()): 4 * math.log(4) - 4,
        ("lsif", ()): 9.0,
        ("ba", (("lam", 0.5),)): (8 - 4) / 0.5,
        ("ba", (("lam", 0.0),)): 4 * math.log(4) - 4,
        ("sba", (("lam", 0.5), ("scale", 2.0))): (8 - 4) / (2 * 0.5 * 1.5),
    }.items():
        assert build_generator(name, **dict(given)).h(four).item() == pytest.approx(value), name


@pytest.mark.parametrize(("name", "kwargs"), EVERY_GENERATOR)
def test_every_generators_h_is_convex(name, kwargs):
    ratio = torch.linspace(0.01, 9, 500, dtype=torch.float64)
    h = build_generator(name, **kwargs).h(ratio)
    assert (h[2:] - 2 * h[1:-1] + h[:-2] > 0).all()


@pytest.mark.parametrize(("name", "kwargs"), EVERY_GENERATOR)
def test_every_generator_increases_with_the_ratio_and_is_finite_beyond_the_clip(name, kwargs):
    z = torch.tensor([-1e4, -31.0, -5.0, 0.0, 5.0, 31.0, 1e4], requires_grad=True)
    loss = build_generator(name, **kwargs).loss(z)
    loss.sum().backward()
    assert loss.isfinite().all() and z.grad.isfinite().all()
    assert (z.grad[2:5] > 0).all()
    assert (z.grad[[0, 1, 5, 6]] == 0).all(), "no gradient outside the clip at ±30"


def test_sba_gradient_saturates_as_documented():
    """dL/dz = (R^{1+λ} + R^{−λ})/s as R → 0: 1/s for λ = 0, no bound for λ > 0, 0 for λ < 0."""
    z = torch.tensor([-20.0], dtype=torch.float64, requires_grad=True)
    slope = {
        lam: torch.autograd.grad(build_generator("sba", lam=lam, scale=4.0).loss(z).sum(), z)[
            0
        ].item()
        for lam in (-0.5, 0.0, 0.5)
    }
    assert slope[0.0] == pytest.approx(0.25)
    assert slope[0.5] == pytest.approx(math.exp(10) / 4)
    assert slope[-0.5] == pytest.approx(2 * math.exp(-10) / 4)


def test_sba_with_scale_4_has_the_gradient_of_dpo_where_the_policy_is_the_reference():
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sba, logistic = (
        torch.autograd.grad(generator.loss(z).sum(), z)[0].item()
        for generator in (build_generator("sba", lam=0.0, scale=4.0), build_generator("logistic"))
    )
    assert sba == pytest.approx(logistic)


# ---- recovery


class World:
    """3 states, 4 actions, known Q_ref; each comparison (s, y), (s', y') has its exact weight."""

    beta = 0.5

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.reference = torch.randn(3, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
        self.q = torch.randn(3, 4, generator=generator, dtype=torch.float64) + torch.tensor(
            [[-1.0], [0.0], [1.0]]
        )
        self.optimum = (self.reference + self.q / self.beta).log_softmax(-1)  # log π*
        kl = (self.reference.exp() * (self.reference - self.optimum)).sum(-1, keepdim=True)
        self.advantage = self.beta * (self.optimum - self.reference + kl)  # A_ref

    def distance(self, policy):
        """Largest KL(π* ‖ π_θ) over the states."""
        return (self.optimum.exp() * (self.optimum - policy)).sum(-1).max().item()

    def fit(self, loss_of_ratio, preference, *, kl=False, baseline=False):
        """log π_θ that minimises E[L(log R)], as a softmax table (and an uncentred table b(s))."""
        logits = self.reference.clone().requires_grad_()
        b = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        wins = torch.sigmoid(preference.flatten()[:, None] - preference.flatten()[None, :])
        weights = (
            torch.outer(*[self.reference.exp().flatten()] * 2) * wins
        )  # P(s,y) P(s',y') P((s,y) ≻ (s',y'))
        optimizer = torch.optim.LBFGS(
            [logits, b],
            max_iter=2000,
            tolerance_grad=1e-13,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )

        def score():
            policy = logits.log_softmax(-1)
            ratio = policy - self.reference
            if kl:
                ratio = ratio + (self.reference.exp() * -ratio).sum(-1, keepdim=True)
            return self.beta * ratio + (b[:, None] if baseline else 0.0)

        def closure():
            optimizer.zero_grad()
            s = score().flatten()
            value = (weights * loss_of_ratio(s[None, :] - s[:, None])).sum()
            value.backward()
            return value

        for _ in range(5):
            optimizer.step(closure)
        return logits.detach().log_softmax(-1)


@pytest.mark.parametrize(("name", "kwargs"), EVERY_GENERATOR)
def test_tbpo_recovers_the_optimal_policy(name, kwargs):
    world, generator = World(), build_generator(name, **kwargs)
    assert (
        world.distance(world.fit(generator.loss, world.advantage, kl=True)) < 1e-9
    )  # TBPO-A, S = A_ref
    assert (
        world.distance(world.fit(generator.loss, world.q, baseline=True)) < 1e-9
    )  # TBPO-Q, S = Q_ref


@pytest.mark.parametrize(("name", "kwargs"), EVERY_GENERATOR)
def test_without_its_correction_the_ratio_does_not_recover_the_optimal_policy(name, kwargs):
    """log w = 0: neither the KL nor a baseline stands in for the partition function."""
    world, generator = World(), build_generator(name, **kwargs)
    assert world.distance(world.fit(generator.loss, world.q)) > 0.05


def test_the_misprinted_lsif_does_not_recover_the_optimal_policy():
    """R² − 2R, as often printed, is minimal at R = 1 whatever the data say."""
    world = World()
    assert (
        world.distance(world.fit(lambda z: (2 * z).exp() - 2 * z.exp(), world.advantage, kl=True))
        > 0.05
    )


def test_every_generator_of_the_table_is_tested_here():
    assert set(GENERATOR_FIELDS) == set(GENERATORS)
