"""The base's tokenizer, with its chat template and its end tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tbpo_cli.config.recipe import Model
from tbpo_cli.data.templates import Chat
from tbpo_cli.errors import TbpoError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_chat(model: Model, template_date: str) -> Chat:
    """The base's tokenizer, the recipe's or its own chat template, and the base's end tokens.

    Raises:
        TbpoError: as `load_tokenizer`.
    """
    return Chat(load_tokenizer(model), template_date, base_end_ids(model))


def load_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The base's fast tokenizer, with the recipe's chat template if it names one.

    Raises:
        TbpoError: if there is none, if it is not a fast one, or if it has no chat template.
    """
    from transformers import AutoTokenizer

    where = f"model.base = {model.base!r}"
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            model.base,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            # A tokenizer.json is used also where a tekken.json for mistral_common is beside it.
            mistral_format=False,
        )
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot read
        raise _unloadable(error, where) from error
    if not tokenizer.is_fast:
        raise TbpoError(
            "the model has no fast tokenizer",
            where,
            "a tokenizer.json beside the model",
            "convert it with transformers and save it in the folder",
        )
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TbpoError(
                f"the chat template cannot be read: {error}", model.chat_template, "a Jinja file"
            ) from None
    if tokenizer.chat_template is None:
        raise TbpoError(
            "the tokenizer has no chat template",
            where,
            "a template that renders the chat",
            "write it to a file and name it as model.chat_template",
        )
    return cast("PreTrainedTokenizerFast", tokenizer)


def _unloadable(error: Exception, where: str) -> TbpoError:
    """Why a tokenizer cannot be loaded, by the error that is behind what transformers raises."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes: list[BaseException] = [error]
    while following := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(following)
    advice: dict[type[BaseException], tuple[str, str]] = {
        GatedRepoError: (
            "the base is gated: its owners give access on request",
            "ask for access on the model's page, then `hf auth login`",
        ),
        RevisionNotFoundError: ("the base has no such revision", "change model.revision"),
        RepositoryNotFoundError: (
            "the Hub has no such model, or you may not see it",
            "check model.base; for a private model, `hf auth login`",
        ),
        OfflineModeIsEnabled: (
            "the Hub may not be asked",
            "unset HF_HUB_OFFLINE, or give a folder",
        ),
        LocalEntryNotFoundError: (
            "the Hub cannot be reached, and the base is not in the cache",
            "check model.base and the network",
        ),
    }
    expected = "a folder with tokenizer.json, or the id of a Hub repository that has one"
    for kind, (what, fix) in advice.items():
        if any(isinstance(cause, kind) for cause in causes):
            return TbpoError(f"the tokenizer cannot be loaded: {what}", where, expected, fix)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return TbpoError(
        f"the tokenizer cannot be loaded: {lines[0]}",
        where,
        expected,
        "check model.base; an architecture that is not known yet needs a newer transformers",
    )


def base_end_ids(model: Model) -> tuple[int, ...]:
    """The end tokens of the base: of its generation config, or if it has none, of its config."""
    from transformers.utils.hub import cached_file

    for name in ("generation_config.json", "config.json"):
        try:
            path = cached_file(
                model.base,
                name,
                revision=model.revision,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            config = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        except (OSError, ValueError):
            continue
        text = config.get("text_config")
        ids = config.get(
            "eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None
        )
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of all that decides which tokens a text becomes: of a tokenizer as it was loaded."""
    content = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.chat_template)
    return hashlib.sha256(content.encode()).hexdigest()
