"""Several answers to a prompt and their marks: which pairs are made of them, or why none is."""

import json
import math
from collections import Counter

import pytest
from conftest import run_stage, write_jsonl

from tbpo_cli.config.recipe import Choose, load_recipe
from tbpo_cli.data.choosing import MarkedAnswer, choose
from tbpo_cli.data.pairs import draw
from tbpo_cli.data.prompts import held_out_texts
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import TbpoError


def choice(marks, cut=(), lengths=None, texts=None, seed=0, prompt="p", **settings):
    """What is chosen of answers with these marks; `cut` are the places of those that were cut."""
    answers = [
        MarkedAnswer(
            texts[place] if texts else f"answer {place}",
            mark,
            lengths[place] if lengths else 10,
            place in cut,
        )
        for place, mark in enumerate(marks)
    ]
    return choose(answers, Choose(**settings), seed, prompt)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("best_worst", ((2, 3),)),
        ("best_each", ((2, 0), (2, 1), (2, 3))),
        ("all", ((2, 0), (2, 1), (2, 3), (0, 1), (0, 3), (1, 3))),
    ],
)
def test_the_best_is_compared_with_the_worst_or_with_each_or_each_with_each(pairs, expected):
    assert choice([3.0, 2.0, 4.0, 1.0], pairs=pairs).pairs == expected
    assert choice([3.0, 2.0, 4.0, 1.0], pairs=pairs).reason == ""


# μ = 0 and σ = √((9 + 4 + 5) / 18) = 1, so that μ − 2σ = −2.
MARKS = [-3.0, -2.0, *[1.0] * 5, *[0.0] * 11]


def test_the_rejected_answer_is_the_nearest_to_two_standard_deviations_below_the_mean():
    assert choice(MARKS, pairs="best_two_sigma").pairs == ((2, 1),)
    assert choice(MARKS).pairs == ((2, 0),)


def test_the_standard_deviation_is_that_of_the_marks_themselves():
    """μ − 2σ = −6.35, nearer to −5 than to −8; with n − 1 as the denominator it would be −6.64."""
    marks = [-8.0, -5.0, 0.0, 0.0, *[1.0] * 7]
    assert choice(marks, pairs="best_two_sigma").pairs == ((4, 1),)


@pytest.mark.parametrize("marks", [[1, 2, 3, 4, 5], [0, 9, 9, 9, 9], [5, 1, 1, 7, 3], [2, 1, 3]])
def test_with_five_answers_or_fewer_two_standard_deviations_mean_the_worst(marks):
    """No mark of n is lower than μ − σ √(n − 1), which is μ − 2σ for n = 5."""
    assert choice(marks, pairs="best_two_sigma").pairs == choice(marks).pairs


def test_the_mean_is_that_of_all_marks_also_of_answers_that_repeat_another_one():
    """Of the marks of the four texts alone, μ − 2σ = −1 − 2 · 1.58, and the worst is nearest."""
    texts = [str(mark) for mark in MARKS]
    assert choice(MARKS, texts=texts, pairs="best_two_sigma").pairs == ((2, 1),)
    of_texts = [-3.0, -2.0, 1.0, 0.0]
    assert choice(of_texts, pairs="best_two_sigma").pairs == ((2, 0),)


def test_a_random_rejected_answer_is_drawn_by_seed_and_prompt_and_is_always_lower():
    marks = [5.0, 1.0, 2.0, 3.0, 5.0]
    drawn = {
        (seed, prompt): choice(marks, pairs="best_random", seed=seed, prompt=prompt).pairs
        for seed in range(3)
        for prompt in map(str, range(40))
    }
    again = {
        (seed, prompt): choice(marks, pairs="best_random", seed=seed, prompt=prompt).pairs
        for seed, prompt in drawn
    }
    assert again == drawn
    counts = Counter(pairs[0] for pairs in drawn.values())
    assert set(counts) == {(0, 1), (0, 2), (0, 3)}, "never the answer with the same mark"
    assert min(counts.values()) > 20, "120 draws of three"
    by_seed = [[drawn[seed, str(p)] for p in range(40)] for seed in range(3)]
    assert by_seed[0] != by_seed[1] != by_seed[2]
    assert 0 <= draw(0, "rejected p") < 1


def test_of_equal_best_marks_the_first_is_chosen():
    assert choice([1.0, 3.0, 3.0]).pairs == ((1, 0),)


@pytest.mark.parametrize(
    ("marks", "reason", "detail"),
    [
        ([2.0, 2.0, 2.0], "no_preference", "all 3 answers have the mark 2"),
        ([2.0, None, math.nan], "no_mark", "1 answers have a mark, and 2 have none"),
        ([None, math.inf, -math.inf], "no_mark", "0 answers have a mark, and 3 have none"),
        ([], "no_mark", "0 answers have a mark, and 0 have none"),
    ],
)
def test_a_prompt_without_a_pair_has_a_reason(marks, reason, detail):
    made = choice(marks)
    assert (made.pairs, made.reason, made.detail) == ((), reason, detail)


def test_answers_without_a_mark_are_left_out_and_counted():
    made = choice([math.nan, 1.0, None, 4.0, math.inf])
    assert made.pairs == ((3, 1),) and made.noted == {"no_mark": 3}


def test_answers_with_the_same_text_are_one_and_the_whole_one_of_them():
    made = choice([1.0, 4.0, 4.0, 4.0], texts=["x", "y", "y", "y"], cut=(1,))
    assert made.pairs == ((2, 0),) and made.noted == {"same_answer": 2}
    in_order = choice([5.0, 5.0, 5.0, 1.0], texts=["y", "x", "y", "z"], cut=(0,))
    assert in_order.pairs == ((1, 3),), "of equal marks the first whole answer, by its own place"
    same = choice([1.0, 4.0], texts=["x", "x"])
    assert (same.reason, same.noted) == ("identical", {"same_answer": 1})


def test_an_answer_that_was_cut_is_never_chosen_and_may_be_rejected():
    made = choice([3.0, 5.0, 1.0, 2.0], cut=(1, 2))
    assert made.pairs == ((0, 2),) and made.noted == {"cut_answer": 2}
    assert choice([3.0, 5.0, 1.0], cut=(1, 2), pairs="all").pairs == ((0, 2),)


@pytest.mark.parametrize("cut", [(0, 1, 2), (0, 1)])
def test_if_no_whole_answer_is_better_than_another_one_there_is_no_pair(cut):
    assert choice([3.0, 5.0, 1.0], cut=cut).reason == "all_cut"


def test_a_pair_has_the_least_margin_or_there_is_none():
    marks = [0.3, 0.2, 0.1]
    assert choice(marks, min_margin=0.2).pairs == ((0, 2),)
    assert choice(marks, min_margin=0.1, pairs="all").pairs == ((0, 1), (0, 2), (1, 2))
    none = choice(marks, min_margin=0.25)
    assert (none.reason, none.detail) == ("small_margin", "the largest margin is 0.2")


def test_a_pair_has_at_most_the_largest_difference_in_length():
    """The worst answer is too long; the worst of those that are not is rejected."""
    marks, lengths = [5.0, 1.0, 2.0, 3.0], [10, 90, 12, 15]
    assert choice(marks, lengths=lengths, max_length_difference=5).pairs == ((0, 2),)
    assert choice(marks, lengths=lengths, max_length_difference=80).pairs == ((0, 1),)
    none = choice(marks, lengths=lengths, max_length_difference=1)
    assert none.reason == "length_difference" and none.detail.startswith("2 tokens")


ANSWERS = ["yes", "no it is not so", "maybe", "well well well well well", "yes"]


def scored_rows(count):
    """Rows like UltraFeedback's; the answers of each prompt differ from those of the others."""
    return [
        {
            "prompt": f"question {number}",
            "answers": [f"{text} {number}" for text in ANSWERS],
            "scores": [4, 1, None, 0, 4],
        }
        for number in range(count)
    ]


def prepared(recipe_file, run, rows, *sets):
    train = write_jsonl(run.parent / f"{run.name}.jsonl", rows)
    sets = (f"data.train={train}", "data.format=auto", *sets)
    run = run_stage("prepare", recipe_file, run, *sets, restart=True)  # nothing of a run beside it
    return run, json.loads((run / "prepare/manifest.json").read_text())["counts"][-1]


def test_scored_answers_are_prepared_as_the_recipe_chooses(recipe_file, tmp_path):
    """Without a limit the longest answer is rejected, which is the worst; with one, the next."""
    run, counts = prepared(recipe_file, tmp_path / "a", scored_rows(6))
    assert (counts["format"], counts["kept"], counts["rejected"]) == ("ranked", {"train": 6}, {})
    assert {name: n for name, n in counts["noted"].items() if n} == {"no_mark": 6, "same_answer": 6}
    lengths = PairStore(run / "prepare/train").lengths
    limit = "choose.max_length_difference=13"
    near, _ = prepared(recipe_file, tmp_path / "b", scored_rows(6), limit)
    shorter = PairStore(near / "prepare/train").lengths
    assert (shorter[:, 1] == lengths[:, 1]).all() and (shorter[:, 2] < lengths[:, 2]).all()
    assert (abs(shorter[:, 1] - shorter[:, 2]) <= 13 + 1).all()


@pytest.mark.parametrize(
    ("num_tokens", "limit", "expected"),
    [
        (None, 0, {"train": 6}),  # five tokens and the end of the turn; six tokens, cut
        (None, 1, {"train": 6}),
        ([6, 9], 2, {"train": 0}),
        ([6, 9], 3, {"train": 6}),
        (11, 0, {"train": 6}),  # a number that is of the whole row
    ],
)
def test_the_length_of_an_answer_is_that_which_is_trained_on(
    recipe_file, tmp_path, num_tokens, limit, expected
):
    """As its row says, else as it is counted: with the end of the turn, which a cut one has not."""
    rows = [
        {
            "prompt": f"question {number}",
            "answers": ["abcde", "vwxyz!"],  # of letters that the tokenizer does not merge
            "scores": [2, 1],
            "truncated": [False, True],
            "num_tokens": num_tokens,
        }
        for number in range(6)
    ]
    sets = (f"choose.max_length_difference={limit}",)
    if not expected["train"]:
        with pytest.raises(TbpoError, match="6 length_difference"):
            prepared(recipe_file, tmp_path / "a", rows, *sets)
        return
    run, counts = prepared(recipe_file, tmp_path / "a", rows, *sets)
    assert counts["kept"] == expected
    assert (PairStore(run / "prepare/train").lengths[:, 1:] == 6).all()


@pytest.mark.parametrize(
    ("sets", "reason", "fix"),
    [
        ("choose.min_margin=9", "6 small_margin", "lower choose.min_margin"),
        ("choose.max_length_difference=0", "6 length_difference", "raise choose.max_length"),
    ],
)
def test_where_the_choice_leaves_no_pair_the_key_is_named(recipe_file, tmp_path, sets, reason, fix):
    with pytest.raises(TbpoError, match=reason) as error:
        prepared(recipe_file, tmp_path / "a", scored_rows(6), sets)
    assert fix in error.value.fix
    assert "max_reject_fraction" not in error.value.fix, "no fraction makes a pair of none"


def test_any_number_of_workers_draws_the_same(recipe_file, tmp_path):
    rows = [row | {"scores": [4, 1, 2, 0, 4]} for row in scored_rows(20)]
    stores = [
        (
            prepared(
                recipe_file,
                tmp_path / f"{n}",
                rows,
                "choose.pairs=best_random",
                f"data.workers={n}",
            )[0]
            / "prepare/train/pairs.arrow"
        ).read_bytes()
        for n in (1, 2)
    ]
    assert stores[0] == stores[1]


def test_the_texts_of_held_out_pairs_are_found_whatever_was_chosen(recipe_file, tmp_path):
    file = write_jsonl(tmp_path / "eval.jsonl", scored_rows(8))
    sets = (f"data.eval={file}", "data.format=auto", "choose.pairs=best_random")
    run = run_stage("prepare", recipe_file, tmp_path / "run", *sets)
    store = PairStore(run / "prepare/eval")
    ids = {store[index].pair_id for index in range(len(store))}
    assert len(ids) == 8 == len(held_out_texts(load_recipe(recipe_file, sets).data, ids))


def test_the_key_of_an_earlier_version_is_answered_with_the_one_of_now(recipe_file):
    with pytest.raises(TbpoError, match=r"data\.ranking is an unknown key") as error:
        load_recipe(recipe_file, ("data.ranking=all",))
    assert error.value.fix == "it is called choose.pairs now"
