"""Rows in the shapes that people have them in: the same comparison is the same pair."""

import json

import pytest
from conftest import preference_rows, run_stage, write_jsonl
from datasets import Dataset

from tbpo_cli.config.recipe import Choose, Data, Source
from tbpo_cli.data.choosing import Chooser
from tbpo_cli.data.formats import format_faults, recognise, to_pairs
from tbpo_cli.data.pairs import RejectedRow
from tbpo_cli.data.sources import Row, read_rows
from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import TbpoError

UNUSED = (Source("unused"),)
SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "hello"}
HI, GO = ({"role": "assistant", "content": text} for text in ("hi", "go"))
PLAIN = {"prompt": "hello", "chosen": "hi", "rejected": "go"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def said(who, text):
    return {"from": who, "value": text}


def pairs_of(*contents, for_sft=False, choose=None, **data):
    """All pairs of some rows, by whatever format they are of; a rejected row is its reason."""
    settings = Data(train=UNUSED, **data)
    rows = [Row("here", number, content) for number, content in enumerate(contents, 1)]
    name, found = recognise(lambda: iter(rows), settings, for_sft)
    made = []
    for row in found:
        try:
            made += to_pairs(row, name, settings, Chooser(choose or Choose())).pairs
        except RejectedRow as reason:
            made.append(reason.reason)
    return name, made


# Rows that all mean PLAIN: their format, and the row.
SAME = {
    "a question": ("prompt", {"question": "hello", "chosen": "hi", "rejected": "go"}),
    "an instruction with an empty input": (
        "prompt",
        {"instruction": "hello", "input": "", "chosen": "hi", "rejected": "go"},
    ),
    "ShareGPT": (
        "sharegpt",
        {
            "conversations": [said("human", "hello")],
            "chosen": said("gpt", "hi"),
            "rejected": said("gpt", "go"),
        },
    ),
    "whole ShareGPT conversations": (
        "messages",
        {
            "chosen": [said("human", "hello"), said("gpt", "hi")],
            "rejected": [said("human", "hello"), said("gpt", "go")],
        },
    ),
    "one message a side": ("messages", {"prompt": "hello", "chosen": HI, "rejected": GO}),
    "text in parts": (
        "messages",
        {
            "prompt": "hello",
            "chosen": [HI | {"content": [{"type": "text", "text": "hi"}]}],
            "rejected": [GO | {"content": [{"type": "text", "text": "g"}, {"text": "o"}]}],
        },
    ),
    "OpenAI": (
        "openai",
        {"input": {"messages": [USER]}, "preferred_output": [HI], "non_preferred_output": [GO]},
    ),
    "scores": (
        "ranked",
        {"prompt": "hello", "responses": ["go", "hm", "hi"], "scores": [1, 2.5, 4]},
    ),
    "ranks": ("ranked", {"prompt": "hello", "answers": ["hm", "hi", "go"], "ranks": [2, 1, 3]}),
    "UltraFeedback": (
        "ranked",
        {
            "instruction": "hello",
            "completions": [
                {"response": "go", "overall_score": 3.0},
                {"response": "hi", "overall_score": 9.0},
            ],
        },
    ),
    "Nectar": (
        "ranked",
        {
            "prompt": "\n\nHuman: hello\n\nAssistant: ",
            "answers": [{"answer": "hi", "rank": 1.0}, {"answer": "go", "rank": 2.0}],
        },
    ),
    "a winner": (
        "winner",
        {"prompt": "hello", "response_a": "go", "response_b": "hi", "winner": "B"},
    ),
    "an arena": (
        "winner",
        {"conversation_a": [USER, HI], "conversation_b": [USER, GO], "winner": "model_a"},
    ),
    "the number of the better": (
        "winner",
        {"prompt": "hello", "response_0": "go", "response_1": "hi", "better_response_id": 1},
    ),
    "StackExchange": (
        "stack_exchange",
        {"question": "hello", "response_j": "hi", "response_k": "go"},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_comparison_is_the_same_pair_in_every_shape(name):
    _, (plain,) = pairs_of(PLAIN)
    format_name, row = SAME[name]
    found, (pair,) = pairs_of(row)
    assert (found, pair.pair_id) == (format_name, plain.pair_id)
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), HI, GO)


SYSTEM_ROWS = [
    PLAIN,
    {"question": "hello", "chosen": "hi", "rejected": "go"},  # Orca's
    {"chosen": [USER, HI], "rejected": [USER, GO]},
    {"chosen": [SYSTEM, USER, HI], "rejected": [SYSTEM, USER, GO]},
    {"prompt": [USER], "chosen": [HI], "rejected": [GO]},
    {
        "chosen": "\n\nHuman: hello\n\nAssistant: hi",
        "rejected": "\n\nHuman: hello\n\nAssistant: go",
    },
    SAME["ShareGPT"][1],
    SAME["scores"][1],
    SAME["an arena"][1],
]


@pytest.mark.parametrize("row", SYSTEM_ROWS)
def test_a_system_column_comes_first_in_every_format(row):
    _, (pair,) = pairs_of({"system": "be brief", **row})
    assert pair.prompt == (SYSTEM, USER)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, HI]},
        {"conversations": [said("human", "hello"), said("gpt", "hi")]},
        {"instruction": "hello", "output": "hi"},
    ],
)
def test_a_system_column_comes_first_in_demonstrations(row):
    _, (pair,) = pairs_of({"system": "be brief", **row})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((SYSTEM, USER), HI, None)


def test_two_different_system_messages_are_refused():
    row = {"chosen": [SYSTEM, USER, HI], "rejected": [SYSTEM, USER, GO]}
    assert pairs_of({"system": "be long", **row})[1] == ["roles"]


def test_a_prompt_column_beside_whole_conversations_must_agree_with_them():
    sides = {"chosen": [USER, HI], "rejected": [USER, GO]}
    assert pairs_of({"prompt": [SYSTEM], **sides})[1][0].prompt == (SYSTEM, USER)
    assert pairs_of({"prompt": [SYSTEM, USER], **sides})[1][0].prompt == (SYSTEM, USER)
    assert pairs_of({"prompt": "hello", **sides})[1][0].prompt == (USER,)
    assert pairs_of({"prompt": "a wholly different prompt", **sides})[1] == ["prompts_differ"]


def test_simpos_rows_are_their_pair_or_chosen_again_from_all_their_answers():
    row = {
        "prompt": "hello",
        "all_generated_responses": ["hm", "go", "hi"],
        "all_rm_scores": [0.12, 0.1, 0.17],
        "chosen": [USER, HI],
        "rejected": [USER, GO],
    }
    name, (pair,) = pairs_of(row)
    assert (name, pair.chosen, pair.rejected) == ("messages", HI, GO)
    again, pairs = pairs_of(row, format="ranked", choose=Choose(pairs="best_each"))
    texts = [one.chosen["content"] + one.rejected["content"] for one in pairs]
    assert (again, texts) == ("ranked", ["hihm", "higo"])
    assert pairs[1].pair_id == pair.pair_id and pairs[0].score_margin == pytest.approx(0.05)


RANKED = {"prompt": "hello", "responses": ["b", "d", "a", "c"], "scores": [3, 1, 4, 3]}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("best_worst", ["ad"]),
        ("best_each", ["ab", "ac", "ad"]),
        ("all", ["ab", "ac", "ad", "bd", "cd"]),
    ],
)
def test_lists_become_pairs_as_the_recipe_says_and_ties_do_not(how, expected):
    _, pairs = pairs_of(RANKED, choose=Choose(pairs=how))
    assert [pair.chosen["content"] + pair.rejected["content"] for pair in pairs] == expected
    scores = dict(zip(RANKED["responses"], RANKED["scores"], strict=True))
    assert [pair.score_margin for pair in pairs] == [scores[a] - scores[b] for a, b in expected]


@pytest.mark.parametrize(
    ("name", "margin"), [("scores", 3.0), ("ranks", 2.0), ("UltraFeedback", 6.0), ("Nectar", 1.0)]
)
def test_the_margin_of_a_pair_is_the_difference_of_its_scores_or_ranks(name, margin):
    _, (pair,) = pairs_of(SAME[name][1])
    assert (pair.chosen, pair.score_margin) == (HI, margin)


def test_an_answer_of_a_list_may_be_a_message_that_calls_a_tool():
    answers = [HI | {"content": None, "tool_calls": [CALL]}, GO]
    _, (pair,) = pairs_of({"prompt": "hello", "responses": answers, "scores": [2, 1]})
    assert pair.chosen == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def calling(function):
    """A message that calls a tool."""
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


def test_a_cut_answer_is_rejected_as_cut_and_never_chosen():
    row = RANKED | {"truncated": [False, True, True, False]}
    _, pairs = pairs_of(row)
    made = [(pair.chosen["content"], pair.rejected) for pair in pairs]
    assert made == [("b", {"role": "assistant", "content": "d", "is_cut": True})]
    _, (whole,) = pairs_of(RANKED)
    assert "is_cut" not in whole.rejected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (RANKED | {"scores": [2, 2, 2, 2]}, "no_preference"),
        (RANKED | {"scores": [2, 2, 2]}, "wrong_type"),
        (RANKED | {"scores": [2, 2, None, 2]}, "no_preference"),
        (RANKED | {"scores": [2, None, float("nan"), float("inf")]}, "no_mark"),
        (RANKED | {"scores": [2, 1, "good", 2]}, "wrong_type"),
        (RANKED | {"responses": ["a", "a", "a", "a"]}, "identical"),
        (RANKED | {"truncated": [True] * 4}, "all_cut"),
        (RANKED | {"truncated": [True]}, "wrong_type"),
        ({"prompt": "p", "response_a": "a", "response_b": "b", "winner": "tie"}, "no_preference"),
        (
            {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "tie (bothbad)"},
            "no_preference",
        ),
        ({"prompt": "p", "response_a": "a", "response_b": "b", "winner": "C"}, "wrong_type"),
        (
            {
                "prompt": "p",
                "chosen": [HI | {"content": [{"type": "image_url"}]}],
                "rejected": [GO],
            },
            "wrong_type",
        ),
        ({"input": {}, "preferred_output": [HI], "non_preferred_output": [GO]}, "missing_column"),
        ({"prompt": "p", "chosen": [calling({"arguments": {}})], "rejected": [GO]}, "wrong_type"),
        ({"prompt": "p", "chosen": [calling({"name": 3})], "rejected": [GO]}, "wrong_type"),
        ({"prompt": "p", "chosen": [calling("add")], "rejected": [GO]}, "wrong_type"),
        ({"prompt": "p", "chosen": [said("function_call", "add")], "rejected": [GO]}, "wrong_type"),
        ({"prompt": "p", "chosen": [HI | {"content": None}], "rejected": [GO]}, "wrong_type"),
        (
            {"prompt": "p", "chosen": [HI | {"content": [{"text": 3}]}], "rejected": [GO]},
            "wrong_type",
        ),
        (
            {"prompt": "p", "chosen": [HI | {"reasoning_content": 3}], "rejected": [GO]},
            "wrong_type",
        ),
        (RANKED | {"responses": [USER, HI, GO, HI]}, "roles"),
        (RANKED | {"responses": [said("human", "b"), HI, GO, HI]}, "roles"),
    ],
)
def test_rows_that_say_no_preference_have_a_reason(row, reason):
    assert pairs_of(row)[1] == [reason]


def unpaired(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


def test_labelled_completions_of_one_prompt_make_pairs_and_the_others_are_refused():
    rows = [
        unpaired("hello", "go", False),
        unpaired("other", "x", True),
        unpaired("hello", "hi", True),
        unpaired("hello", "ho", True),
        unpaired("third", "y", False),
    ]
    name, made = pairs_of(*rows)
    assert name == "unpaired" and made[0].pair_id == pairs_of(PLAIN)[1][0].pair_id
    assert made[1:] == ["unpaired"] * 3


@pytest.mark.parametrize("labels", [(1, 0), ("true", "False"), (1.0, 0.0), (True, False)])
def test_labels_are_read_as_people_write_them(labels):
    _, made = pairs_of(unpaired("hello", "hi", labels[0]), unpaired("hello", "go", labels[1]))
    assert [pair.pair_id for pair in made] == [pairs_of(PLAIN)[1][0].pair_id]


def test_a_completion_that_is_labelled_bad_is_never_fine_tuned_on():
    rows = [unpaired("hello", "hi", True), unpaired("hello", "go", False)]
    name, (good, bad) = pairs_of(*rows, for_sft=True)
    assert (name, good.chosen, good.rejected, bad) == ("sft_prompt", HI, None, "unwanted")


def test_alpaca_rows_are_demonstrations_with_input_and_history():
    row = {"instruction": "Translate.", "input": "hello", "output": "hi"}
    row |= {"history": [["one", "two"]], "system": "be brief"}
    name, (pair,) = pairs_of(row)
    contents = [(message["role"], message["content"]) for message in pair.prompt]
    assert (name, pair.chosen) == ("sft_alpaca", HI)
    assert contents == [
        ("system", "be brief"),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "Translate.\n\nhello"),
    ]
    for without in ({"system": None}, {"system": None, "history": None}):
        _, (pair,) = pairs_of(row | without)
        expected = contents[-1:] if "history" in without else contents[1:]
        assert [(message["role"], message["content"]) for message in pair.prompt] == expected


def test_calls_of_tools_have_one_form():
    """OpenAI's JSON text, its old function_call, ShareGPT's function_call, an empty list."""
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    text = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    for message in (
        {"role": "assistant", "content": None, "tool_calls": text},
        {"role": "assistant", "content": None, "function_call": text[0]["function"]},
        said("function_call", '{"name": "add", "arguments": {"a": 1}}'),
        call | {"name": None},
    ):
        _, (pair,) = pairs_of({"prompt": [USER], "chosen": [message], "rejected": [GO]})
        assert pair.chosen == call
    _, (pair,) = pairs_of(
        {"prompt": "hello", "chosen": [HI | {"tool_calls": []}], "rejected": [GO]}
    )
    assert pair.chosen == HI


@pytest.mark.parametrize(
    ("arguments", "kept"), [('{"a": 1}', {"a": 1}), ("", {}), (None, {}), ({}, {})]
)
def test_a_call_keeps_its_id_and_its_arguments_become_an_object_of_json(arguments, kept):
    call = {"id": "call-1", "index": 0, "function": {"name": "add", "arguments": arguments}}
    message = HI | {"tool_calls": [call, {"id": None, "function": {"name": "add"}}]}
    _, (pair,) = pairs_of({"prompt": "hello", "chosen": [message], "rejected": [GO]})
    one, other = pair.chosen["tool_calls"]
    function = {"name": "add", "arguments": kept}
    assert one == {"id": "call-1", "index": 0, "type": "function", "function": function}
    assert other == {"type": "function", "function": {"name": "add", "arguments": {}}}


@pytest.mark.parametrize("arguments", ["[1]", "a = 1", '{"a": 1', [1], 3])
def test_a_call_whose_arguments_are_no_object_of_json_is_refused(arguments):
    call = {"function": {"name": "add", "arguments": arguments}}
    row = {"prompt": "hello", "chosen": [HI | {"tool_calls": [call]}], "rejected": [GO]}
    _, (reason,) = pairs_of(row)
    assert reason == "wrong_type"


def test_nulls_within_arguments_are_kept_from_json_and_left_out_of_columnar_files(tmp_path):
    """A columnar file gives each table the keys of all others, with nulls."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    rows = [{"prompt": "hello", "chosen": [HI | {"tool_calls": [call]}], "rejected": [GO]}]
    found = {}
    path = tmp_path / "rows.parquet"
    Dataset.from_list(rows).to_parquet(path)
    for file in (path, write_jsonl(tmp_path / "rows.jsonl", rows)):
        (row,) = read_rows(Source(str(file)), "train", "data.train")
        (pair,) = to_pairs(row, "messages", Data(train=UNUSED)).pairs
        found[file.suffix] = pair.chosen["tool_calls"][0]["function"]["arguments"]
    assert found == {".parquet": {"a": 1}, ".jsonl": {"a": 1, "b": None}}


FILES = {
    "list.json": json.dumps([PLAIN, PLAIN]).encode(),
    "data.json": json.dumps({"version": 1, "data": [PLAIN, PLAIN]}, indent=1).encode(),
    "lines.json": f"{json.dumps(PLAIN)}\n{json.dumps(PLAIN)}\n".encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + f"{json.dumps(PLAIN)}\n{json.dumps(PLAIN)}\n".encode(),
    "semicolon.csv": b'prompt;chosen;rejected\n"hello";hi;go\nhello;hi;go\n',
    "tab.csv": b"prompt\tchosen\trejected\nhello\thi\tgo\nhello\thi\tgo\n",
    "rows.tsv": b"prompt\tchosen\trejected\nhello\thi\tgo\nhello\thi\tgo\n",
    "bom.csv": b"\xef\xbb\xbfprompt,chosen,rejected\nhello,hi,go\nhello,hi,go\n",
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_people_have_them(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    rows = list(read_rows(Source(str(path)), "train", "data.train"))
    assert [row.content for row in rows] == [PLAIN, PLAIN]
    expected = [2, 3] if path.suffix in (".csv", ".tsv") else [1, 2]
    assert [row.number for row in rows] == expected


# ---------------------------------------------- what is said of what is not understood


def test_unknown_rows_are_shown_with_the_lines_that_would_name_their_columns():
    row = {"id": 7, "user_query": "hello", "good_one": "hi", "bad_one": "go", "meta": {"a": 1}}
    with pytest.raises(TbpoError, match="none of the known formats") as error:
        pairs_of(row)
    for part in ("id (7)", "user_query ('hello')", "meta (a table of a)"):
        assert part in error.value.where
    lines = (
        "[data.columns]",
        'prompt = "user_query"',
        'chosen = "good_one"',
        'rejected = "bad_one"',
    )
    assert all(line in error.value.fix for line in lines)
    columns = {"prompt": "user_query", "chosen": "good_one", "rejected": "bad_one"}
    assert pairs_of(row, columns=columns)[1][0].chosen == HI
    assert "docs/data.md" in error.value.expected


@pytest.mark.parametrize(
    ("row", "guess"),
    [
        (
            {"bad_one": "go", "output": "x", "good_one": "hi", "user_query": "hello"},
            {"prompt": "user_query", "chosen": "good_one", "rejected": "bad_one"},
        ),
        (
            {"reply_text": "hi", "user_query": "hello"},
            {"prompt": "user_query", "completion": "reply_text"},
        ),
        ({"first": "hello", "second": "hi"}, {"prompt": "first", "completion": "second"}),
        (
            {"first": "hello", "second": "hi", "third": "go"},
            {"prompt": "first", "chosen": "second", "rejected": "third"},
        ),
    ],
)
def test_columns_are_guessed_by_their_names_and_then_in_order(row, guess):
    with pytest.raises(TbpoError, match="none of the known formats") as error:
        pairs_of(row)
    lines = [f'{ours} = "{theirs}"' for ours, theirs in guess.items()]
    assert error.value.fix.split("[data.columns]")[1].split("\n    ")[1:] == lines


@pytest.mark.parametrize(
    ("columns", "fix"),
    [
        ({"chosn": "better"}, 'chosen = "better"'),
        ({"question_text": "prompt"}, 'prompt = "question_text"'),
        ({"xyzzy": "other"}, "take the line out"),
    ],
)
def test_a_key_of_columns_that_is_none_of_ours_is_a_fault_of_the_recipe(columns, fix):
    (fault,) = format_faults(Data(train=UNUSED, columns=columns), "my.toml")
    assert next(iter(columns)) in fault.what and "my.toml" in fault.where and fix in fault.fix
    assert not format_faults(Data(train=UNUSED, columns={"prompt": "x", "scores": "y"}), "")


@pytest.mark.parametrize(
    ("columns", "fix"),
    [
        ('{chosen = "chosen_claen"}', 'chosen = "chosen_clean"'),
        ('{prompt = "zzz"}', "name a column"),
    ],
)
def test_a_column_that_no_row_has_is_an_error(recipe_file, tmp_path, columns, fix):
    rows = [row | {"chosen_clean": "x"} for row in preference_rows(4, seed=5)]
    train = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(TbpoError, match="names a column that no row has") as error:
        run_stage(
            "prepare",
            recipe_file,
            tmp_path / "run",
            f"data.train={train}",
            f"data.columns={columns}",
        )
    assert fix in error.value.fix


@pytest.mark.parametrize(
    ("columns", "ours", "fix"),
    [
        ('{question = "prompt"}', "question", 'prompt = "prompt"'),  # `prompt` is read first
        ('{completion = "chosen", rejected = "rejected"}', "completion", "take the line out"),
        ('{rank = "chosen"}', "rank", "take the line out"),
    ],
)
def test_a_key_of_columns_that_the_rows_format_does_not_read_is_an_error(
    recipe_file, tmp_path, columns, ours, fix
):
    with pytest.raises(TbpoError) as error:
        run_stage("prepare", recipe_file, tmp_path / "run", f"data.columns={columns}")
    assert f"data.columns.{ours} is not read" in error.value.what
    assert fix in error.value.fix


@pytest.mark.parametrize(
    "row",
    [
        {"q": "cat", "model_a": "x", "response_a": "one", "response_b": "two", "best": "a"},
        {"q": "cat", "responses": ["one", "two"], "marks": [1, 2]},
    ],
)
def test_columns_that_a_format_reads_under_other_names_are_no_error(recipe_file, tmp_path, row):
    theirs = {"prompt": "q", "winner": "best", "scores": "marks"}
    columns = ", ".join(f'{ours} = "{name}"' for ours, name in theirs.items() if name in row)
    train = write_jsonl(tmp_path / "rows.jsonl", [{**row, "q": f"cat {n}"} for n in range(4)])
    sets = (f"data.train={train}", f"data.columns={{{columns}}}")
    run = run_stage("prepare", recipe_file, tmp_path / "run", *sets)
    assert len(PairStore(run / "prepare/train")) == 4


def test_a_column_that_only_some_sources_have_is_read_where_it_is(recipe_file, tmp_path):
    rows = [
        {"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in preference_rows(4, seed=5)
    ]
    train = write_jsonl(tmp_path / "rows.jsonl", rows)
    sets = (f"data.train={train}", 'data.columns={prompt = "question"}')  # data.eval has prompt
    run = run_stage("prepare", recipe_file, tmp_path / "run", *sets)
    assert [len(PairStore(run / "prepare" / split)) for split in ("train", "eval")] == [4, 8]


@pytest.mark.parametrize(
    ("contents", "what", "where"),
    [
        ([], "data.train has no rows", "rows.jsonl"),
        (
            [{"prompt": f"{n}", "chosen": n, "rejected": n + 1} for n in range(5)],
            "the column chosen holds numbers, not text",
            "row 1; its columns: prompt ('0'), chosen (0), rejected (1)",
        ),
        (
            [unpaired(f"p{n}", "x", True) for n in range(5)],
            "5 of 5 rows of data.train cannot be used, 5 unpaired",
            "no further completion that is labelled bad",
        ),
    ],
)
def test_rows_that_give_no_pair_have_a_message_each(recipe_file, tmp_path, contents, what, where):
    train = write_jsonl(tmp_path / "rows.jsonl", contents)
    with pytest.raises(TbpoError) as error:
        run_stage(
            "prepare", recipe_file, tmp_path / "run", f"data.train={train}", 'data.format="auto"'
        )
    assert what in error.value.what and where in error.value.where


def test_the_same_rows_to_train_and_to_measure_on_are_an_error(recipe_file, tmp_path):
    train = write_jsonl(tmp_path / "rows.jsonl", preference_rows(8, seed=5))
    sets = (f"data.train={train}", f"data.eval={train}")
    with pytest.raises(TbpoError, match=r"data\.train and data\.eval name the same rows"):
        run_stage("prepare", recipe_file, tmp_path / "run", *sets)


def test_many_duplicates_do_not_stop_the_stage(recipe_file, tmp_path):
    train = write_jsonl(tmp_path / "rows.jsonl", preference_rows(3, seed=5) * 10)
    run = run_stage("prepare", recipe_file, tmp_path / "run", f"data.train={train}")
    counts = json.loads((run / "prepare/manifest.json").read_text())["counts"][-1]
    assert (counts["kept"], counts["rejected"]) == ({"train": 3}, {})
    assert counts["noted"]["duplicate"] == 27
    assert (run / "prepare/rejects.jsonl").read_text() == ""
