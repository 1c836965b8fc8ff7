"""Samples of a policy that a server answers for, with OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe, Sample
from tbpo_cli.data.prompts import Prompt
from tbpo_cli.data.templates import Chat
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.endpoint import Endpoint
from tbpo_cli.evaluation.serving import (
    Probe,
    check_weights,
    differences_of,
    loaded_adapter,
    name_of_adapter,
)
from tbpo_cli.model.adapters import local_adapter
from tbpo_cli.model.generate import seed_of
from tbpo_cli.model.load import load_base_alone, load_trained

Json = dict[str, Any]

SERVER_TIMEOUT = 600.0  # seconds for a completion
NUM_PROBES = 8  # answers whose log-probabilities say which weights a server has


@contextmanager
def on_server(
    recipe: Recipe,
    chat: Chat,
    prompts: Sequence[Prompt],
    device: torch.device,
    is_base: bool = False,
    compares: bool = True,
) -> Iterator[None]:
    """Loads the adapter on the server where that is asked for, and checks what answers there.

    Args:
        is_base: whether the policy is the base itself, as before the first round; without an
            adapter, nothing else is known of what the server is to answer with.
        compares: whether its answers are compared with the policy, loaded here; not where the
            weights are sharded, as the other processes take no part.

    Raises:
        TbpoError: if the server does not load it, or answers with other weights.
    """
    settings = recipe.sample
    is_checked = is_base or settings.endpoint_adapter is not None
    if settings.endpoint is not None and is_checked and not compares:
        console.say("WARNING: the weights are sharded, and not compared with those of the server")
    if settings.endpoint is None or settings.endpoint_adapter is None:
        if settings.endpoint is not None and is_base and compares:
            _check_answers(recipe, chat, prompts, str(settings.endpoint_model), device, None)
        yield
        return
    folder = local_adapter(str(settings.adapter))
    base = str(settings.endpoint_model)
    with loaded_adapter(settings.endpoint, base, folder, settings.endpoint_adapter) as name:
        if compares:
            _check_answers(recipe, chat, prompts, name, device, folder)
        yield


def _check_answers(
    recipe: Recipe,
    chat: Chat,
    prompts: Sequence[Prompt],
    name: str,
    device: torch.device,
    adapter: Path | None,
) -> None:
    """Compares a few answers of the server with the policy, which is the base without an adapter.

    The policy is loaded for this alone: its memory is for what comes next.
    """
    probes = _probes(recipe, chat, prompts[:NUM_PROBES], name)
    if not probes:
        console.say("the server gives no log-probabilities: its weights are not compared")
        return
    if adapter is None:
        policy = load_base_alone(recipe, device)
    else:
        policy = load_trained(recipe, device, adapter, None)
    check_weights(differences_of(policy, probes), str(recipe.sample.endpoint), name)


def _probes(recipe: Recipe, chat: Chat, prompts: Sequence[Prompt], name: str) -> list[Probe]:
    """Short answers of the server with their log-probabilities, at temperature 1."""
    settings = recipe.sample
    prompts = [prompt for prompt in prompts if not prompt.tools]
    assert settings.endpoint is not None
    drawn = {"temperature": 1.0, "top_p": 1.0, "max_tokens": min(64, settings.max_new_tokens)}
    bodies = [
        {"model": name, **drawn, "logprobs": True, "seed": 0, "messages": prompt.messages}
        for prompt in prompts
    ]
    probes = []
    asked = Endpoint(settings.endpoint, settings.batch_size, SERVER_TIMEOUT).ask(bodies)
    for place, reply in asked:
        if reply.logp is not None and reply.text:
            (ids,) = chat.encoder.encode_plain([reply.text])
            ids += [chat.end_ids[0]] * (reply.finish_reason == "stop")
            probes.append(Probe(prompts[place].token_ids, ids, reply.logp))
    return probes


def _name_on_server(settings: Sample) -> str | None:
    if settings.endpoint_adapter is None:
        return settings.endpoint_model
    return name_of_adapter(local_adapter(str(settings.adapter)))


def served(
    recipe: Recipe, chat: Chat, keys: list[tuple[Prompt, int]], asks: dict[str, Any]
) -> Iterator[Json]:
    """Samples from the server; what it refuses is asked for once more, without `asks`."""
    settings = recipe.sample
    refused = []
    end = chat.end_ids[0]
    assert settings.endpoint is not None
    same = {
        "model": _name_on_server(settings),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
    }
    same |= {"max_tokens": settings.max_new_tokens, **asks}
    bodies = [
        {
            **same,
            "messages": prompt.messages,
            **({"tools": prompt.tools} if prompt.tools else {}),
            "seed": seed_of(recipe.run.seed, prompt.prompt_id, number) % 2**31,
        }
        for prompt, number in keys
    ]
    for place, reply in Endpoint(settings.endpoint, settings.batch_size, SERVER_TIMEOUT).ask(
        bodies
    ):
        prompt, number = keys[place]
        if not reply.refused:
            (ids,) = chat.encoder.encode_plain([reply.text])
            ids += [end] * (reply.finish_reason == "stop")
            said = {"completion": reply.text, "token_ids": ids, "logp": reply.logp}
            yield {
                "prompt_id": prompt.prompt_id,
                "sample": number,
                **said,
                "finish_reason": reply.finish_reason,
            }
        elif asks:
            refused.append(keys[place])
        else:
            where = f"prompt {prompt.prompt_id}"
            fix = "leave the prompt out, or change [sample]"
            raise TbpoError(reply.refused, where, "a completion", fix)
    if refused:
        yield from served(recipe, chat, refused, {})
