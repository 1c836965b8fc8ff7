"""The one path: a pair is followed from its row to its gradient, through the real stages.

A pair takes the forms below, one after the other. A call on the path is one, from another file,
that makes the next form; the functions of its own file that it calls count with it. What only
repeats such calls, or hands a form on, is no call on the path, but its files are pinned as well.
"""

import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import change_recipe, preference_rows, run_stage, write_jsonl

import tbpo_cli
from tbpo_cli.batch.layouts import PairBatch
from tbpo_cli.core import LossOutput, PairScores, SideScores
from tbpo_cli.data.pairs import PreferencePair
from tbpo_cli.data.tokens import TokenizedPair

PACKAGE = str(Path(tbpo_cli.__file__).parent)
HIDDEN_SIZE = 32
CALLS = [
    ("data/formats/__init__.py", "to_pair"),
    ("data/tokens.py", "tokenize_pairs"),
    ("data/store.py", "record_batch"),
    ("data/store.py", "PairStore.__getitem__"),
    ("batch/layouts.py", "collate"),
    ("model/scoring.py", "Scorer.score"),
    ("core/head.py", "token_statistics"),
    ("core/losses/token_level.py", "TbpoA.__call__"),
    ("train/step.py", "Stepper._backward"),
]
# Loops over chunks of rows and over micro-batches, and the thread that makes the next step's.
HAND_ON = {"data/chunks.py", "batch/batches.py", "train/feed.py"}
FORMS = (  # what a form is known by, also within a list, a tuple or a dict
    lambda value, _: isinstance(value, PreferencePair),
    lambda value, _: (
        isinstance(value, tuple)
        and len(value) == 3
        and all(isinstance(text, str) for text in value)
    ),
    lambda value, _: isinstance(value, TokenizedPair),
    lambda value, _: isinstance(value, pa.RecordBatch),
    lambda value, _: isinstance(value, TokenizedPair),  # read back, by another command
    lambda value, pair: (
        isinstance(value, PairBatch) and value.pair_ids == (pair.pair_id,)
    ),  # not one of a trial
    lambda value, batch: (
        isinstance(value, torch.Tensor) and value.shape == (len(batch.tokens), HIDDEN_SIZE)
    ),
    lambda value, _: isinstance(value, SideScores),
    lambda value, _: isinstance(value, PairScores),
    lambda value, _: isinstance(value, LossOutput),
)
NAMED = (
    PreferencePair,
    TokenizedPair,
    pa.RecordBatch,
    PairBatch,
    SideScores,
    PairScores,
    LossOutput,
)


class Follower:
    """A profile function that notes the calls of the path until `backward` is called."""

    def __init__(self):
        self.entries, self.last, self.num_forms, self.handed_on, self.arrived = (
            [],
            None,
            0,
            set(),
            False,
        )

    def __call__(self, frame, event, value):
        if self.arrived or event not in ("call", "return"):
            return
        if event == "call" and frame.f_code is torch.Tensor.backward.__code__:
            self.entries.append(frame.f_back)
            self.arrived = True
        elif event == "return" and frame.f_code.co_filename.startswith(PACKAGE):
            items = [value, *value] if isinstance(value, list | tuple) else [value]
            if any(isinstance(item, NAMED) for item in items):
                self.handed_on.add(file_of(frame))
            if self.num_forms == len(FORMS) or not FORMS[self.num_forms](value, self.last):
                return
            self.last, self.num_forms = value, self.num_forms + 1
            if (entry := entry_of(frame)) not in self.entries:
                self.entries.append(entry)


def file_of(frame):
    return frame.f_code.co_filename.removeprefix(f"{PACKAGE}/")


def entry_of(frame):
    """The call by which the frame's file was entered."""
    entry = frame
    while frame := frame.f_back:
        if frame.f_code.co_filename.startswith(PACKAGE):
            if file_of(frame) != file_of(entry):
                break
            entry = frame
    return entry


@pytest.mark.parametrize("layout", ["shared_prompt", "padded"])
def test_a_pair_is_followed_from_its_row_to_its_gradient_through_eight_files_and_nine_calls(
    recipe_file, tmp_path, layout
):
    row = write_jsonl(tmp_path / "one.jsonl", preference_rows(1))
    change_recipe(recipe_file, data={"eval": None})
    sets = (
        f"data.train={row}",
        "data.eval_fraction=0.0",
        "align.batch_pairs=1",
        "align.max_steps=1",
        "align.log_every=2",
        f"align.layout={layout}",
    )
    follower = Follower()
    threading.setprofile(follower)
    sys.setprofile(follower)
    try:
        run_stage("align", recipe_file, tmp_path / "run", *sets)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert [(file_of(frame), frame.f_code.co_qualname) for frame in follower.entries] == CALLS
    files = [file for file, _ in CALLS]
    assert len(set(files)) == 8 and follower.handed_on - set(files) == HAND_ON
