"""A server on loopback that speaks OpenAI's chat completions, and misbehaves on demand."""

import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from loopback import on_loopback


def chat_completion(text, **more):
    return {
        "choices": [
            {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10},
    }


@dataclass
class Server:
    """What the handler shares with the test.

    Args:
        answer: body of a request → text of the completion, or the whole answer as a dict.
        troubles: what the next requests meet before any is answered: (status, body, headers),
        "slow", "cut", "drop", "drip" (a byte now and then) or "endless" (200 MB).
    """

    answer: object
    troubles: list = field(default_factory=list)
    requests: list = field(default_factory=list)  # (path, headers, body) of each POST
    times: list = field(default_factory=list)
    sent: int = 0  # bytes of answers that do not end
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    server_state: Server

    def do_POST(self):
        state = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state.lock:
            state.requests.append((self.path, dict(self.headers), body))
            state.times.append(time.monotonic())
            trouble = state.troubles.pop(0) if state.troubles else None
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
        try:
            self._serve(trouble, body)
        finally:
            with state.lock:
                state.at_once -= 1

    def _serve(self, trouble, body):
        if trouble == "slow":
            time.sleep(1.5)
        if trouble == "drop":
            return self.connection.close()
        if trouble in ("drip", "endless"):
            return self._never_end(b" " if trouble == "drip" else b" " * 2**20)
        if isinstance(trouble, tuple):
            status, text, headers = trouble
            return self._answer(status, text, **headers)
        answer = self.server_state.answer(body)
        if isinstance(answer, tuple):
            return self._answer(*answer)
        text = json.dumps(answer if isinstance(answer, dict) else chat_completion(answer))
        self._answer(200, text, cut=trouble == "cut")

    def _never_end(self, part):
        """Sends parts of an answer until the client goes away."""
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            for _ in range(200):
                self.wfile.write(part)
                self.server_state.sent += len(part)
                time.sleep(0.1 if len(part) == 1 else 0)
        self.close_connection = True

    def _answer(self, status, text, cut=False, **headers):
        content = text.encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        with suppress(OSError):  # the client may have given up
            self.wfile.write(content[: len(content) // 2] if cut else content)

    def log_message(self, *_):
        pass


def chat_server(answer, *troubles):
    return on_loopback(Handler, Server(answer, list(troubles)))
