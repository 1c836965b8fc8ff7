"""A client for servers that speak OpenAI's chat completions: concurrent, patient, with a cache on
disk.

httpx sends the requests. What stays ours, since neither openai's nor huggingface_hub's client has
it: waits that can be cut short, limits on the size and the time of a whole answer, and the cache.
(The Hub's client would also send the Hub's token to a server that has no key.)
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx

from tbpo_cli import console
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.reply import Reply, read_reply
from tbpo_cli.evaluation.judges.said import lines_of
from tbpo_cli.runs.files import sealed_line

KEY = "OPENAI_API_KEY"  # the environment variable with the server's key
ATTEMPTS = 8  # at a server that is busy, fails or is cut off
FEW_ATTEMPTS = 4  # at what may be no such server
MAX_WAIT = 120.0  # seconds before another attempt, also where the server asks for more
MAX_BYTES = 32 * 2**20  # of an answer: 100,000 tokens with their log-probabilities are half of it
BUSY = {408, 425, 429}
OF_THE_REQUEST = {400, 413, 422}  # for example longer than the model's context

# Why an attempt failed, how many attempts are worth it, and the seconds that the server asks for.
Failure = tuple[str, int, float | None]
# The places of equal requests, and their reply or what ended the attempts.
Answered = tuple[list[int], Reply | Exception]


class _TooLargeError(Exception):
    """An answer has more than MAX_BYTES."""


class Endpoint:
    """A server, and what it has answered before. Its key is sent to it alone, and never written.

    Args:
        url: up to and including /v1, as a rule.
        concurrency: requests at a time.
        timeout: seconds for a whole answer, after which an attempt is given up.
        cache: a file with a reply a line, which is added to; None: nothing is kept.

    Raises:
        TbpoError: if the address or the key cannot be sent.
    """

    def __init__(
        self, url: str, concurrency: int, timeout: float, cache: Path | None = None
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/chat/completions")
        self._target, self.shown = _addresses(self._url)
        self.concurrency = concurrency
        self.timeout = timeout
        self.cache = cache
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            what = f"{KEY} has characters that are in no key"
            raise TbpoError(what, "the environment", "the key of the server", f"export {KEY}=KEY")
        self._known = _replies_of(cache)

    def ask(
        self, bodies: Sequence[dict[str, Any]], repeats: int = 1
    ) -> Iterator[tuple[int, Reply]]:
        """Yields (place, reply) for the bodies of requests, as they come.

        What was answered before is not asked again, and equal requests are asked once; with
        `repeats`, all of them that often, the places going on after the last body.

        Raises:
            TbpoError: if there is no such server or model, it refuses the key, or still fails after
                some attempts.
        """
        places: dict[str, list[int]] = {}
        bodies = [*bodies] * repeats
        for place, body in enumerate(bodies):
            number = place * repeats // len(bodies)
            asked = [self._url, body, number] if number else [self._url, body]
            text = json.dumps(asked, sort_keys=True)
            places.setdefault(hashlib.sha256(text.encode()).hexdigest(), []).append(place)
        answered: asyncio.Queue[Answered] = asyncio.Queue()
        left = iter(places.items())
        client = self._client()
        with asyncio.Runner() as runner:
            workers = [
                runner.get_loop().create_task(self._work(client, left, bodies, answered))
                for _ in range(min(self.concurrency, len(places)))
            ]
            try:
                for _ in places:
                    same, reply = runner.run(answered.get())
                    if isinstance(reply, Exception):
                        raise reply
                    yield from ((place, reply) for place in same)
            finally:
                for worker in workers:
                    worker.cancel()
                runner.run(client.aclose())

    def _client(self) -> httpx.AsyncClient:
        # A compressed answer could be a thousand times as large as what is counted.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=self.concurrency)
        return httpx.AsyncClient(headers=headers, timeout=None, limits=limits)

    async def _work(
        self,
        client: httpx.AsyncClient,
        left: Iterable[tuple[str, list[int]]],
        bodies: Sequence[dict[str, Any]],
        answered: asyncio.Queue[Answered],
    ) -> None:
        """Asks what is left, one request after the other."""
        for key, same in left:
            reply: Reply | Exception
            try:
                reply = await self._reply(client, key, bodies[same[0]])
            except Exception as error:
                reply = error
            await answered.put((same, reply))

    async def _reply(self, client: httpx.AsyncClient, key: str, body: dict[str, Any]) -> Reply:
        """One reply, from the cache, or after as many attempts as it takes."""
        if key in self._known:
            return self._known[key]
        attempt = 1
        while not isinstance(reply := await self._attempt(client, body), Reply):
            reason, limit, asked = reply
            wait = min(MAX_WAIT, 2.0 ** (attempt - 2) if asked is None else asked)
            if attempt >= limit:
                expected = "an OpenAI-compatible server; its address usually ends in /v1"
                fix = (
                    "start it, change the endpoint, or ask less at a time; "
                    "the same command goes on from there"
                )
                what = f"no chat completion after {attempt} attempts: {reason}"
                raise TbpoError(what, self.shown, expected, fix)
            if wait > 1:
                console.say(f"{self.shown}: {reason}; trying again in {wait:.0f} s")
            await asyncio.sleep(wait * random.uniform(1, 1.25))
            attempt += 1
        self._keep(key, reply)
        return reply

    def _keep(self, key: str, reply: Reply) -> None:
        """Adds a reply to the cache, unless another attempt could bring a better one."""
        if self.cache is None or reply.refused or reply.was_cut:
            return
        with self.cache.open("ab") as file:
            file.write(sealed_line({"key": key, "reply": asdict(reply)}))
        self._known[key] = reply

    async def _attempt(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Reply | Failure:
        try:
            async with asyncio.timeout(self.timeout):
                status, after, text = await self._post(client, json.dumps(body).encode())
        except TimeoutError:
            return f"no whole answer within {self.timeout:g} s", ATTEMPTS, None
        except httpx.HTTPError as error:
            cause = _first_cause(error)
            attempts = FEW_ATTEMPTS if isinstance(error, httpx.ConnectError) else ATTEMPTS
            return f"{type(cause).__name__}: {cause}", attempts, None
        except _TooLargeError:
            return f"the answer is larger than {MAX_BYTES >> 20} MB", FEW_ATTEMPTS, None
        said = f"{status} {' '.join(text.split())[:300]}"
        if status in BUSY or status >= 500:
            return said, ATTEMPTS, retry_after(after)
        if status in OF_THE_REQUEST:
            return Reply("", refused=f"the server refuses the request: {said}")
        if status in (401, 403):
            missing = f"a key is wanted, and {KEY} is not set"
            has = f"the key in {KEY} is not accepted" if self._key else missing
            raise TbpoError(
                f"{has}: {said}", self.shown, "a key of this server", f"export {KEY}=KEY"
            )
        if status != 200:
            expected = f"a server of the model {body['model']!r}; its address usually ends in /v1"
            what = f"the server answers {said}"
            raise TbpoError(what, self.shown, expected, "change the model or the endpoint")
        try:
            return read_reply(text)
        except ValueError as reason:
            return f"the answer is no chat completion, {reason}: {said}", FEW_ATTEMPTS, None

    async def _post(self, client: httpx.AsyncClient, data: bytes) -> tuple[int, str, str]:
        """Status, Retry-After and text of the answer, in which the key is blotted out."""
        content = bytearray()
        async with client.stream("POST", self._target, content=data) as answer:
            async for part in answer.aiter_raw():
                content += part
                if len(content) > MAX_BYTES:
                    raise _TooLargeError
        text = content.decode("utf-8", "replace")
        text = text.replace(self._key, "•••") if self._key else text
        return answer.status_code, answer.headers.get("Retry-After", ""), text


def retry_after(header: str) -> float | None:
    """Seconds until a server wants to be asked again, at most MAX_WAIT.

    Args:
        header: its Retry-After: a number of seconds, or a date.

    Returns:
        None if it is neither.
    """
    with suppress(TypeError, ValueError, OverflowError):
        if header.isdecimal():
            return min(MAX_WAIT, float(header))
        until = parsedate_to_datetime(header).timestamp() - time.time()
        return min(MAX_WAIT, max(0.0, until))
    return None


def _addresses(url: str) -> tuple[httpx.URL, str]:
    """Where requests are sent, and the address as it may be shown: without a name, password or
    query.
    """
    try:
        base = httpx.URL(url)
        shown = base.copy_with(username=None, password=None, query=None)
        return base.copy_with(path=f"{base.path.rstrip('/')}/chat/completions"), str(shown)
    except (httpx.InvalidURL, ValueError) as error:
        expected = "http://HOST:PORT/v1, or https://…"
        what = f"the endpoint is no address: {error}"
        raise TbpoError(what, "[eval] or [sample]", expected) from None


def _replies_of(cache: Path | None) -> dict[str, Reply]:
    """The replies in a cache by the keys of their requests; a line that holds none is left out."""
    known = {}
    if cache is not None and cache.exists():
        for line in lines_of(cache):
            with suppress(TypeError, ValueError, LookupError):
                known[str(line["key"])] = Reply(**line["reply"])
    return known


def _first_cause(error: BaseException) -> BaseException:
    """What an error of the connection comes from; of several addresses, that of the first."""
    several = getattr(error, "exceptions", ())
    while inner := several[0] if several else error.__cause__ or error.__context__:
        error = inner
        several = getattr(error, "exceptions", ())
    return error
