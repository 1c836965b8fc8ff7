"""A server on loopback that answers with a real model, and loads adapters as vLLM does."""

import json
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from loopback import on_loopback
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tbpo_cli.config.recipe import Sample
from tbpo_cli.model.generate import generate

BASE = "served-base"


@dataclass
class LoraServer:
    """What the handler shares with the test.

    Args:
        folder: of the base.
        ignores: whether it lists adapters, and answers with the base all the same.
        dies_after: completions, after which it answers 401.
    """

    folder: Path
    ignores: bool = False
    dies_after: int = 10**9
    loaded: dict = field(default_factory=dict)  # name: folder, of the adapters that are there
    seen: list = field(default_factory=list)  # (what, name) of every request
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def __post_init__(self):
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32")

    def change(self, what, body):
        """Status and text of a request to load or unload an adapter."""
        name = body["lora_name"]
        self.seen.append((what, name))
        if what == "unload_lora_adapter":
            return (200, "done") if self.loaded.pop(name, None) else (404, "not found")
        if name in self.loaded:
            return 400, "has already been loaded"
        if not (Path(body["lora_path"]) / "adapter_config.json").exists():
            return 404, f"no adapter in {body['lora_path']}"
        self.loaded[name] = body["lora_path"]
        if isinstance(self.model, PeftModel):
            if name not in self.model.peft_config:
                self.model.load_adapter(body["lora_path"], adapter_name=name)
        else:
            self.model = PeftModel.from_pretrained(self.model, body["lora_path"], adapter_name=name)
        return 200, "done"

    def models(self):
        adapters = [
            {"id": name, "root": path, "parent": BASE} for name, path in self.loaded.items()
        ]
        return 200, json.dumps({"data": [{"id": BASE, "root": str(self.folder)}, *adapters]})

    def complete(self, body):
        """Status and text of a request for a chat completion."""
        name = body["model"]
        if sum(what == "complete" for what, _ in self.seen) >= self.dies_after:
            return 401, "your time is up"
        self.seen.append(("complete", name))
        if name != BASE and name not in self.loaded:
            return 404, f"no model {name}"
        is_base = name == BASE or self.ignores
        if not is_base:
            self.model.set_adapter(name)
        off = is_base and isinstance(self.model, PeftModel)
        ids = self.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        asked = {key: body[key] for key in ("temperature", "top_p")}
        settings = Sample(max_new_tokens=body["max_tokens"], **asked)
        with self.model.disable_adapter() if off else nullcontext():
            (said,) = generate(
                self.model, [ids], [body["seed"]], settings, [self.tokenizer.eos_token_id]
            )
        text = self.tokenizer.decode(list(said.token_ids), skip_special_tokens=True)
        choice = {"message": {"role": "assistant", "content": text}}
        choice |= {"finish_reason": said.finish_reason}
        choice |= {"logprobs": {"content": [{"logprob": said.logp}]}}
        return 200, json.dumps({"choices": [choice]})


class Handler(BaseHTTPRequestHandler):
    server_state: LoraServer

    def do_GET(self):
        with self.server_state.lock:
            self._answer(*self.server_state.models())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        what = self.path.rpartition("/")[2]
        with self.server_state.lock:
            if what == "completions":
                self._answer(*self.server_state.complete(body))
            else:
                self._answer(*self.server_state.change(what, body))

    def _answer(self, status, text):
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def lora_server(folder, **settings):
    return on_loopback(Handler, LoraServer(folder, **settings))
