"""Losses and generators against published figures, their definitions, and the truths of the method."""

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from tbpo_cli.core import GENERATORS, LOSSES, SideScores, build_generator, build_loss, oracle
from tbpo_cli.core.losses import importance_weights
from tbpo_cli.core.types import PairScores

GOLDEN = json.loads((Path(__file__).parent / "golden_losses.json").read_text())
CASES = GOLDEN["cases"]
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


def from_params(name, params):
    params = dict(params)
    if "generator" in params:
        generator = dict(params.pop("generator"))
        params["generator"] = build_generator(generator.pop("name"), **generator)
    return build_loss(name, **params)


def batch_from_golden(pairs):
    """One padded batch of the golden pairs, padding filled with NaN logits; returns scores and the leaves."""
    leaves, sides = [], {}
    for side in ("chosen", "rejected"):
        length = max(len(pair[side]["tokens"]) for pair in pairs)
        batch = len(pairs)
        mask = torch.zeros(batch, length, dtype=torch.bool)
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        extras = {
            "state_baseline": torch.zeros(batch, length).double(),
            "weights": torch.zeros(batch, length).double(),
        }
        logits = {
            which: torch.zeros(batch, length, GOLDEN["vocab"], dtype=torch.float64)
            for which in ("policy_logits", "reference_logits")
        }
        for row, pair in enumerate(pairs):
            n = len(pair[side]["tokens"])
            mask[row, :n] = True
            tokens[row, :n] = torch.tensor(pair[side]["tokens"])
            for which, tensor in (logits | extras).items():
                tensor[row, :n] = torch.tensor(pair[side][which], dtype=torch.float64)
                tensor[row, n:] = 77.0  # padding may hold anything
        logits["policy_logits"].requires_grad_()
        extras["state_baseline"].requires_grad_()
        leaves.append((logits["policy_logits"], extras["state_baseline"]))
        scores = oracle.side_scores(
            logits["policy_logits"], logits["reference_logits"], tokens, mask
        )
        sides[side] = replace(scores, **extras)
    return PairScores(**sides), leaves


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['loss']}-{json.dumps(case['params'])}"
)
def test_values_and_gradients_are_those_of_the_published_table(case):
    scores, leaves = batch_from_golden(GOLDEN["pairs"])
    output = from_params(case["loss"], case["params"])(scores)
    assert output.per_pair.tolist() == pytest.approx(case["per_pair"], abs=1e-9)
    output.per_pair.mean().backward()
    for which, index, golden in (
        ("policy_logits", 0, case["grad_policy_logits"]),
        ("state_baseline", 1, case["grad_state_baseline"]),
    ):
        for side, side_leaves in zip(("chosen", "rejected"), leaves, strict=True):
            gradient = side_leaves[index].grad
            if golden is None:
                assert gradient is None, which
                continue
            for row, pair in enumerate(golden):
                expected = torch.tensor(pair[side], dtype=torch.float64)
                torch.testing.assert_close(
                    gradient[row, : len(expected)], expected, rtol=1e-9, atol=1e-9
                )
                assert (gradient[row, len(expected) :] == 0).all(), (
                    "padding must receive no gradient"
                )


def test_sft_is_the_mean_negative_log_likelihood_of_the_chosen_response():
    logps = torch.tensor([[-1.0, -3.0, -2.0], [-4.0, float("nan"), float("nan")]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    nothing = SideScores(mask=torch.zeros(2, 0, dtype=torch.bool))
    assert build_loss("sft")(
        PairScores(SideScores(mask, logps=logps), nothing)
    ).per_pair.tolist() == [2.0, 4.0]


# ------------------------------------------------------------------------------------------------------ generators


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
    """dL/dz = (R^{1+λ} + R^{−λ})/s as R → 0: 1/s for λ = 0, unbounded for λ > 0, 0 for −1 < λ < 0."""
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


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_generator("sba", lam=-1.0), "lam must be above -1"),
        (lambda: build_generator("ba", lam=float("nan")), "lam must be above -1"),
        (lambda: build_generator("ba", lam=float("inf")), "lam must be above -1"),
        (lambda: build_generator("sba", scale=0.0), "scale must be positive"),
        (lambda: build_generator("sba", scale=float("inf")), "scale must be positive"),
        (lambda: build_loss("dpo", beta=0.0), "beta must be positive"),
        (lambda: build_loss("tdpo", beta=0.0), "beta must be positive"),
        (lambda: build_loss("dpo", label_smoothing=0.5), "label_smoothing must be in"),
        (lambda: build_loss("bpo", label_smoothing=-0.1), "label_smoothing must be in"),
        (lambda: build_loss("tbpo_a", beta=float("inf")), "beta must be positive"),
        (lambda: build_loss("tbpo_a", min_ratio=1.0), "min_ratio must be in"),
        (lambda: build_loss("tbpo_a", min_ratio=-0.1), "min_ratio must be in"),
        (lambda: build_loss("tbpo_q", baseline_clip=0.0), "baseline_clip must be positive"),
        (lambda: build_loss("tbpo_q", beta=0.0), "beta must be positive"),
        (lambda: build_loss("tdpo", version=3), "version must be 1 or 2"),
        (lambda: build_loss("tdpo", alpha=float("inf")), "alpha must be a finite number"),
        (lambda: build_loss("orpo", lam=-0.1), "lam must not be negative"),
        (lambda: build_loss("orpo", lam=float("inf")), "lam must not be negative"),
    ],
)
def test_impossible_fields_of_losses_and_generators_are_refused(build, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build()


SETTINGS = {  # as the papers, or the codes that they released, have them
    "sft": {},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "ipo": {"beta": 0.1},
    "hinge": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.6},
    "orpo": {"lam": 0.1},
    "bpo": {"beta": 0.1, "label_smoothing": 0.0, "min_ratio": 0.01, "generator": {"lam": 0.5, "scale": 4.0}},
    "tdpo": {"beta": 0.1, "version": 2, "alpha": 0.5},
    "tis_dpo": {"beta": 0.1, "positive": "", "negative": ""},
    "tbpo_q": {"beta": 0.1, "label_smoothing": 0.0, "min_ratio": 0.0, "generator": {"lam": 0.0, "scale": 4.0},
               "baseline_clip": 10.0},
    "tbpo_a": {"beta": 0.1, "label_smoothing": 0.0, "min_ratio": 0.0, "generator": {"lam": 0.0, "scale": 4.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_the_defaults_of_a_loss_are_its_authors_setting(name):
    assert asdict(build_loss(name)) == SETTINGS[name]
    assert build_loss("orpo", lam=0.0).lam == 0, "without its penalty it is sft"
    assert build_generator("sba", scale=0.5).scale == 0.5


# ------------------------------------------------------------------------------------------- truths of the method


def random_scores(
    seed, *, batch=4, chosen=6, rejected=5, vocab=9, same_policy=False, dtype=torch.float64
):
    """Scores of random logits; lengths differ within the batch. Returns them with the policy's logits."""
    generator = torch.Generator().manual_seed(seed)
    sides, leaves = {}, []
    for side, length in (("chosen", chosen), ("rejected", rejected)):
        reference = torch.randn(batch, length, vocab, generator=generator, dtype=torch.float64).to(
            dtype
        )
        noise = torch.randn(batch, length, vocab, generator=generator, dtype=torch.float64).to(
            dtype
        )
        policy = (reference if same_policy else reference + 0.5 * noise).clone().requires_grad_()
        lengths = torch.randint(1, length + 1, (batch,), generator=generator)
        mask = torch.arange(length) < lengths[:, None]
        tokens = torch.randint(vocab, (batch, length), generator=generator)
        baseline = torch.randn(batch, length, generator=generator, dtype=torch.float64).to(dtype)
        scores = oracle.side_scores(policy, reference, tokens, mask)
        sides[side] = replace(scores, state_baseline=baseline, weights=torch.ones_like(baseline))
        leaves.append(policy)
    return PairScores(**sides), leaves


EVERY_LOSS = [pytest.param(build_loss(name), id=name) for name in LOSSES]


@pytest.mark.parametrize(
    "loss", [*EVERY_LOSS, pytest.param(build_loss("tdpo", version=1), id="tdpo, version 1")]
)
def test_a_loss_reads_the_statistics_it_says_it_needs_and_no_others(loss):
    scores, _ = random_scores(0)

    def value(names):
        kept = {"mask", *names}
        sides = ({f.name: getattr(side, f.name) for f in fields(side) if f.name in kept}
                 for side in (scores.chosen, scores.rejected))  # fmt: skip
        return loss(PairScores(*(SideScores(**side) for side in sides))).per_pair

    torch.testing.assert_close(value(loss.needs), loss(scores).per_pair)
    for name in loss.needs:
        with pytest.raises((AttributeError, TypeError)):
            value(loss.needs - {name})


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_the_order_of_pairs_changes_nothing(loss):
    scores, _ = random_scores(1)
    order = torch.tensor([2, 0, 3, 1])

    def permuted(side):
        return SideScores(**{f.name: getattr(side, f.name)[order] for f in fields(side)})

    torch.testing.assert_close(
        loss(PairScores(permuted(scores.chosen), permuted(scores.rejected))).per_pair,
        loss(scores).per_pair[order],
    )


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_a_loss_reads_only_the_tokens_of_its_span(loss):
    """Tokens past the aligned length (or, for sft, on the rejected side) change neither value nor gradient."""
    scores, (chosen, rejected) = random_scores(2)
    loss(scores).per_pair.sum().backward()
    aligned = scores.aligned_mask
    for side, grad in ((scores.chosen, chosen.grad), (scores.rejected, rejected.grad)):
        length = aligned.shape[1]
        outside = side.mask.clone()
        outside[:, :length] &= ~aligned
        touched = None if grad is None else grad[outside].abs().sum().item()
        if loss.span == "aligned":
            assert outside.any() and touched == 0
        elif loss.span == "response":
            assert touched > 0
    if loss.span == "chosen":
        assert rejected.grad is None
    assert (loss.mean_over == "chosen_tokens") == (loss.span == "chosen")


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_extreme_scores_and_identical_one_token_responses_stay_finite(loss):
    """Logits of ±1e4, a vocabulary of 2, T = 1."""
    leaf = torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]], [[1e4, -1e4]]], requires_grad=True)
    reference = torch.tensor([[[-1e4, 1e4]], [[1e4, -1e4]], [[1e4, -1e4]]])
    tokens, mask = torch.tensor([[0], [0], [0]]), torch.ones(3, 1, dtype=torch.bool)
    given = {"state_baseline": torch.zeros(3, 1), "weights": torch.ones(3, 1)}
    side, other = (
        replace(oracle.side_scores(logits, reference, tokens, mask), **given)
        for logits in (leaf, -leaf)
    )
    for scores in (PairScores(side, other), PairScores(other, side), PairScores(side, side)):
        leaf.grad = None
        per_pair = loss(scores).per_pair
        per_pair.sum().backward(retain_graph=True)
        assert per_pair.isfinite().all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize(("name", "kwargs"), EVERY_GENERATOR)
def test_tbpo_a_is_neutral_when_the_policy_is_the_reference(name, kwargs):
    """A = 0 everywhere, so log R_t = 0 and the loss is L_h(0)."""
    scores, _ = random_scores(3, same_policy=True)
    generator = build_generator(name, **kwargs)
    output = build_loss("tbpo_a", generator=generator)(scores)
    torch.testing.assert_close(
        output.log_ratio_aligned, torch.zeros_like(output.log_ratio_aligned), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(output.per_pair, generator.loss(torch.zeros(4, dtype=torch.float64)))


def test_the_reported_log_ratios_are_those_of_the_aligned_tokens_without_a_gradient():
    """log R_t = β (A_t^l − A_t^w) where both sides have a token, 0 elsewhere."""
    short, long = torch.tensor([[True, True, False]]), torch.tensor([[True, True, True, True]])
    advantage = torch.tensor([[1.0, 3.0, math.nan]], requires_grad=True)
    scores = PairScores(
        SideScores(short, advantage=advantage), SideScores(long, advantage=torch.full((1, 4), 2.0))
    )
    output = build_loss("tbpo_a", beta=0.5)(scores)
    assert (
        output.log_ratio_aligned.tolist() == [[0.5, -0.5, 0.0]]
        and not output.log_ratio_aligned.requires_grad
    )


def test_ratios_outside_the_generators_clip_are_counted():
    mask = torch.ones(1, 4, dtype=torch.bool)
    chosen = SideScores(mask, advantage=torch.tensor([[0.0, -500.0, 400.0, 10.0]]))
    rejected = SideScores(mask, advantage=torch.zeros(1, 4))
    assert build_loss("tbpo_a", beta=0.1)(PairScores(chosen, rejected)).num_clipped.item() == 2
    at_the_clip = PairScores(
        SideScores(mask, log_ratio=torch.full((1, 4), 7.5)),
        replace(rejected, log_ratio=torch.zeros(1, 4)),
    )
    assert build_loss("bpo", beta=1.0)(at_the_clip).num_clipped.item() == 0, "30 is not outside ±30"


def test_min_ratio_stops_the_gradient_under_the_floor():
    advantage = torch.tensor([[1.0, 100.0]], requires_grad=True)  # log R = −0.1 and −10
    mask = torch.ones(1, 2, dtype=torch.bool)
    scores = PairScores(
        SideScores(mask, advantage=advantage), SideScores(mask, advantage=torch.zeros(1, 2))
    )
    build_loss("tbpo_a", beta=0.1, min_ratio=0.01)(scores).per_pair.sum().backward()
    assert advantage.grad[0, 0] < 0 and advantage.grad[0, 1] == 0


def test_label_smoothing_mixes_both_orders():
    scores, _ = random_scores(4)
    swapped = PairScores(scores.rejected, scores.chosen)
    plain, smoothed = build_loss("tbpo_a"), build_loss("tbpo_a", label_smoothing=0.2)
    expected = 0.8 * plain(scores).per_pair + 0.2 * plain(swapped).per_pair
    torch.testing.assert_close(smoothed(scores).per_pair, expected)


def test_pair_scores_are_the_scores_of_both_sides_and_give_no_gradient_to_the_reference():
    generator = torch.Generator().manual_seed(7)
    sides = []
    for length in (3, 5):
        logits = [torch.randn(2, length, 4, generator=generator).requires_grad_() for _ in range(2)]
        sides.append(
            (
                *logits,
                torch.zeros(2, length, dtype=torch.int64),
                torch.ones(2, length, dtype=torch.bool),
            )
        )
    scores = oracle.pair_scores(*sides[0], *sides[1])
    for side, arguments in zip((scores.chosen, scores.rejected), sides, strict=True):
        assert torch.equal(side.advantage, oracle.side_scores(*arguments).advantage)
    assert scores.aligned_mask.shape == (2, 3)
    (scores.chosen.advantage.sum() + scores.rejected.kl.sum()).backward()
    for policy_logits, reference_logits, *_ in sides:
        assert policy_logits.grad.any() and reference_logits.grad is None
    assert not scores.chosen.reverse_kl.requires_grad and not scores.chosen.entropy.requires_grad


def test_importance_weights_are_linear_in_the_rank_within_the_response():
    """Four ranked tokens get 0.7, 0.9, 1.1, 1.3, and two of them 0.7 and 1.3; the last token 0; a lone token, or a lone
    one before the end, 1. Of equal scores, the earlier one ranks lower."""
    expected = {  # scores of the tokens: their weights
        (3.0, -1.0, 2.0, 0.0, 9.0): (1.3, 0.7, 1.1, 0.9, 0.0),
        (2.0, 2.0, 2.0, 2.0, 2.0): (0.7, 0.9, 1.1, 1.3, 0.0),
        (5.0, 2.0, 9.0): (1.3, 0.7, 0.0),
        (1.0, 2.0): (1.0, 0.0),
        (5.0,): (1.0,),
    }
    mask = torch.arange(5) < torch.tensor([len(scores) for scores in expected])[:, None]
    scores, weights = (torch.zeros(5, 5, dtype=torch.float64) for _ in range(2))
    scores[mask], weights[mask] = (
        torch.tensor(sum(all_of, ())).double() for all_of in (expected, expected.values())
    )
    scores[~mask] = math.nan
    torch.testing.assert_close(importance_weights(scores.requires_grad_(), mask), weights)
    assert not importance_weights(scores, mask).requires_grad


def test_importance_weights_of_equal_scores_grow_with_the_position():
    """Of 100 tokens, since a sort that is not stable keeps the order of the few."""
    weights = importance_weights(torch.zeros(1, 101), torch.ones(1, 101, dtype=torch.bool))
    torch.testing.assert_close(
        weights[0], torch.cat([torch.linspace(0.7, 1.3, 100), torch.zeros(1)])
    )


# -------------------------------------------------------------------------------------------------------- recovery


class World:
    """3 states, 4 actions, known Q_ref; every comparison (s, y) against (s', y') weighed by its exact probability."""

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
        """Minimise E[L(log R)] over a softmax table (and an uncentred tabular b(s)); returns log π_θ."""
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


def test_every_generator_and_loss_of_the_tables_is_tested_here():
    assert set(GENERATOR_FIELDS) == set(GENERATORS) and set(SETTINGS) == set(LOSSES)
