"""What one of several processes measures of the models of an evaluation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.batch.batches import collate_all
from tbpo_cli.config.recipe import Recipe, Sample
from tbpo_cli.data.prompts import Prompt, prompts_of, prompts_of_pairs
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.templates import Chat
from tbpo_cli.evaluation.candidates import Candidate
from tbpo_cli.evaluation.diversity import PROTOCOL
from tbpo_cli.evaluation.measurements import Measurement
from tbpo_cli.evaluation.measures import tasks_of
from tbpo_cli.evaluation.preference import pair_rows
from tbpo_cli.evaluation.suites import run_task
from tbpo_cli.model.generate import samples_of
from tbpo_cli.model.out_of_memory import with_less_at_once
from tbpo_cli.model.policy import Policy
from tbpo_cli.model.scoring import Scorer

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Measurer:
    """Measures models. A method that takes a candidate gives this process's part of the rows.

    Args:
        recipe: with [sample] and [eval].
        pairs: the folder of the held-out pairs.
        chat: of the base.
        policy: with a view of each model.
        share: gives this process's part of some work.
        attempt: calls a function with a number of tokens at a time; with fewer where memory runs
            out.
    """

    recipe: Recipe
    pairs: Path
    chat: Chat
    policy: Policy
    share: Callable[[Sequence[Any]], Sequence[Any]]
    attempt: Callable[[Callable[[int], Rows]], Rows]

    def preference(self, candidate: Candidate) -> Rows:
        """The statistics of the held-out pairs, one row a pair."""
        store = PairStore(self.pairs, self.recipe.align.reverse)
        scorer = Scorer.of(self.policy)
        places = self.share(range(len(store)))
        device = next(self.policy.model.parameters()).device

        def measure(tokens: int) -> Rows:
            # Padded, since the other layouts give the model an attention that cannot generate.
            batches = collate_all(store, places, tokens, "response", "padded")
            rows = (
                row
                for batch in batches
                for row in pair_rows(scorer, candidate.view, batch.to(device))
            )
            return [
                *console.track(rows, f"pairs, {candidate.name}", len(places), every=len(places))
            ]

        return self.attempt(measure)

    def diversity(self, candidate: Candidate) -> Rows:
        """Several completions a prompt, by the protocol of the paper."""
        prompts = prompts_of_pairs(
            PairStore(self.pairs), self.recipe.data, self.recipe.eval.diversity_prompts
        )
        return self._complete(
            candidate, "diversity", prompts, replace(self.recipe.sample, **PROTOCOL)
        )

    def answers(self, candidate: Candidate) -> Rows:
        """Completions as [sample] asks for them, which the judges read."""
        prompts = prompts_of(self.recipe, self.pairs, self.chat)
        return self._complete(candidate, "answers", prompts, self.recipe.sample)

    def measure(self, measurement: Measurement) -> Rows:
        """This process's part of the rows of a measurement."""
        if measurement.what == "suite":
            return self.suite(measurement.candidate, measurement.suite)
        measure: Callable[[Candidate], Rows] = getattr(self, measurement.what)
        return measure(measurement.candidate)

    def suite(self, candidate: Candidate, suite: str) -> Rows:
        """A suite in the first process: the harness cannot divide the work on a loaded model."""
        if not self.share((0,)):
            return []
        figures: dict[str, Any] = {}
        batch_size = self.recipe.sample.batch_size
        with self.policy.view(candidate.view) as model:
            for task, shots in tasks_of(suite):
                console.say(f"{task}, {candidate.name} …")
                found, batch_size = with_less_at_once(
                    functools.partial(run_task, model, self.chat, task, shots), batch_size, task
                )
                figures |= found
        return [{"suite": suite, "figures": figures}]

    def _complete(
        self, candidate: Candidate, what: str, prompts: Sequence[Prompt], settings: Sample
    ) -> Rows:
        keys = [
            (prompt, number)
            for prompt in self.share(prompts)
            for number in range(settings.num_samples)
        ]
        batches = samples_of(
            self.policy, candidate.view, self.chat, keys, settings, self.recipe.run.seed
        )
        samples = itertools.chain.from_iterable(batches)
        return [*console.track(samples, f"{what}, {candidate.name}", len(keys), every=len(keys))]
