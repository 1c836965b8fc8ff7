"""The one path: a pair is followed from its row to its gradient, through the real stages.

A pair takes eight forms, one after the other; each is made behind a door, a public function of one
file. Behind the doors other functions of ours do the work, and a profiler sees all of them. The
training step calls the doors from `collate` on, and makes the scalar and its gradient.
"""

import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import change_recipe, preference_rows, run_stage, write_jsonl

import tbpo_cli
from tbpo_cli.batch.layouts import PairBatch
from tbpo_cli.core import LossOutput, PairScores
from tbpo_cli.data.pairs import MadePairs, PreferencePair
from tbpo_cli.data.tokens import TokenizedPair

PACKAGE = str(Path(tbpo_cli.__file__).parent)
DOORS = {  # file, function: the form that it makes
    ("data/formats/__init__.py", "to_pairs"): PreferencePair,
    ("data/tokens.py", "render_pairs"): PreferencePair,  # beside its three texts
    ("data/tokens.py", "encode_pairs"): TokenizedPair,
    ("data/store.py", "record_batch"): pa.RecordBatch,
    ("data/store.py", "PairStore.__getitem__"): TokenizedPair,  # read back, by another command
    ("batch/layouts.py", "collate"): PairBatch,
    ("model/scoring.py", "Scorer.score"): PairScores,
    ("core/losses/base.py", "PreferenceLoss.__call__"): LossOutput,
}
STEP = "train/step.py"
MOST_FUNCTIONS, MOST_FILES = 176, 34  # that a stranger reads to know all of the way


@dataclass
class Passage:
    """A call of a door: what it returned, and which functions of ours ran behind it."""

    door: tuple[str, str]
    behind: set = field(default_factory=set)
    made: object = None


class Follower:
    """A profile function that notes the passages through the doors until a gradient is computed.

    A function behind two doors, one in the other, counts with the inner one.
    """

    def __init__(self):
        self.passages = []
        self.scalar = None
        self.outside = []  # functions that run when the gradient is computed, the innermost last
        self.open = threading.local()

    def __call__(self, frame, event, value):
        if event not in ("call", "return") or self.scalar is not None:
            return
        if event == "call" and frame.f_code is torch.Tensor.backward.__code__:
            self.scalar = frame.f_locals["self"].detach().clone()
            self.outside = [*functions_on_the_stack(frame.f_back)]
            return
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return
        here = function_of(frame)
        stack = self.open.__dict__.setdefault("stack", [])
        if event == "call":
            if stack and not frame.f_code.co_name.startswith("<"):  # as comprehensions
                stack[-1].behind.add(here)
            if here in DOORS or (here[0] == STEP and not stack):
                stack.append(Passage(here))
                self.passages.append(stack[-1])
        elif stack and stack[-1].door == here:
            stack.pop().made = value

    def last(self, door):
        """The last passage through a door, with its place in time: earlier ones are of trials."""
        return [(n, p) for n, p in enumerate(self.passages) if p.door == door][-1]


def function_of(frame):
    return frame.f_code.co_filename.removeprefix(f"{PACKAGE}/"), frame.f_code.co_qualname


def functions_on_the_stack(frame):
    while frame:
        if frame.f_code.co_filename.startswith(PACKAGE):
            yield function_of(frame)
        frame = frame.f_back


def only(made):
    """The one pair's form, which a function for several returns in a list or beside others."""
    made = made.pairs if isinstance(made, MadePairs) else made
    while isinstance(made, list | tuple):
        forms = list | tuple | PreferencePair | TokenizedPair
        made = next(item for item in made if isinstance(item, forms))
    return made


@pytest.mark.parametrize("layout", ["shared_prompt", "padded"])
def test_a_pair_is_followed_from_its_row_to_its_gradient(recipe_file, tmp_path, layout):
    row = write_jsonl(tmp_path / "one.jsonl", preference_rows(1))
    change_recipe(recipe_file, data={"train": str(row), "eval": None, "eval_fraction": 0.0})
    settings = {"batch_pairs": 1, "max_steps": 1, "log_every": 2, "layout": layout}
    change_recipe(recipe_file, align={**settings, "eval_every": None, "checkpoint_every": None})
    follower = Follower()
    threading.setprofile(follower)
    sys.setprofile(follower)
    try:
        run_stage("align", recipe_file, tmp_path / "run")
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    times, passages = zip(*map(follower.last, DOORS), strict=True)
    assert [*times] == sorted(times), "the forms follow each other"
    pair, texts, tokens, columns, again, batch, scores, output = (
        only(one.made) for one in passages
    )
    forms = [type(form) for form in (pair, texts, tokens, columns, again, batch, scores, output)]
    assert forms == [*DOORS.values()]
    ids = {
        pair.pair_id,
        texts.pair_id,
        tokens.pair_id,
        columns["pair_id"][0].as_py(),
        again.pair_id,
    }
    assert ids == {*batch.pair_ids} and len(ids) == 1, "it is one and the same pair"
    assert (tokens.chosen_ids == again.chosen_ids).all()
    num_tokens = (len(again.chosen_ids), len(again.rejected_ids))
    aligned = min(num_tokens)
    assert scores.chosen.mask.sum() == scores.rejected.mask.sum() == aligned <= max(num_tokens)
    assert follower.scalar.shape == () and follower.scalar == output.per_pair.sum()
    assert follower.outside[0][0] == STEP, "the scalar is made in the training step"
    step = [passage for passage in follower.passages if passage.door[0] == STEP]
    functions = {*DOORS}.union(*(passage.behind for passage in (*passages, *step)))
    assert len(functions) <= MOST_FUNCTIONS
    assert len({file for file, _ in functions}) <= MOST_FILES
