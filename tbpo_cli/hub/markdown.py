"""Text of any origin in a Markdown page: it is shown as it is, and never becomes markup."""

from __future__ import annotations

import html
import re
from typing import Any

from markupsafe import Markup

from tbpo_cli.console import plain

# An underscore within a word, as in tbpo_a, begins no emphasis.
MARKS = re.compile(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])")
# Lists, rules and underlines of headings, where a line begins; an address that becomes a link.
LINE_BEGIN = re.compile(r"^(\d*)(?=[-+=.)](?:[-=\s]|$))")
ADDRESS = re.compile(r"(?i):(?=//)|(?<=www)\.")


def escaped(value: Any) -> Markup:
    """A value as one line of a paragraph, a list or a cell of a table; markup stays as it is."""
    if isinstance(value, Markup):
        return value
    text = MARKS.sub(r"\\\g<0>", _one_line(value))
    text = LINE_BEGIN.sub(r"\1\\", text, count=1)
    return Markup(ADDRESS.sub(lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False)))


def code(value: Any) -> Markup:
    """A value as code in a line; by character references, if backticks do not serve."""
    text = _one_line(value)
    if text and not re.search(r"[`|\\]", text):
        return Markup(f"`{text}`")
    shown = re.sub(r"[^\w\s.,:/-]|_", lambda found: f"&#{ord(found[0])};", text)
    return Markup(f"<code>{shown}</code>")


def _one_line(value: Any) -> str:
    return " ".join(plain(str(value)).split())


def unescaped(text: str) -> str:
    """What a reader of the Markdown sees, where `escaped` or `code` changed it."""
    return html.unescape(re.sub(r"\\([^\w\s]|_)", r"\1", text))
