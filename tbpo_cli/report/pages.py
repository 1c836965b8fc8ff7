"""Self-contained pages and charts. All values are escaped, and the page's security policy lets it
load nothing.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tbpo_cli import console
from tbpo_cli.report import charts
from tbpo_cli.runs.files import write_whole


def _readable(value: Any) -> Any:
    """A text of a page as it may be shown; what is HTML already, as a macro gives it, stays."""
    return console.plain(value) if type(value) is str else value


def write_page(path: Path, template: str, **values: Any) -> None:
    """Renders `templates/TEMPLATE` with the values, and with the measures and colours of charts, to
    a file.
    """
    loader = PackageLoader("tbpo_cli.report")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_readable,
    )
    environment.globals |= {name: value for name, value in vars(charts).items() if name.isupper()}
    environment.globals["counted"] = console.counted
    environment.filters["sha256"] = lambda text: base64.b64encode(
        hashlib.sha256(text.encode()).digest()
    ).decode()
    write_whole(path, environment.get_template(template).render(values))
