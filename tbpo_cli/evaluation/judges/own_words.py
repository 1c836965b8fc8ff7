"""What a judge says itself in a reply: not what it was still thinking, nor what it was asked."""

from __future__ import annotations

import re

# The marks around the thinking of models that write it into their replies.
THINKING = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
REPEATED = 12  # characters after a label that make it a quotation where the question has them, too
TAIL = 40  # characters at the end of a reply that are no verdict where the question has them, too


def without_thinking(text: str, marks: tuple[str, str]) -> str:
    """A completion without its thinking parts.

    A part without its opening mark began in the prompt; one without its closing mark was cut, and
    nothing follows it.

    Args:
        marks: that open and close a part; two empty texts leave every completion as it is.
    """
    opening, closing = marks
    if not opening or not closing or not (opening in text or closing in text):
        return text
    whole = f"{re.escape(opening)}.*?{re.escape(closing)}"
    text = re.sub(whole, "", text, flags=re.DOTALL)
    text = text.rpartition(closing)[2]
    return text.partition(opening)[0].strip()


def after_thinking(text: str) -> str:
    """A judge's reply without its thinking parts, of any of the marks in THINKING."""
    for marks in THINKING:
        text = without_thinking(text, marks)
    return text


def own_labels(pattern: re.Pattern[str], said: str, question: str) -> list[str]:
    """The labels in a reply that the judge does not quote from its question, in their order.

    A label is quoted where the text that follows it, or that leads to it from the label before,
    stands in the question with it.

    Args:
        pattern: of a label, with what it says as group 1.
    """
    asked = _squeezed(question)
    found = []
    end_before = None
    for label in pattern.finditer(said):
        following = _squeezed(said[label.start() : label.end() + 4 * REPEATED])
        following = following[: len(_squeezed(label[0])) + REPEATED]
        leading = "" if end_before is None else _squeezed(said[end_before : label.end()])
        has_following = len(following) == len(_squeezed(label[0])) + REPEATED
        is_quoted = (has_following and following in asked) or (leading != "" and leading in asked)
        if not is_quoted:
            found.append(label[1])
        end_before = label.start()
    return found


def ends_with_question(said: str, question: str) -> bool:
    """Whether the end of a reply is a text of its question."""
    tail = _squeezed(said).strip()[-TAIL:]
    return len(tail) == TAIL and tail in _squeezed(question)


def _squeezed(text: str) -> str:
    """A text in small letters, any white space being one space."""
    return re.sub(r"\s+", " ", text).lower()
