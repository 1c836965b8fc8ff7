"""Held-out prompts: how many, which, and that the training rows do not repeat them."""

import json

import pytest
from conftest import change_recipe, preference_rows, run_stage, sentence, write_jsonl

from tbpo_cli.data.held_out import held_out_prompts
from tbpo_cli.data.store import PairStore


@pytest.mark.parametrize(
    ("num_prompts", "fraction", "expected"),
    [
        (1000, 0.05, 50),
        (1000, 0.2, 200),
        (1000, 0.001, 20),  # at least 20
        (100, 0.001, 5),  # or 5 %
        (7, 0.05, 1),  # never none
        (2, 0.9, 1),  # never all
        (1, 0.5, 0),
        (1000, 0.0, 0),
    ],
)
def test_an_exact_share_of_the_prompts_is_held_out(num_prompts, fraction, expected):
    prompts = [f"{number:016x}" for number in range(num_prompts)] * 2
    held_out = held_out_prompts(prompts, fraction, seed=0)
    assert len(held_out) == expected and held_out <= {*prompts}
    assert held_out == held_out_prompts(prompts[::-1], fraction, seed=0), "whatever the order"
    if 0 < expected < num_prompts - 1:
        assert held_out != held_out_prompts(prompts, fraction, seed=1)


def test_every_pair_of_a_held_out_prompt_is_held_out_and_counted_by_source(recipe_file, tmp_path):
    rows = preference_rows(60, seed=5)
    again = [row | {"chosen": "another one."} for row in rows]
    first = write_jsonl(tmp_path / "first.jsonl", rows)
    second = write_jsonl(tmp_path / "second.jsonl", again)
    change_recipe(recipe_file, data={"eval": None})
    sets = (f'data.train=["{first}", "{second}"]', "data.eval_fraction=0.1")
    run = run_stage("prepare", recipe_file, tmp_path / "run", *sets)
    train, held_out = (
        [tuple(pair.prompt_ids) for pair in PairStore(run / "prepare" / split)]
        for split in ("train", "eval")
    )
    assert (len(train), len(held_out), len({*held_out})) == (108, 12, 6)
    assert not {*train} & {*held_out}
    counts = json.loads((run / "prepare/manifest.json").read_text())["counts"]
    assert [count["kept"] for count in counts] == [{"train": 54, "eval": 6}] * 2


@pytest.mark.parametrize(
    ("fraction", "num_rows", "says"),
    [
        (0.0, 30, "no pair is held out, since data.eval_fraction is 0"),
        (0.05, 1, "no pair is held out, since there is but one prompt"),
        (0.1, 30, "only 3 prompts are held out"),
    ],
)
def test_few_held_out_prompts_are_warned_of(recipe_file, tmp_path, capfd, fraction, num_rows, says):
    train = write_jsonl(tmp_path / "rows.jsonl", preference_rows(num_rows, seed=5))
    change_recipe(recipe_file, data={"eval": None})
    sets = (f"data.train={train}", f"data.eval_fraction={fraction}")
    run_stage("prepare", recipe_file, tmp_path / "run", *sets)
    assert says in " ".join(capfd.readouterr().err.split())


def test_held_out_prompts_that_training_pairs_repeat_can_be_left_out(recipe_file, tmp_path):
    """Of three held-out prompts one is within a training prompt, one half, one not at all."""
    import random

    rng = random.Random(3)
    long, half, other = (sentence(rng, 40, 41) for _ in range(3))
    words = half.split()
    begun = " ".join([*words[: len(words) // 4], *sentence(rng, 30, 31).split()])
    train = [
        {"prompt": f"First of all: {long} And then?", "chosen": "one", "rejected": "two"},
        {"prompt": begun, "chosen": "one", "rejected": "two"},
    ]
    held_out = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in (long, half, other)]
    sets = [
        f"data.train={write_jsonl(tmp_path / 'train.jsonl', train)}",
        f"data.eval={write_jsonl(tmp_path / 'held.jsonl', held_out)}",
    ]
    kept = {}
    for threshold in (None, 0.5, 0.05):
        more = [] if threshold is None else [f"data.max_eval_overlap={threshold}"]
        run = run_stage("prepare", recipe_file, tmp_path / str(threshold), *sets, *more)
        counts = json.loads((run / "prepare/manifest.json").read_text())["counts"][0]
        kept[threshold] = (len(PairStore(run / "prepare/eval")), counts["noted"].get("overlap"))
        assert counts["kept"]["eval"] == kept[threshold][0]
    assert kept == {None: (3, None), 0.5: (2, 1), 0.05: (1, 2)}
