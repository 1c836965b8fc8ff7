"""Rows of a source: all of them, in their order, however many and however long."""

import pytest

from tbpo_cli.config.recipe import Data, Source
from tbpo_cli.data.formats import recognise, to_pairs
from tbpo_cli.data.pairs import RejectedRow
from tbpo_cli.data.sources import ROWS_AT_A_TIME, Row, read_rows

QUESTION = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hi"}
OTHER = {"role": "assistant", "content": "go away"}


@pytest.mark.parametrize("name", ["auto", "prompt"])
def test_rows_are_looked_at_for_their_format_and_stay_in_their_order(name):
    content = {"prompt": "hello", "chosen": "hi", "rejected": "go"}
    rows = [Row("here", number, content) for number in range(1, ROWS_AT_A_TIME + 3)]
    data = Data(train=(Source("here"),), format=name)
    found, again = recognise(lambda: iter(rows), data)
    assert found == "prompt"
    assert [row.number for row in again] == [row.number for row in rows]


def test_a_field_of_a_csv_file_may_be_long(tmp_path):
    """Python's reader stops at 131,072 characters of its own accord."""
    text = "word " * 30_000
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,chosen,rejected\nhello,{text},go\n", encoding="utf-8")
    (row,) = read_rows(Source(str(path)), "train", "data.train")
    assert row.content == {"prompt": "hello", "chosen": text, "rejected": "go"}


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_conversation_that_goes_on_after_the_compared_message_is_refused(longer):
    row = {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]}
    row[longer] = [*row[longer], QUESTION]
    with pytest.raises(RejectedRow) as error:
        to_pairs(Row("here", 1, row), "messages", Data(train=(Source("here"),)))
    assert error.value.reason == "extra_messages"
