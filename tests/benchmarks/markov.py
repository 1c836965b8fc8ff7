"""A small world whose truth is known per token: which optimum does each loss reach?

    python tests/benchmarks/markov.py            # about 25 minutes on one CPU core

A Markov decision process with 5 states, 4 tokens (token 0 ends the answer) and at most 5 tokens an
answer: 364 answers a prompt, all of which are written out, so that no policy is ever sampled and
every distance is exact. A pair is two answers of the reference, labelled on the whole answers, P(y
≻ y') = σ(R(y) − R(y')). The policy is a table of logits (position, state, token), the losses are
those of `tbpo_cli.core`. Two optima of the same rewards, at the losses' own β = 1:

    token level      π*(z|s) ∝ π_ref(z|s) exp(Q_ref(s, z) / β)
    sequence level   π*(y|x) ∝ π_ref(y|x) exp(R(y) / β)

Q_ref is the expected return if the reference goes on.

A loss is minimised by Adam; the step is kept at which it is lowest on a fifth of the pairs that is
held out. "Labels a token" draws, instead, each aligned position's label from the token-level model,
σ(A(s, y) − A(s', y')), which is what TBPO assumes and no one observes. Writes
results/markov.{json,md,svg}; with `--variants`, which asks the same of TBPO-A with parts of TDPO 2
(variants.py), results/markov_variants.{json,md}.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev

import matplotlib.pyplot as plt
import numpy as np
import torch
import variants
from common import RESULTS, write_results
from torch import Tensor

from tbpo_cli.core import PairScores, SideScores, build_generator, build_loss
from tbpo_cli.core.losses import Loss, importance_weights

STATES, TOKENS, LENGTH, END = 5, 4, 5, 0
BETA = 1.0
STEPS, RATE, LOOK_EVERY = 600, 0.05, 20
PAIRS = (100, 1_000, 10_000, 100_000)


def sba(lam: float = 0.0):
    return build_generator("sba", lam=lam, scale=4.0)


METHODS = {  # name: the loss, at the β of the truth where it has one
    "dpo": build_loss("dpo", beta=BETA),
    "ipo": build_loss("ipo", beta=BETA),
    "hinge": build_loss("hinge", beta=BETA),
    "simpo": build_loss("simpo"),
    "orpo": build_loss("orpo"),
    "bpo": build_loss("bpo", beta=BETA, generator=sba(0.5)),
    "tdpo 1": build_loss("tdpo", beta=BETA, version=1),
    "tdpo 2": build_loss("tdpo", beta=BETA, version=2),
    "tis_dpo": build_loss("tis_dpo", beta=BETA),
    "tbpo_a": build_loss("tbpo_a", beta=BETA, generator=sba()),
    "tbpo_a, logistic": build_loss("tbpo_a", beta=BETA, generator=build_generator("logistic")),
    "tbpo_q": build_loss("tbpo_q", beta=BETA, generator=sba()),
    "tbpo_q, log w = 0": build_loss("tbpo_q", beta=BETA, generator=sba()),
}
OF_TOKENS = ("tbpo_a", "tbpo_a, logistic")  # also fitted to a label for every token


def variant(**parts):
    return build_loss(variants.NAME, beta=BETA, **parts)


LOGISTIC = build_generator("logistic")
VARIANTS = {  # TBPO-A with parts of TDPO 2; those of tokens are also fitted to labels a token
    "tbpo_a": METHODS["tbpo_a"],
    "A, stop-gradient": variant(stop_chosen=True),
    "A, α 0.5": variant(alpha=0.5),
    "A, stop-gradient, α 0.5": variant(stop_chosen=True, alpha=0.5),
    "A, stop-gradient, α 0.5, logistic": variant(stop_chosen=True, alpha=0.5, generator=LOGISTIC),
    "A, whole responses": variant(whole=True),
    "tdpo 2": METHODS["tdpo 2"],
}


@dataclass(frozen=True)
class World:
    """Rewards, transitions and a reference, drawn from a seed.

    Tables are (LENGTH, STATES, TOKENS); answers (PROMPTS · 364, LENGTH), the prompt being the first
    state.
    """

    seed: int

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """log π_ref (LENGTH, S, V), rewards (S, V), next states (S, V)."""
        random = torch.Generator().manual_seed(self.seed)
        logits = torch.randn(LENGTH, STATES, TOKENS, generator=random, dtype=torch.float64)
        rewards = 1.2 * torch.randn(STATES, TOKENS, generator=random, dtype=torch.float64)
        return (
            logits.log_softmax(-1),
            rewards,
            torch.randint(STATES, (STATES, TOKENS), generator=random),
        )

    @cached_property
    def answers(self) -> tuple[Tensor, Tensor, Tensor]:
        """All answers: tokens, states and mask, (STATES · 364, LENGTH)."""
        follow, rows = self.tables[2].tolist(), []

        def grow(tokens: list[int], states: list[int]) -> None:
            for token in range(TOKENS):
                if token == END or len(tokens) == LENGTH - 1:
                    padding = [0] * (LENGTH - len(tokens) - 1)
                    rows.append(([*tokens, token, *padding], [*states, *padding], len(tokens) + 1))
                else:
                    grow([*tokens, token], [*states, follow[states[-1]][token]])

        for prompt in range(STATES):
            grow([], [prompt])
        tokens, states, lengths = zip(*rows, strict=True)
        mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
        return torch.tensor(tokens), torch.tensor(states), mask

    def at(self, table: Tensor) -> Tensor:
        """The table's entry for every token of every answer, (answers, LENGTH)."""
        tokens, states, _ = self.answers
        table = table.expand(LENGTH, *table.shape[-2:])
        return table[torch.arange(LENGTH), states, tokens]

    def logps(self, policy: Tensor) -> Tensor:
        """Exact log-probability of every answer under a table of log-probabilities, (answers,)."""
        return (self.at(policy) * self.answers[2]).sum(1)

    @cached_property
    def returns(self) -> Tensor:
        return (self.at(self.tables[1]) * self.answers[2]).sum(1)

    def optimum(self, level: str) -> tuple[Tensor, Tensor]:
        """log π* by backward induction, and the Q that it is made of."""
        reference, rewards, follow = self.tables
        values, quality = torch.zeros(STATES, dtype=torch.float64), []
        for position in reversed(range(LENGTH)):
            later = values[follow]
            later[:, END] = 0
            q = rewards + (later if position < LENGTH - 1 else 0)
            quality.insert(0, q)
            if level == "token":
                values = (reference[position].exp() * q).sum(-1)
            else:
                values = BETA * (reference[position] + q / BETA).logsumexp(-1)
        q = torch.stack(quality)
        return (reference + q / BETA).log_softmax(-1), q

    def distance(self, target: Tensor, policy: Tensor) -> float:
        """KL(target ‖ policy) over whole answers, mean over the prompts, nats."""
        log_target = self.logps(target)
        return float((log_target.exp() * (log_target - self.logps(policy))).sum() / STATES)

    def value(self, policy: Tensor) -> float:
        """The expected return, mean over the prompts."""
        return float((self.logps(policy).exp() * self.returns).sum() / STATES)


def sample_pairs(world: World, count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Two answers of the reference to the same prompt, (count,) each."""
    probs = world.logps(world.tables[0]).exp().view(STATES, -1).numpy()
    prompts = random.integers(STATES, size=count)
    pairs = np.empty((count, 2), dtype=np.int64)
    for prompt in range(STATES):
        rows = prompts == prompt
        drawn = random.choice(
            probs.shape[1], size=(int(rows.sum()), 2), p=probs[prompt] / probs[prompt].sum()
        )
        pairs[rows] = drawn + prompt * probs.shape[1]
    return torch.from_numpy(pairs[:, 0]), torch.from_numpy(pairs[:, 1])


@dataclass(frozen=True)
class Pairs:
    """Chosen and rejected answers, (B,) each; `position`, (B,): only that token is labelled."""

    chosen: Tensor
    rejected: Tensor
    position: Tensor | None = None

    def __getitem__(self, rows: slice) -> Pairs:
        return Pairs(
            *(
                None if part is None else part[rows]
                for part in (self.chosen, self.rejected, self.position)
            )
        )

    def side(self, world: World, answers: Tensor, statistics: dict[str, Tensor]) -> SideScores:
        if self.position is None:
            return SideScores(
                world.answers[2][answers],
                **{name: each[answers] for name, each in statistics.items()},
            )
        mask = torch.ones(len(answers), 1, dtype=torch.bool)
        return SideScores(
            mask, **{name: each[answers, self.position, None] for name, each in statistics.items()}
        )


def fit(
    world: World, loss: Loss, pairs: Pairs, weights: dict[str, Tensor], learn_baseline: bool
) -> Tensor:
    """The log-probabilities that the loss reaches, at the step with the lowest held-out loss.

    Args:
        weights: {"chosen": (answers, LENGTH), "rejected": …} for a loss that needs them, or
        nothing.
    """
    reference = world.tables[0]
    logits = reference.clone().requires_grad_()
    baseline = torch.zeros(LENGTH, STATES, 1, dtype=torch.float64, requires_grad=learn_baseline)
    optimizer = torch.optim.Adam([logits] + [baseline] * learn_baseline, RATE)
    num_held_out = len(pairs.chosen) // 5
    held_out, trained = pairs[:num_held_out], pairs[num_held_out:]
    kept, lowest = reference, float("inf")
    for step in range(STEPS + 1):
        policy = logits.log_softmax(-1)
        kl = (reference.exp() * (reference - policy)).sum(-1, keepdim=True).expand_as(policy)
        tables = {
            "logps": policy,
            "log_ratio": policy - reference,
            "kl": kl,
            "advantage": policy - reference + kl,
            "state_baseline": baseline.expand_as(policy),
        }
        statistics = {name: world.at(tables[name]) for name in loss.needs - {"weights"}}

        def mean_loss(part: Pairs, statistics: dict[str, Tensor] = statistics) -> Tensor:
            sides = (
                part.side(
                    world, answers, statistics | ({"weights": weights[name]} if weights else {})
                )
                for name, answers in (("chosen", part.chosen), ("rejected", part.rejected))
            )
            return loss(PairScores(*sides)).per_pair.mean()

        if step % LOOK_EVERY == 0:
            with torch.no_grad():
                value = mean_loss(held_out).item()
            if value < lowest:
                kept, lowest = policy.detach().clone(), value
        optimizer.zero_grad()
        mean_loss(trained).backward()
        optimizer.step()
    return kept


def draw_labels(
    world: World, one: Tensor, other: Tensor, of_tokens: bool, random: np.random.Generator
) -> Pairs:
    if not of_tokens:
        wins = torch.from_numpy(random.random(len(one))) < torch.sigmoid(
            world.returns[one] - world.returns[other]
        )
        return Pairs(torch.where(wins, one, other), torch.where(wins, other, one))
    q = world.optimum("token")[1]
    advantage = world.at(q - (world.tables[0].exp() * q).sum(-1, keepdim=True))
    row, position = (world.answers[2][one] & world.answers[2][other]).nonzero(as_tuple=True)
    one, other = one[row], other[row]
    difference = advantage[one, position] - advantage[other, position]
    wins = torch.from_numpy(random.random(len(row))) < torch.sigmoid(difference)
    return Pairs(torch.where(wins, one, other), torch.where(wins, other, one), position)


def measure(world: World, name: str, loss: Loss, count: int, of_tokens: bool, seed: int) -> dict:
    random = np.random.default_rng((seed, count))
    pairs = draw_labels(world, *sample_pairs(world, count, random), of_tokens, random)
    weights = {}
    if "weights" in loss.needs:
        positive, negative = (
            fit(world, METHODS["dpo"], helper, {}, False)
            for helper in (pairs, Pairs(pairs.rejected, pairs.chosen))
        )
        scores, mask = world.at(positive - negative), world.answers[2]
        weights = {
            "chosen": importance_weights(scores, mask),
            "rejected": importance_weights(-scores, mask),
        }
    policy = fit(world, loss, pairs, weights, learn_baseline=name == "tbpo_q")
    labels = "a token" if of_tokens else "an answer"
    return {
        "method": name,
        "labels": labels,
        "pairs": count,
        "seed": seed,
        **distances(world, policy),
    }


def distances(world: World, policy: Tensor) -> dict[str, float]:
    return {
        "to_token_optimum": world.distance(world.optimum("token")[0], policy),
        "to_sequence_optimum": world.distance(world.optimum("sequence")[0], policy),
        "return": world.value(policy),
        "kl": world.distance(policy, world.tables[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, nargs="*", default=PAIRS)
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    rows, losses, of_tokens = [], METHODS, OF_TOKENS
    if arguments.variants:
        losses = VARIANTS
        of_tokens = [name for name, loss in VARIANTS.items() if loss.compares == "tokens"]
    for seed in range(arguments.seeds):
        world = World(seed)
        optima = {
            f"the {level}-level optimum": world.optimum(level)[0] for level in ("token", "sequence")
        }
        for name, policy in {"the reference": world.tables[0], **optima}.items():
            rows.append(
                {"method": name, "labels": "", "pairs": 0, "seed": seed, **distances(world, policy)}
            )
        for count in arguments.pairs:
            rows += [
                measure(world, name, loss, count, False, seed) for name, loss in losses.items()
            ]
            rows += [measure(world, name, losses[name], count, True, seed) for name in of_tokens]
        print(f"seed {seed}", flush=True)
    table = markdown(rows)
    print(table)
    if arguments.variants and not arguments.no_write:
        write_results("markov_variants", "Do variants of TBPO-A keep its optimum?", rows, table)
    elif not arguments.no_write:
        write_results("markov", "Which optimum does a loss reach?", rows, table)
        plot(rows)


def labelled(row: dict) -> str:
    return row["method"] + (" (labels a token)" if row["labels"] == "a token" else "")


def series(rows: list[dict], name: str, count: int, metric: str) -> list[float]:
    return [row[metric] for row in rows if labelled(row) == name and row["pairs"] == count]


def markdown(rows: list[dict]) -> str:
    counts = sorted({row["pairs"] for row in rows} - {0})
    most = counts[-1]
    after = [
        f"{name}, {most:,}"
        for name in ("to the sequence-level one", "return", "KL from the reference")
    ]
    head = [*(f"{count:,} pairs" for count in counts), *after]
    lines = [
        f"| loss | to the token-level optimum, {' | '.join(head)} |",
        "|---" * (len(head) + 1) + "|",
    ]
    for name in dict.fromkeys(map(labelled, rows)):
        known = [0 if not series(rows, name, most, "kl") else count for count in counts]
        cells = [shown(series(rows, name, count, "to_token_optimum")) for count in known]
        cells += [
            shown(series(rows, name, known[-1], metric))
            for metric in ("to_sequence_optimum", "return", "kl")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0:.3f}"


def plot(rows: list[dict]) -> None:
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "tbpo"})
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    counts = sorted({row["pairs"] for row in rows} - {0})
    names = ("dpo", "tdpo 1", "bpo", "tbpo_a", "tbpo_q", "tbpo_a (labels a token)")
    for panel, metric in zip(panels, ("to_token_optimum", "to_sequence_optimum"), strict=True):
        for name in names:
            values = [mean(series(rows, name, count, metric)) for count in counts]
            panel.plot(
                counts,
                values,
                marker="o",
                markersize=3,
                label=name,
                linewidth=2 if "tbpo" in name else 1.2,
            )
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="pairs",
            title=f"KL {metric.replace('_', ' ')} (nats an answer)",
        )
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "markov.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
