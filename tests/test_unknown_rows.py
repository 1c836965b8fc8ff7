"""What is said of rows and files that are not understood: what they hold, and what to do."""

import json

import pytest
from conftest import preference_rows, run_stage, write_jsonl

from tbpo_cli.config.recipe import Data, Source
from tbpo_cli.data.formats import recognise, to_pairs
from tbpo_cli.data.pairs import RejectedRow
from tbpo_cli.data.sources import Row, read_rows
from tbpo_cli.errors import TbpoError

UNUSED = (Source("unused"),)
PLAIN = {"prompt": "hello", "chosen": "hi", "rejected": "go"}


def said_of(content, source="rows.jsonl"):
    """What the rows are said to be."""
    with pytest.raises(TbpoError) as error:
        recognise(lambda: iter([Row(source, 1, content)]), Data(train=UNUSED))
    return error.value


def pairs_of(content):
    data = Data(train=UNUSED)
    name, rows = recognise(lambda: iter([Row("here", 1, content)]), data)
    return name, [pair for row in rows for pair in to_pairs(row, name, data).pairs]


# Rows, what is said of them, parts of the way out, and what must not be in it.
ADVICE = {
    "two answers and a column that decides": (
        {"q": "hello", "answer_1": "hi", "answer_2": "go", "human_verdict": 1},
        "the column human_verdict decides which of answer_1 and answer_2 is better",
        ('response_a = "answer_1"', 'response_b = "answer_2"', 'winner = "human_verdict"'),
        "chosen =",
    ),
    "two answers and truth": (
        {"q": "hello", "left": "hi", "right": "go", "better_is_left": True},
        "the column better_is_left decides which of left and right is better",
        ('write "a" (for left) or "b"', 'winner = "better_is_left"'),
        "chosen =",
    ),
    "two answers and several columns that decide": (
        {"prompt": "hello", "answer_a": "hi", "answer_b": "go", "score_a": 4, "score_b": 1},
        "the columns score_a, score_b decide",
        ("one column winner", "responses and one of scores"),
        "chosen =",
    ),
    "two answers alone": (
        {"question": "hello", "answer_a": "hi", "answer_b": "go"},
        "nothing says which of answer_a and answer_b is better",
        ("add a column winner", "only if answer_a is always better", 'chosen = "answer_a"'),
        "prefer",
    ),
    "answers with ranks or an order": (
        {"prompt": "hello", "responses": ["hi", "go"], "rankings": [1, 2]},
        "the column rankings says how good the answers in responses are",
        ('ranks = "rankings"', "the best one first"),
        "scores =",
    ),
    "answers with numbers": (
        {"q": "hello", "texts": ["hi", "go"], "points": [1, 2]},
        "the column points says how good the answers in texts are",
        ('prompt = "q"', 'responses = "texts"', 'scores = "points"'),
        "chosen =",
    ),
    "Alpaca's output with two answers": (
        {"instruction": "hello", "input": "", "output": ["hi", "go"]},
        "nothing says which of the answers in output is better",
        ("write the better answer as chosen", "scores"),
        "[data.columns]",
    ),
    "HelpSteer": (
        {"prompt": "hello", "response": "hi", "helpfulness": 4, "correctness": 3},
        "one answer each, marked by helpfulness, correctness",
        ("put the rows of one prompt together", '"responses": [response, …]'),
        "[data.columns]",
    ),
    "one answer that is good or bad": (
        {"query": "hello", "reply": "hi", "thumbs_up": True},
        "one answer each, and the column thumbs_up marks it",
        ('completion = "reply"', 'label = "thumbs_up"'),
        "chosen =",
    ),
    "rows within a column": (
        {"data": PLAIN},
        "they are within data",
        ("write what is in data as the row",),
        "[data.columns]",
    ),
    "whole columns": (
        {name: [text, text] for name, text in PLAIN.items()},
        "the row holds whole columns",
        ("a row for each comparison",),
        "[data.columns]",
    ),
    "lists of texts": (
        {"prompt": "hello", "chosen": ["hi"], "rejected": ["go"]},
        "the column chosen holds a list of texts",
        ("write one text there",),
        "[data.columns]",
    ),
}


@pytest.mark.parametrize("name", ADVICE)
def test_no_lines_are_given_that_pass_over_what_decides(name):
    content, what, parts, never = ADVICE[name]
    error = said_of(content)
    assert what in error.what
    assert all(part in error.fix for part in parts), error.fix
    assert never not in error.fix
    assert len(error.expected) < 200


LINES = {
    "a verdict": {"q": "hello", "answer_1": "hi", "answer_2": "go", "human_verdict": "a"},
    "points": {"q": "hello", "texts": ["go", "hi"], "points": [1, 2]},
    "names": {"user_query": "hello", "good_one": "hi", "bad_one": "go"},
}


@pytest.mark.parametrize("name", LINES)
def test_the_lines_that_are_given_make_the_pair(name):
    error = said_of(LINES[name])
    lines = [line.strip() for line in error.fix.partition("[data.columns]")[2].splitlines()]
    columns = {
        key: json.loads(text) for key, _, text in (line.partition(" = ") for line in lines) if key
    }
    data = Data(train=UNUSED, columns=columns)
    kind, rows = recognise(lambda: iter([Row("here", 1, LINES[name])]), data)
    (pair,) = to_pairs(next(rows), kind, data).pairs
    assert pair.pair_id == pairs_of(PLAIN)[1][0].pair_id


def test_a_file_of_fields_without_names_is_told_from_one_with_other_names():
    row = {
        "What is red?": "What is blue?",
        "A warm colour.": "A cold colour.",
        "No idea": "Nothing.",
    }
    error = said_of(row, "rows.csv")
    assert error.what == "the first line of the file does not name the columns"
    assert "prompt,chosen,rejected" in error.fix


@pytest.mark.parametrize(
    "row",
    [
        {"input": "hello", "generations": ["go", "hi"], "ratings": [1, 5]},
        {"instruction": "hello", "generations": ["go", "hi"], "rating": [1, 5]},
        {"prompt": "hello", "outputs": ["go", "hi"], "scores": [1, 5], "ranks": [2, 1]},
    ],
)
def test_lists_of_generations_with_ratings_are_ranked(row):
    name, (pair,) = pairs_of(row)
    assert (name, pair.pair_id) == ("ranked", pairs_of(PLAIN)[1][0].pair_id)


@pytest.mark.parametrize(
    "row",
    [
        {"responses": ["hi", "go"], "scores": [1, 2], "ranks": [1, 2]},
        {
            "answers": [
                {"answer": "hi", "score": 1, "rank": 1},
                {"answer": "go", "score": 2, "rank": 2},
            ]
        },
    ],
)
def test_scores_and_ranks_that_disagree_are_refused(row):
    with pytest.raises(RejectedRow) as rejected:
        pairs_of({"prompt": "hello", **row})
    assert rejected.value.reason == "marks_differ"


@pytest.mark.parametrize("column", ["images", "image", "video", "audio"])
def test_a_row_with_pictures_is_refused_and_not_read_as_if_it_had_none(column):
    with pytest.raises(RejectedRow) as rejected:
        pairs_of(PLAIN | {column: ["cat.png"]})
    assert rejected.value.reason == "not_text" and column in rejected.value.detail
    assert pairs_of(PLAIN | {column: []})[1] == pairs_of(PLAIN | {column: None})[1] != []


def labelled(prompt, completion, label, **more):
    return {**prompt, "completion": completion, "label": label, **more}


def test_labelled_completions_pair_up_whatever_their_prompt_is_called():
    data = Data(train=UNUSED)
    contents = [
        labelled({"instruction": "do", "input": "x"}, "hi", True),
        labelled({"instruction": "do", "input": "y"}, "go", False),
        labelled({"instruction": "do", "input": "x"}, "go", False),
    ]
    rows = [Row("here", number, content) for number, content in enumerate(contents, 1)]
    name, found = recognise(lambda: iter(rows), data)
    first, alone = found
    (pair,) = to_pairs(first, name, data).pairs
    assert (name, pair.prompt[0]["content"], pair.chosen["content"]) == (
        "unpaired",
        "do\n\nx",
        "hi",
    )
    assert alone.number == 2
    with pytest.raises(RejectedRow, match="unpaired"):
        to_pairs(alone, name, data)


# ------------------------------------------------------------------------------------ the files

COLUMNS_OF_TWO = {name: [text, text] for name, text in PLAIN.items()}
FILES = {
    "columns.json": json.dumps(COLUMNS_OF_TWO).encode(),
    "pandas.json": json.dumps(
        {name: dict(enumerate(texts)) for name, texts in COLUMNS_OF_TWO.items()}
    ).encode(),
    "bars.csv": b"prompt|chosen|rejected\nhello|hi|go\nhello|hi|go\n",
    "blanks.csv": b"prompt, chosen, rejected\nhello,hi,go\nhello,hi,go\n",
}


@pytest.mark.parametrize("name", FILES)
def test_columns_and_other_separators_are_read(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert [row.content for row in read_rows(Source(str(path)), "train", "data.train")] == [
        PLAIN,
        PLAIN,
    ]


def test_an_object_with_the_messages_of_one_row_is_one_row(tmp_path):
    row = {
        "chosen": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}],
        "rejected": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "go"}],
    }
    path = tmp_path / "row.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    (read,) = read_rows(Source(str(path)), "train", "data.train")
    assert read.content == row


LINE = json.dumps(PLAIN | {"chosen": "ça va"}, ensure_ascii=False) + "\n"
UNREADABLE = {
    "utf16.jsonl": (LINE.encode("utf-16"), "the file is in UTF-16", "iconv -f UTF-16"),
    "no-mark.jsonl": (LINE.encode("utf-16-le"), "the file is in UTF-16", "iconv -f UTF-16"),
    "excel.csv": ("prompt\tchosen\n".encode("utf-16"), "the file is in UTF-16", "iconv"),
    "windows.jsonl": (LINE.encode("cp1252"), "the line is not in UTF-8", "iconv -f WINDOWS-1252"),
    "twice.csv": (b"prompt,chosen,chosen\na,b,c\n", "names 'chosen' twice", "line"),
    "pretty.jsonl": (json.dumps([PLAIN], indent=1).encode(), "is this a .json file?", "line"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_says_what_it_is(tmp_path, name):
    content, what, fix = UNREADABLE[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TbpoError) as error:
        list(read_rows(Source(str(path)), "train", "data.train"))
    assert what in error.value.what and fix in error.value.fix
    assert f"{name}, line 1" in error.value.where


# -------------------------------------------------------------------------------- demonstrations


def demonstrations(tmp_path):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in preference_rows(9, seed=3)]
    return write_jsonl(tmp_path / "shown.jsonl", rows)


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_demonstrations_in_the_place_of_pairs_are_refused_before_they_are_tokenized(
    recipe_file, tmp_path, key
):
    train = demonstrations(tmp_path)
    with pytest.raises(TbpoError, match=f"the rows of {key} are demonstrations") as error:
        run_stage("prepare", recipe_file, tmp_path / "run", f"{key}={train}")
    assert "[sft] train" in error.value.fix and str(train) in error.value.where
    split = key.partition(".")[2]
    assert not (tmp_path / "run/prepare" / split / "pairs.arrow").exists()


def test_demonstrations_are_prepared_where_nothing_is_compared(recipe_file, tmp_path):
    train = demonstrations(tmp_path)
    sets = (f"data.train={train}", f"data.eval={train.with_name('more.jsonl')}")
    write_jsonl(train.with_name("more.jsonl"), [{"prompt": "cat", "completion": "dog"}])
    run_stage("prepare", recipe_file, tmp_path / "run", *sets, "align.loss.name=sft")
    manifest = json.loads((tmp_path / "run/prepare/manifest.json").read_text())
    assert sum(count["kept"].get("train", 0) for count in manifest["counts"]) == 9


def test_demonstrations_for_sft_alone_are_a_warning_and_align_stops_before_it_trains(
    tbpo, recipe_file, tmp_path
):
    sets = ["--set", f"data.train={demonstrations(tmp_path)}", "--set", "data.eval=none"]
    sets += ["--set", "data.eval_fraction=0.2", "--set", "sft={max_steps = 1}"]
    done = tbpo("prepare", recipe_file, *sets, "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    assert "are demonstrations" in done.stderr and "`tbpo align` cannot" in done.stderr
    done = tbpo("align", recipe_file, *sets, "--run-dir", "run")
    assert done.returncode == 2 and "the rows of data.train are demonstrations" in done.stderr
    assert not (tmp_path / "run/sft/metrics.jsonl").exists()
