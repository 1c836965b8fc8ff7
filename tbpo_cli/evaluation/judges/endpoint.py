"""A client for servers that speak OpenAI's chat completions: concurrent, patient, with a cache on disk.

The waits of urllib3's Retry and of openai's client cannot be cut short, and both take a page that is no completion for
an answer; huggingface_hub's client sends the Hub's token to a server that has no key, and nothing while it is offline.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tbpo_cli import console
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.files import json_lines

KEY = "OPENAI_API_KEY"  # the environment variable with the server's key
ATTEMPTS, FEW_ATTEMPTS = 8, 4  # at a server that is busy, fails or is cut off; at what may be none
MAX_WAIT = 120.0  # seconds before another attempt, also where the server asks for more
BUSY = {408, 425, 429}
OF_THE_REQUEST = {400, 413, 422}  # for example longer than the model's context


@dataclass(frozen=True)
class Reply:
    """What the server answers to one request."""

    text: str
    finish_reason: str = ""
    logp: float | None = None  # of the tokens together, nats; None if the server does not tell
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: str = ""  # why it does not answer this request, if it does not


Failure = tuple[
    str, int, float | None
]  # why an attempt failed, how many are worth it, seconds to wait if told


class Endpoint:
    """A server, and what it has answered before. Its key is sent to its address, and never written or shown.

    Args:
        url: up to and including /v1, as a rule.
        concurrency: requests at a time.
        timeout: seconds without a byte after which an attempt is given up.
        cache: a file with a reply a line, which is added to; None: nothing is kept.
    """

    def __init__(
        self, url: str, concurrency: int, timeout: float, cache: Path | None = None
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        self.concurrency, self.timeout, self.cache = concurrency, timeout, cache
        self._key, self._lock = os.environ.get(KEY, "").strip(), threading.Lock()
        if not (self._key.isascii() and self._key.isprintable()):
            what = f"{KEY} has characters that are in no key"
            raise TbpoError(what, "the environment", "the key of the server", f"export {KEY}=KEY")
        self._known: dict[str, Reply] = {}
        for kept in (
            json_lines(cache, may_be_cut=True) if cache is not None and cache.exists() else ()
        ):
            with suppress(TypeError, LookupError):
                self._known[kept["key"]] = Reply(**kept["reply"])

    def ask(self, bodies: Sequence[dict[str, Any]]) -> Iterator[tuple[int, Reply]]:
        """Yields (place, reply) for the bodies of requests, as they come; what was answered before is not asked again.

        Raises TbpoError if there is no such server or model, it refuses the key, or still fails after some attempts.
        """
        places: dict[str, list[int]] = {}
        for place, body in enumerate(bodies):
            text = json.dumps([self.url, body], sort_keys=True)
            places.setdefault(hashlib.sha256(text.encode()).hexdigest(), []).append(place)
        stop, pool = threading.Event(), ThreadPoolExecutor(self.concurrency)
        try:
            asked = {
                pool.submit(self._ask, key, bodies[same[0]], stop): same
                for key, same in places.items()
            }
            for future in as_completed(asked):
                yield from ((place, future.result()) for place in asked[future])
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _ask(self, key: str, body: dict[str, Any], stop: threading.Event) -> Reply:
        """One reply, from the cache, or after as many attempts as it takes."""
        if key in self._known:
            return self._known[key]
        attempt = 1
        while not isinstance(reply := self._attempt(body), Reply):
            reason, limit, told = reply
            wait = min(MAX_WAIT, told or 2.0 ** (attempt - 2))
            if wait > 1 and attempt < limit:
                console.say(f"{self.url}: {reason}; trying again in {wait:.0f} s")
            if attempt >= limit or stop.wait(wait * random.uniform(1, 1.25)):
                expected = "an OpenAI-compatible server; its address usually ends in /v1"
                fix = "start it, change the endpoint, or ask less at a time; the same command goes on from there"
                raise TbpoError(
                    f"no chat completion after {attempt} attempts: {reason}",
                    self.url,
                    expected,
                    fix,
                )
            attempt += 1
        if self.cache is not None and not reply.refused:
            with (
                self._lock,
                self.cache.open("ab") as file,
            ):  # a line break first: the last line may have been cut short
                file.write(b"\n" + json.dumps({"key": key, "reply": asdict(reply)}).encode())
            self._known[key] = reply
        return reply

    def _attempt(self, body: dict[str, Any]) -> Reply | Failure:
        try:
            status, headers, text = self._post(json.dumps(body).encode())
        except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
            cause = getattr(error, "reason", error)
            is_nobody = isinstance(cause, ConnectionRefusedError | socket.gaierror | ssl.SSLError)
            return f"{type(cause).__name__}: {cause}", FEW_ATTEMPTS if is_nobody else ATTEMPTS, None
        said = f"{status} {' '.join(text.split())[:300]}"
        if status in BUSY or status >= 500:
            return said, ATTEMPTS, retry_after(headers.get("Retry-After", ""))
        if status in OF_THE_REQUEST:
            return Reply("", refused=f"the server refuses the request: {said}")
        if status in (401, 403):
            has = (
                f"the key in {KEY} is not accepted"
                if self._key
                else f"a key is wanted, and {KEY} is not set"
            )
            raise TbpoError(f"{has}: {said}", self.url, "a key of this server", f"export {KEY}=KEY")
        if status != 200:
            expected = f"a server of the model {body['model']!r}; its address usually ends in /v1"
            raise TbpoError(
                f"the server answers {said}", self.url, expected, "change the model or the endpoint"
            )
        try:
            answer = json.loads(text)
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            logprobs = (choice.get("logprobs") or {}).get("content")
            return Reply(
                str(choice["message"].get("content") or ""),
                str(choice.get("finish_reason") or ""),
                sum(float(token["logprob"]) for token in logprobs) if logprobs else None,
                int(usage.get("prompt_tokens") or 0),
                int(usage.get("completion_tokens") or 0),
            )
        except (ValueError, TypeError, LookupError, AttributeError):
            return f"the answer is none: {said}", FEW_ATTEMPTS, None

    def _post(self, data: bytes) -> tuple[int, Message, str]:
        """Status, headers and text of the answer; the text without the key, whatever the server repeats."""
        request = Request(
            f"{self.url}/chat/completions", data, {"Content-Type": "application/json"}
        )
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            answer = urlopen(request, timeout=self.timeout)
        except HTTPError as error:
            answer = error
        with answer:
            text = answer.read().decode("utf-8", "replace")
        return answer.status, answer.headers, text.replace(self._key, "•••") if self._key else text


def retry_after(said: str) -> float | None:
    """Seconds until a server wants to be asked again, from its Retry-After: a number of them, or a date."""
    with suppress(TypeError, ValueError):
        return (
            float(said)
            if said.isdigit()
            else max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
        )
    return None
