"""The policy of a round on a vLLM server: its adapter is loaded there, and what answers is checked.

vLLM loads adapters while it runs if it was started with --enable-lora and the environment variable
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from tbpo_cli import console
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.endpoint import KEY
from tbpo_cli.model.policy import POLICY, REFERENCE, Policy
from tbpo_cli.model.sharding import LanguageModel
from tbpo_cli.runs.files import sha256

TIMEOUT = 300.0  # seconds to load an adapter
FAR = 0.25  # nats a token between the server's log-probabilities and ours: not the same weights
CLOSE = 0.02  # nats a token that another number format makes
START = (
    "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora "
    "--max-lora-rank R"
)


def name_of_adapter(folder: Path) -> str:
    """What an adapter is called on the server: its content decides, so a name is one adapter."""
    files = ("adapter_config.json", "adapter_model.safetensors")
    digest = hashlib.sha256("".join(sha256(folder / name) for name in files).encode())
    return f"tbpo-{digest.hexdigest()[:12]}"


@contextmanager
def loaded_adapter(endpoint: str, base: str, folder: Path, seen: str) -> Iterator[str]:
    """Loads an adapter on a server and, at the end, unloads it; gives its name there.

    Args:
        endpoint: up to and including /v1.
        base: the base's name on the server.
        folder: of the adapter, here.
        seen: the same folder, as the server sees it.

    Raises:
        TbpoError: if the server does not load it, or has something else under its name.
    """
    name = name_of_adapter(folder)
    url = endpoint.rstrip("/")
    said = _post(f"{url}/load_lora_adapter", {"lora_name": name, "lora_path": seen})
    _check_listed(url, name, base, seen, said)
    try:
        yield name
    finally:
        _post(f"{url}/unload_lora_adapter", {"lora_name": name})


def check_weights(differences: dict[str, list[float]], endpoint: str, name: str) -> None:
    """Raises TbpoError if a server's log-probabilities are not those of the policy.

    Args:
        differences: by model, "policy" and "base": of some answers, |log π of the server − log π
            here|, nats a token.
        name: what the policy is called on the server.
    """
    policy = sum(differences["policy"]) / len(differences["policy"])
    base = sum(differences["base"]) / len(differences["base"])
    if policy <= CLOSE or (policy <= FAR and base >= policy / 2):
        return
    is_base = base <= CLOSE
    what = "the base, without the adapter" if is_base else "something else than this policy"
    raise TbpoError(
        f"the server answers with {what}: its log-probabilities are {policy:.2f} nats a token from "
        f"those of the policy, and {base:.2f} from those of the base",
        f"{endpoint}, model {name}",
        "the policy of this round, on the same base",
        "check the base that it serves, and restart it",
    )


@dataclass(frozen=True)
class Probe:
    """An answer of the server, to be compared.

    Args:
        prompt_ids: of the prompt.
        token_ids: of the answer, with the end of the turn.
        logp: log-probability of the answer by the server, nats; it may count the end or not.
    """

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    logp: float


def differences_of(policy: Policy, probes: Sequence[Probe]) -> dict[str, list[float]]:
    """What `check_weights` reads."""
    found: dict[str, list[float]] = {}
    for name, view in (("policy", POLICY), ("base", REFERENCE)):
        with policy.view(view) as model:
            found[name] = [_difference(model, each) for each in probes]
    return found


def _difference(model: LanguageModel, probe: Probe) -> float:
    device = next(model.parameters()).device
    ids = torch.tensor([[*probe.prompt_ids, *probe.token_ids]], device=device)
    logits = model(input_ids=ids).logits[0, len(probe.prompt_ids) - 1 : -1].float()
    targets = ids[0, len(probe.prompt_ids) :, None]
    logps = logits.log_softmax(dim=-1).gather(1, targets)[:, 0]
    sums = (float(logps.sum()), float(logps[:-1].sum()))
    return min(abs(probe.logp - each) for each in sums) / len(probe.token_ids)


def _post(url: str, body: dict[str, str]) -> str:
    """What the server says to a request; "" if it is done. One that does not answer says so."""
    try:
        answer = httpx.post(url, json=body, headers=_headers(), timeout=TIMEOUT)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error}"
    return "" if answer.status_code == 200 else f"{answer.status_code} {answer.text[:300]}"


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY, "").strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


def _check_listed(url: str, name: str, base: str, seen: str, said: str) -> None:
    """Raises TbpoError unless the server lists the adapter, on its base and from its folder."""
    try:
        answer = httpx.get(f"{url}/models", headers=_headers(), timeout=TIMEOUT)
        listed: dict[str, Any] = {each["id"]: each for each in answer.json()["data"]}
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        what = f"the server does not list its models: {said or error}"
        raise TbpoError(what, url, "a vLLM server", START) from None
    if name not in listed:
        what = f"the server does not load the adapter of this round: {said or 'it is not listed'}"
        fix = f"{START}; where it sees the run in another folder, rounds.endpoint_folder"
        raise TbpoError(what, url, f"a vLLM server that can read {seen}", fix)
    found = listed[name]
    for key, expected in (("parent", base), ("root", seen)):
        if found.get(key) not in (None, expected):
            what = f"the server has another {key} for {name}: {found[key]}"
            raise TbpoError(what, url, expected, "restart the server")
    if said:  # as after a run that was killed: its name says that it is the same adapter
        console.say(f"{name} is on the server already")
