"""Requests to the Hub, which are repeated while it is busy or the connection breaks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import huggingface_hub as hf
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from tbpo_cli import console
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.endpoint import retry_after

WAITS = (1, 2, 4, 8, 16)  # seconds before each further attempt, or as long as the Hub says
MAX_WAIT = 300.0  # seconds, also where the Hub asks for more
PASSING = {408, 429, 500, 502, 503, 504}
TOKEN = (
    "HF_TOKEN",
    "a token that may write to the repository",
    "hf auth login, or export HF_TOKEN=… of such a token",
)
Ask = TypeVar("Ask", bound=Callable[..., Any])


def with_retries(ask: Ask) -> Ask:
    """Repeats a function that asks the Hub about a repository (its first argument) while the Hub
    is busy or the connection breaks.

    The client's own `http_backoff` covers reads and uploads of parts, but not commits, tokens and
    new repositories. The answer to a request may be lost, so a request may be made twice.

    Raises:
        TbpoError: if the Hub refuses, or does not answer after all attempts.
    """

    @functools.wraps(ask)
    def insist(repo: str, *arguments: Any) -> Any:
        for planned in (*WAITS, None):
            try:
                return ask(repo, *arguments)
            except Exception as error:
                what, asked_wait = _passing_fault(error, repo)
                if planned is None:
                    raise TbpoError(
                        what, repo, "a Hub that answers", "the same command goes on from there"
                    ) from error
            wait = min(MAX_WAIT, max(planned, asked_wait))
            console.say(f"{what}; again in {wait:g} s")
            time.sleep(wait)

    return cast(Ask, insist)


def _passing_fault(error: Exception, repo: str) -> tuple[str, float]:
    """The fault, if it is one that passes, and the seconds that the Hub asks to wait.

    Raises:
        TbpoError: for a refusal of the Hub.
        Exception: the error itself, if it is none of the Hub's.
    """
    # For a large file the client raises a RuntimeError, whose cause is the fault.
    fault = error.__cause__ or error if type(error) is RuntimeError else error
    response = getattr(fault, "response", None)
    status = getattr(response, "status_code", None)
    # By name: the client brings httpx, or a later major version of it.
    is_cut = any(kind.__name__ == "TransportError" for kind in type(fault).__mro__)
    if is_cut:
        return f"the connection is cut ({type(fault).__name__})", 0.0
    if response is not None and status in PASSING:
        return (
            f"the Hub answers {status}",
            retry_after(response.headers.get("Retry-After", "")) or 0.0,
        )
    if not isinstance(fault, HfHubHTTPError | ValueError | ConnectionError):
        raise error
    if isinstance(fault, OfflineModeIsEnabled):
        fix = "unset HF_HUB_OFFLINE where the Hub can be reached"
        raise TbpoError("the Hub is not asked", repo, "a Hub that answers", fix) from error
    expected = "a request that the Hub accepts"
    fix = "correct what it names, and push again"
    if status in (401, 403):
        expected, fix = TOKEN[1:]
    what = f"the Hub refuses: {' '.join(str(fault).split())}"
    raise TbpoError(what, repo, expected, fix) from error


@with_retries
def look_up(repo: str, revision: str | None = None) -> tuple[str, dict[str, RepoFile]]:
    """The commit that a revision is, by default the newest one, and its files by their paths."""
    api = hf.HfApi()
    commit = api.model_info(repo, revision=revision).sha or ""
    entries = api.list_repo_tree(repo, recursive=True, revision=commit)
    return commit, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
