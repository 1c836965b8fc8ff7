"""Which of two answers is better: what words say, and what the numbers of a whole column say."""

import json

import pytest
from conftest import run_stage, write_jsonl

from tbpo_cli.config.recipe import Data, Source
from tbpo_cli.data.formats import format_faults, recognise, to_pairs
from tbpo_cli.data.pairs import RejectedRow
from tbpo_cli.data.prompts import held_out_texts
from tbpo_cli.data.sources import ROWS_AT_A_TIME, Row
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import TbpoError

UNUSED = (Source("unused"),)
A_AND_B = ("response_a", "response_b")


def choice(number, winner, sides=A_AND_B, column="winner"):
    return {"prompt": f"p {number}", sides[0]: "first", sides[1]: "second", column: winner}


def column_of(values, sides=A_AND_B, column="winner"):
    return [choice(number, value, sides, column) for number, value in enumerate(values)]


def chosen_of(contents, **data):
    """The chosen text of every row; of one that is rejected, its reason."""
    settings = Data(train=UNUSED, **data)
    rows = [Row("here", number, content) for number, content in enumerate(contents, 1)]
    name, found = recognise(lambda: iter(rows), settings)
    texts = []
    for row in found:
        try:
            texts += [pair.chosen["content"] for pair in to_pairs(row, name, settings).pairs]
        except RejectedRow as reason:
            texts.append(reason.reason)
    return texts


@pytest.mark.parametrize("column", ["winner", "preference", "preferred", "choice", "better"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 1], ["first", "second", "first"]),
        ([2, 1, 1], ["second", "first", "first"]),
        ([0, 1, 0], ["first", "second", "first"]),
        (["1", "2"], ["first", "second"]),  # of a CSV file
        ([2.0, 1.0], ["second", "first"]),
        (["response_1", "response_2"], ["first", "second"]),
        ([1, "tie", 2, -1], ["first", "no_preference", "second", "no_preference"]),
        (["a", "B", "model_b", "response_a", "tie"], None),
    ],
)
def test_numbers_count_from_what_the_whole_column_begins_with(column, values, expected):
    expected = expected or ["first", "second", "second", "first", "no_preference"]
    assert chosen_of(column_of(values, column=column)) == expected


@pytest.mark.parametrize(
    ("sides", "values"),
    [
        (("response_0", "response_1"), [1, 1]),
        (("response_1", "response_2"), [2, 2]),
        (("response_1", "response_2"), ["response_2", "2"]),
        (("output_1", "output_2"), [2.0, "b"]),
        (("answer1", "answer2"), ["answer2", 2]),
    ],
)
def test_answers_with_numbers_in_their_names_are_called_by_them(sides, values):
    assert chosen_of(column_of(values, sides, "preference")) == ["second", "second"]


@pytest.mark.parametrize(
    ("values", "sides", "column", "shown"),
    [
        ([1, 1], A_AND_B, "winner", "1"),
        ([0, 0], A_AND_B, "winner", "0"),
        ([0, 1, 2], A_AND_B, "winner", "0, 1, 2"),
        ([1, 2, 3], A_AND_B, "winner", "1, 2, 3"),
        ([-1, 0, 1], A_AND_B, "winner", "0, 1, -1"),
        ([-1, 1], A_AND_B, "preference", "1, -1"),
        ([0.3, 0.9], A_AND_B, "preference", "0.3, 0.9"),
        ([True, False], A_AND_B, "winner", "true, false"),
        (["True", "False"], A_AND_B, "preference", "true, false"),
        ([1, 0], A_AND_B, "label", "0, 1"),
        ([0, 1], ("response_1", "response_2"), "preference", "0, 1"),
        ([1, 2], ("response_0", "response_1"), "better_response_id", "1, 2"),
    ],
)
def test_numbers_that_leave_open_which_answer_they_mean_are_asked_about(
    values, sides, column, shown
):
    with pytest.raises(TbpoError, match=f"the column {column} leaves open") as error:
        chosen_of(column_of(values, sides, column))
    assert error.value.what.endswith(f"its values are {shown}")
    assert "here, row " in error.value.where
    assert all(f'"{side}"' in error.value.fix for side in sides)


def test_a_number_that_comes_late_decides_for_the_first_rows_as_well(recipe_file, tmp_path):
    """1,200 rows with 1, in two chunks, and one with 2 behind them."""
    number = ROWS_AT_A_TIME + 200
    train = write_jsonl(tmp_path / "rows.jsonl", column_of([1] * number + [2]))
    run = run_stage("prepare", recipe_file, tmp_path / "run", f"data.train={train}")
    store = PairStore(run / "prepare/train")
    pairs = [store[index] for index in range(len(store))]
    assert len(pairs) == number + 1
    assert {tuple(pair.chosen_ids) for pair in pairs[:-1]} == {tuple(pairs[-1].rejected_ids)}
    data = Data(train=UNUSED, eval=(Source(str(train)),))
    texts = held_out_texts(data, {pairs[0].pair_id, pairs[-1].pair_id})
    assert texts[pairs[0].pair_id].chosen["content"] == "first"
    assert texts[pairs[-1].pair_id].chosen["content"] == "second"


def test_the_column_with_the_winner_may_have_another_name():
    contents = [{**choice(n, value), "who_won": value} for n, value in enumerate([1, 2])]
    for content in contents:
        del content["winner"]
    assert chosen_of(contents, columns={"winner": "who_won"}) == ["first", "second"]


def test_the_better_answer_may_be_written_out():
    assert chosen_of(column_of(["second", "first"], column="chosen")) == ["second", "first"]


def test_three_answers_are_no_choice_of_two():
    sides = ("response_0", "response_1")
    contents = [content | {"response_2": "third"} for content in column_of([1, 2], sides)]
    with pytest.raises(TbpoError, match="the rows have 3 answers each"):
        chosen_of(contents)


def test_rows_of_shp_say_by_their_label_whether_a_is_better():
    row = {"history": "hello", "human_ref_A": "first", "human_ref_B": "second"}
    rows = [row | {"labels": 1}, row | {"labels": 0}, row | {"labels": 2}]
    assert chosen_of(rows) == ["first", "second", "wrong_type"]


@pytest.mark.parametrize(
    ("column", "sides"),
    [
        ("preference_strength", ("response_1", "response_2")),
        ("overall_preference", ("response1", "response2")),
    ],
)
def test_strengths_of_helpsteer_are_below_zero_where_the_first_is_better(column, sides):
    rows = [choice(number, value, sides, column) for number, value in enumerate([-3, 1, 0])]
    assert chosen_of(rows) == ["first", "second", "no_preference"]
    for row in rows:
        row["context"] = [{"role": "user", "content": row.pop("prompt")}]
    assert chosen_of(rows) == ["first", "second", "no_preference"]


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"chosen": "rejected", "rejected": "chosen"}, "exchanges chosen and rejected"),
        ({"chosen": "bad_answer", "rejected": "good_answer"}, "exchanges chosen and rejected"),
        ({"chosen": "y_l", "rejected": "y_w"}, "exchanges chosen and rejected"),
        ({"chosen": "rejected"}, "reads chosen and rejected from one column, rejected"),
        ({"response_a": "response_b", "response_b": "response_a"}, "exchanges response_a"),
        (
            {"score_chosen": "score_rejected", "score_rejected": "score_chosen"},
            "exchanges score_chosen",
        ),
    ],
)
def test_exchanged_columns_are_a_fault_of_the_recipe(columns, what):
    (fault,) = format_faults(Data(train=UNUSED, columns=columns), "my.toml")
    assert what in fault.what and "my.toml" in fault.where and fault.fix


@pytest.mark.parametrize(
    "columns",
    [
        {"chosen": "good_answer", "rejected": "bad_answer"},
        {"chosen": "y_w", "rejected": "y_l"},
        {"prompt": "input", "input": "prompt"},
        {"chosen": "answer_list", "rejected": "other_answers_won"},
    ],
)
def test_other_names_of_columns_are_no_exchange(columns):
    assert format_faults(Data(train=UNUSED, columns=columns), "my.toml") == []


def test_exchanged_columns_stop_the_command(tbpo, recipe_file):
    columns = json.dumps({"chosen": "rejected", "rejected": "chosen"}).replace(":", " =")
    done = tbpo("prepare", recipe_file, "--set", f"data.columns={columns}")
    assert done.returncode == 2
    assert "data.columns exchanges chosen and rejected" in done.stderr
    assert "take both lines out" in done.stderr
