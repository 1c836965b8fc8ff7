"""Losses and generators against published figures, definitions, and the truths of the method."""

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from tbpo_cli.core import GENERATORS, LOSSES, SideScores, build_generator, build_loss, oracle
from tbpo_cli.core.losses import importance_weights, name_of
from tbpo_cli.core.types import PairScores

HERE = Path(__file__).parent
TABLES = [
    json.loads((HERE / name).read_text())
    for name in ("golden_losses.json", "golden_losses_more.json")
]
CASES = [
    pytest.param(table["pairs"], case, id=f"{case['loss']}-{json.dumps(case['params'])}")
    for table in TABLES
    for case in table["cases"]
]
VOCABULARY = 7


def from_params(name, params):
    params = dict(params)
    if "generator" in params:
        generator = dict(params.pop("generator"))
        params["generator"] = build_generator(generator.pop("name"), **generator)
    return build_loss(name, **params)


def batch_from_golden(pairs):
    """One padded batch of the golden pairs, whose padding holds 77, and its leaves."""
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
            which: torch.zeros(batch, length, VOCABULARY, dtype=torch.float64)
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


@pytest.mark.parametrize(("pairs", "case"), CASES)
def test_values_and_gradients_are_those_of_the_published_table(pairs, case):
    scores, leaves = batch_from_golden(pairs)
    # The figures without a weight are those of the formula alone, of cpo too.
    params = case["params"] if case["loss"] == "sft" else {"sft_weight": 0.0} | case["params"]
    output = from_params(case["loss"], params)(scores)
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


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_generator("sba", lam=-1.0), "lam must be above -1"),
        (lambda: build_generator("ba", lam=float("nan")), "lam must be above -1"),
        (lambda: build_generator("ba", lam=float("inf")), "lam must be above -1"),
        (lambda: build_generator("sba", scale=0.0), "scale must be a finite number"),
        (lambda: build_generator("sba", scale=float("inf")), "scale must be a finite number"),
        (lambda: build_loss("dpo", beta=0.0), "beta must be a finite number above 0"),
        (lambda: build_loss("tdpo", beta=0.0), "beta must be a finite number above 0"),
        (lambda: build_loss("dpo", label_smoothing=0.5), "label_smoothing must be in"),
        (lambda: build_loss("bpo", label_smoothing=-0.1), "label_smoothing must be in"),
        (lambda: build_loss("tbpo_a", beta=float("inf")), "beta must be a finite number above 0"),
        (lambda: build_loss("tbpo_a", min_ratio=1.0), "min_ratio must be in"),
        (lambda: build_loss("tbpo_a", min_ratio=-0.1), "min_ratio must be in"),
        (lambda: build_loss("tbpo_q", baseline_clip=0.0), "baseline_clip must be above 0"),
        (lambda: build_loss("tbpo_q", beta=0.0), "beta must be a finite number above 0"),
        (lambda: build_loss("tdpo", version=3), "version must be 1 or 2"),
        (lambda: build_loss("tdpo", alpha=float("inf")), "alpha must be a finite number"),
        (lambda: build_loss("orpo", lam=-0.1), "lam must be a finite number"),
        (lambda: build_loss("orpo", lam=float("inf")), "lam must be a finite number"),
        (lambda: build_loss("dpop", lam=-1.0), "lam must be a finite number"),
        (lambda: build_loss("dpop", beta=0.0), "beta must be a finite number above 0"),
        (lambda: build_loss("robust", label_smoothing=0.5), "label_smoothing must be in"),
        (lambda: build_loss("robust", beta=0.0), "beta must be a finite number above 0"),
        (lambda: build_loss("ld_dpo", alpha=1.1), "alpha must be in"),
        (lambda: build_loss("ld_dpo", alpha=-0.1), "alpha must be in"),
        (lambda: build_loss("ld_dpo", beta=0.0), "beta must be a finite number above 0"),
        (lambda: build_loss("d2po", gamma=0.0), "gamma must be in"),
        (lambda: build_loss("d2po", gamma=1.1), "gamma must be in"),
        (lambda: build_loss("d2po", beta=0.0), "beta must be a finite number above 0"),
        (lambda: build_loss("tbpo_a", sft_weight=-1.0), "sft_weight must be a finite number"),
        (lambda: build_loss("dpo", sft_weight=float("inf")), "sft_weight must be a finite number"),
        (lambda: build_loss("orpo", sft_weight=-1.0), "sft_weight must be a finite number"),
    ],
)
def test_impossible_fields_of_losses_and_generators_are_refused(build, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build()


SETTINGS = {  # as the papers, or the codes that they released, have them
    "sft": {},
    "dpo_norm": {"beta": 5.0},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "dpop": {"beta": 0.1, "lam": 50.0},
    "cpo": {"beta": 0.1, "sft_weight": 1.0},
    "wpo": {"beta": 0.1},
    "ld_dpo": {"beta": 0.1, "alpha": 0.5},
    "d2po": {"beta": 0.1, "gamma": 0.98},
    "confpo": {"beta": 1.5, "gamma": 1.6},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "ipo": {"beta": 0.1},
    "hinge": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.6},
    "orpo": {"lam": 0.1},
    "bpo": {"beta": 0.1, "label_smoothing": 0.0, "min_ratio": 0.01,
            "generator": {"lam": 0.5, "scale": 4.0}},
    "tdpo": {"beta": 0.1, "version": 2, "alpha": 0.5},
    "tis_dpo": {"beta": 0.1, "positive": "", "negative": ""},
    "tgdpo": {"beta": 0.1, "alpha": 0.5, "guide": ""},
    "tbpo_q": {"beta": 0.1, "label_smoothing": 0.0, "min_ratio": 0.0,
               "generator": {"lam": 0.0, "scale": 4.0}, "baseline_clip": 10.0},
    "tbpo_a": {"beta": 0.1, "label_smoothing": 0.0, "min_ratio": 0.0,
               "generator": {"lam": 0.0, "scale": 4.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_the_defaults_of_a_loss_are_its_authors_setting(name):
    without = {} if name == "sft" else {"sft_weight": 0.0}
    assert asdict(build_loss(name)) == without | SETTINGS[name]
    assert build_loss("orpo", lam=0.0).lam == 0, "without its penalty it is sft"
    assert build_generator("sba", scale=0.5).scale == 0.5


# ---- truths of the method


def random_scores(
    seed, *, batch=4, chosen=6, rejected=5, vocab=9, same_policy=False, dtype=torch.float64
):
    """Scores of random logits, whose lengths differ within the batch, and the policy's logits."""
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
WITH_SFT = [
    pytest.param(build_loss(name, sft_weight=0.3), id=f"{name} and sft")
    for name in LOSSES
    if name != "sft"
]


@pytest.mark.parametrize(
    "loss",
    [*EVERY_LOSS, *WITH_SFT, pytest.param(build_loss("tdpo", version=1), id="tdpo, version 1")],
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


@pytest.mark.parametrize("loss", [*EVERY_LOSS, *WITH_SFT])
def test_a_loss_reads_only_the_tokens_of_its_span(loss):
    """Gradients reach the tail of a side, behind the aligned tokens, only if the span has it."""
    scores, leaves = random_scores(2, batch=64)
    loss(scores).per_pair.sum().backward()
    aligned = scores.aligned_mask
    touched = {}
    for name, leaf in zip(("chosen", "rejected"), leaves, strict=True):
        tail = getattr(scores, name).mask.clone()
        tail[:, : aligned.shape[1]] &= ~aligned
        assert tail.any()
        if leaf.grad is not None and leaf.grad[tail].any():
            touched[name] = True
    assert [*touched] == {
        "aligned": [],
        "aligned_and_chosen": ["chosen"],
        "chosen": ["chosen"],
        "response": ["chosen", "rejected"],
    }[loss.span]
    assert (leaves[1].grad is None) == (loss.span == "chosen") == (loss.mean_over != "pairs")


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sft"])
def test_sft_weight_adds_the_mean_negative_log_likelihood_of_the_whole_chosen_response(name):
    scores, _ = random_scores(6)
    without, with_sft = build_loss(name, sft_weight=0.0), build_loss(name, sft_weight=0.7)
    expected = without(scores).per_pair + 0.7 * build_loss("sft")(scores).per_pair
    torch.testing.assert_close(with_sft(scores).per_pair, expected)
    assert with_sft.needs == without.needs | {"logps"}


def test_without_its_sft_weight_a_token_level_loss_reads_neither_logps_nor_a_tail():
    plain, with_sft = build_loss("tbpo_a"), build_loss("tbpo_a", sft_weight=0.1)
    assert (plain.needs, plain.span) == ({"advantage"}, "aligned")
    assert (with_sft.needs, with_sft.span) == ({"advantage", "logps"}, "aligned_and_chosen")


def side_of(**statistics):
    """One response, of whose tokens these statistics are known."""
    rows = {
        name: torch.tensor([values], dtype=torch.float64) for name, values in statistics.items()
    }
    mask = torch.ones_like(next(iter(rows.values())), dtype=torch.bool)
    return SideScores(mask, **{name: row.requires_grad_() for name, row in rows.items()})


def test_wpo_weighs_a_pair_by_how_likely_the_policy_is_to_write_it():
    """The chosen tokens have 1/2 in a row (1/2, 1/4, 1/8, 1/8), Σ π² = 11/32, and 1/4 in a uniform
    one, Σ π² = 1/4; the rejected token has 1/8 in the first row. So exp(m^w) =
    √(1/2 · 32/11 · 1/4 · 4) = √(16/11) and exp(m^l) = 1/8 · 32/11 = 4/11, whose product, below 1,
    weighs softplus(z), z = β (Σr^l − Σr^w) = 0.1 (0.5 − 0.3)."""
    row = [1 / 2, 1 / 4, 1 / 8, 1 / 8]
    chosen = torch.tensor([[row, [1 / 4] * 4]], dtype=torch.float64)
    rejected = torch.tensor([[row]], dtype=torch.float64)
    sides = []
    for probs, tokens, log_ratio in ((chosen, [[0, 2]], [[0.2, 0.1]]), (rejected, [[3]], [[0.5]])):
        tokens = torch.tensor(tokens)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        scores = oracle.side_scores(probs.log(), probs.log(), tokens, mask)
        ratio = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
        logps = scores.logps.detach().requires_grad_()
        sides.append(replace(scores, log_ratio=ratio, logps=logps))
    output = build_loss("wpo")(PairScores(*sides)).per_pair
    weight = math.sqrt(16 / 11) * 4 / 11
    assert output.item() == pytest.approx(weight * math.log1p(math.exp(0.02)), rel=1e-12)
    output.sum().backward()
    assert sides[0].logps.grad is None, "the weight is a number"
    sigmoid = 1 / (1 + math.exp(-0.02))
    assert sides[1].log_ratio.grad.item() == pytest.approx(weight * 0.1 * sigmoid, rel=1e-12)


def test_wpo_weighs_no_pair_more_than_1():
    """Tokens likelier than the policy's own samples: m > 0."""
    side = side_of(log_ratio=[0.0], logps=[-0.1], collision_entropy=[0.5])
    assert build_loss("wpo")(PairScores(side, side)).per_pair.item() == pytest.approx(math.log(2))


def test_confpo_is_simpo_over_the_tokens_that_are_less_likely_than_the_mean():
    """Chosen: (0.9, 0.1, 0.2), mean 0.4: the last two. Rejected: (0.5, 0.3), mean 0.4: the last."""
    chosen, rejected = (
        side_of(logps=[math.log(p) for p in probs]) for probs in ([0.9, 0.1, 0.2], [0.5, 0.3])
    )
    loss = build_loss("confpo", beta=2.0, gamma=0.5)(PairScores(chosen, rejected)).per_pair
    margin = 2.0 * ((math.log(0.1) + math.log(0.2)) / 2 - math.log(0.3))
    assert loss.item() == pytest.approx(math.log1p(math.exp(0.5 - margin)), rel=1e-12)
    loss.sum().backward()
    assert (chosen.logps.grad != 0).tolist() == [[False, True, True]]
    assert (rejected.logps.grad != 0).tolist() == [[False, True]]


def test_confpo_leaves_a_pair_alone_of_which_a_response_has_no_token_below_its_mean():
    single = side_of(logps=[-1.0])
    longer = side_of(logps=[-1.0, -2.0])
    for pair in (PairScores(single, longer), PairScores(longer, single)):
        loss = build_loss("confpo")(pair).per_pair
        loss.sum().backward()
        assert loss.item() == 0
        assert not single.logps.grad.any() and not longer.logps.grad.any()


def test_token_weights_of_1_give_dpo():
    scores, _ = random_scores(8)
    dpo = build_loss("dpo")(scores).per_pair
    for loss in (build_loss("ld_dpo", alpha=1.0), build_loss("d2po", gamma=1.0)):
        torch.testing.assert_close(loss(scores).per_pair, dpo)
    torch.testing.assert_close(build_loss("tis_dpo")(scores).per_pair, dpo)
    torch.testing.assert_close(build_loss("tgdpo", alpha=0.0)(scores).per_pair, dpo)


def test_tgdpo_weighs_tokens_by_the_rewards_that_a_helper_gives_them():
    """β = 0.2, α = 0.5, so αβ = 0.1. Chosen: ρ = 1 and 0, so weights 1.1 and 1. Rejected: ρ = −2,
    so weight 1.2. −β (1.1 · 1 + 1 · 2 − 1.2 · 3) = 0.1.
    """
    chosen = side_of(log_ratio=[1.0, 2.0], weights=[1.0, 0.0])
    rejected = side_of(log_ratio=[3.0], weights=[-2.0])
    loss = build_loss("tgdpo", beta=0.2, alpha=0.5)(PairScores(chosen, rejected)).per_pair
    assert loss.item() == pytest.approx(math.log1p(math.exp(0.1)), rel=1e-12)
    loss.sum().backward()
    slope = 0.2 / (1 + math.exp(-0.1))
    assert chosen.log_ratio.grad.flatten().tolist() == pytest.approx([-1.1 * slope, -slope])
    assert rejected.log_ratio.grad.item() == pytest.approx(1.2 * slope)


def test_the_mean_of_robust_over_flipped_labels_is_dpo_over_the_true_ones():
    """(1 − ε) robust(w, l) + ε robust(l, w) = dpo(w, l)."""
    scores, _ = random_scores(9)
    flipped = PairScores(scores.rejected, scores.chosen)
    robust = build_loss("robust", label_smoothing=0.3)
    mean = 0.7 * robust(scores).per_pair + 0.3 * robust(flipped).per_pair
    torch.testing.assert_close(mean, build_loss("dpo")(scores).per_pair)


def test_every_loss_says_when_to_take_it_and_has_a_name_that_leads_back_to_it():
    for name, cls in LOSSES.items():
        assert cls.when.endswith("."), name
        assert name_of(cls()) == name


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


@pytest.mark.parametrize("name", GENERATORS)
def test_tbpo_a_is_neutral_when_the_policy_is_the_reference(name):
    """A = 0 everywhere, so log R_t = 0 and the loss is L_h(0)."""
    scores, _ = random_scores(3, same_policy=True)
    generator = build_generator(name)
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
    """Four ranked tokens get 0.7, 0.9, 1.1, 1.3, and two of them 0.7 and 1.3; the last token 0; a
    lone token, or a lone one before the end, 1. Of equal scores, the earlier one ranks lower."""
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


def test_every_loss_of_the_table_has_its_settings_here():
    assert set(SETTINGS) == set(LOSSES)
