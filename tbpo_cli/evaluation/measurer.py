"""What one of several processes measures of the models of an evaluation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.batch.batches import collate_all
from tbpo_cli.batch.layouts import blank_batch
from tbpo_cli.config.recipe import Recipe, Sample
from tbpo_cli.data.prompts import Prompt, prompts_of, prompts_of_pairs
from tbpo_cli.data.store import PairStore
from tbpo_cli.data.templates import Chat
from tbpo_cli.evaluation.candidates import Candidate
from tbpo_cli.evaluation.diversity import PROTOCOL
from tbpo_cli.evaluation.kept import Key
from tbpo_cli.evaluation.measurements import Measurement
from tbpo_cli.evaluation.measures import tasks_of
from tbpo_cli.evaluation.preference import pair_rows
from tbpo_cli.evaluation.suites import run_task
from tbpo_cli.model.generate import samples_of
from tbpo_cli.model.out_of_memory import with_less_at_once
from tbpo_cli.model.policy import Policy
from tbpo_cli.model.scoring import Scorer
from tbpo_cli.model.sharding import LanguageModel, causal_model
from tbpo_cli.model.together import ALONE, Together

Rows = list[dict[str, Any]]
Known = Mapping[Key, dict[str, Any]]


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
        known: gives the completions of a measurement that are there already.
        together: the processes that make the passes, of which all measure the same.
    """

    recipe: Recipe
    pairs: Path
    chat: Chat
    policy: Policy
    share: Callable[[Sequence[Any]], Sequence[Any]]
    attempt: Callable[[Callable[[int], Rows]], Rows]
    known: Callable[[Measurement], Known]
    together: Together = ALONE

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
                for batch in self.together.equally_many(batches, blank_batch())
                for row in pair_rows(scorer, candidate.view, batch.to(device))
            )
            return [
                *console.track(rows, f"pairs, {candidate.name}", len(places), every=len(places))
            ]

        return self.attempt(measure)

    def diversity(self, candidate: Candidate, known: Known) -> Rows:
        """Several completions a prompt, by the protocol of the paper."""
        prompts = prompts_of_pairs(
            PairStore(self.pairs), self.recipe.data, self.recipe.eval.diversity_prompts
        )
        settings = replace(self.recipe.sample, **PROTOCOL)
        return self._complete(candidate, "diversity", prompts, settings, known)

    def answers(self, candidate: Candidate, known: Known) -> Rows:
        """Completions as [sample] asks for them, which the judges read."""
        prompts = prompts_of(self.recipe, self.pairs, self.chat)
        return self._complete(candidate, "answers", prompts, self.recipe.sample, known)

    def measure(self, measurement: Measurement) -> Rows:
        """This process's part of the rows of a measurement."""
        candidate = measurement.candidate
        if measurement.what == "suite":
            return self.suite(candidate, measurement.suite)
        if measurement.what == "preference":
            return self.preference(candidate)
        measure: Callable[[Candidate, Known], Rows] = getattr(self, measurement.what)
        return measure(candidate, self.known(measurement))

    def suite(self, candidate: Candidate, suite: str) -> Rows:
        """A suite in the first process: the harness cannot divide the work on a loaded model.

        Where the weights are sharded, the other processes run the same, for its passes.
        """
        is_first = bool(self.share((0,)))
        is_alone = self.together.folder is None
        if is_alone and not is_first:
            return []
        figures: dict[str, Any] = {}
        batch_size = self.together.batch_size(self.recipe.sample.batch_size)
        with self.policy.view(candidate.view) as model, _generating_together(model, not is_alone):
            for task, shots in tasks_of(suite):
                console.say(f"{task}, {candidate.name} …")
                found, batch_size = with_less_at_once(
                    functools.partial(run_task, model, self.chat, task, shots),
                    batch_size,
                    task,
                    self.together,
                )
                figures |= found
        return [{"suite": suite, "figures": figures}] if is_first else []

    def _complete(
        self,
        candidate: Candidate,
        what: str,
        prompts: Sequence[Prompt],
        settings: Sample,
        known: Known,
    ) -> Rows:
        """This process's part of some completions, of which only those not `known` are made."""
        keys = [
            (prompt, number)
            for prompt in self.share(prompts)
            for number in range(settings.num_samples)
        ]
        ids = [(prompt.prompt_id, number) for prompt, number in keys]
        rows = [known[each] for each in ids if each in known]
        if not self.together.any(len(rows) < len(keys)):
            return rows
        places = {place for place, each in enumerate(ids) if each in known}
        seed = self.recipe.run.seed
        batches = samples_of(
            self.policy, candidate.view, self.chat, keys, settings, seed, places, self.together
        )
        made = (row for batch in batches for row in batch)
        new = (row for row in made if (row["prompt_id"], row["sample"]) not in known)
        left = len(keys) - len(rows)
        return [*rows, *console.track(new, f"{what}, {candidate.name}", left, every=left)]


@contextlib.contextmanager
def _generating_together(model: LanguageModel, is_sharded: bool) -> Iterator[None]:
    """Lets transformers' own generation go on until all processes have ended."""
    causal: Any = causal_model(model)
    causal._is_fsdp_managed_module = is_sharded
    try:
        yield
    finally:
        causal._is_fsdp_managed_module = False
