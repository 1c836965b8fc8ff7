"""The base's tokenizer, with its chat template."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tbpo_cli.config.recipe import Model
from tbpo_cli.errors import TbpoError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(model: Model) -> PreTrainedTokenizerFast:
    """The base's fast tokenizer, with the recipe's chat template if it names one.

    Raises:
        TbpoError: if there is none, if it is not a fast one, or if it has no chat template.
    """
    from transformers import AutoTokenizer

    where = f"model.base = {model.base!r}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        what = f"the tokenizer cannot be loaded: {str(error).splitlines()[0]}"
        expected = "a folder with tokenizer.json, or the id of a Hub repository"
        raise TbpoError(what, where, expected, "check model.base and the network") from error
    if not tokenizer.is_fast:
        expected, fix = (
            "a tokenizer.json beside the model",
            "convert it with transformers and save it in the folder",
        )
        raise TbpoError("the model has no fast tokenizer", where, expected, fix)
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TbpoError(
                f"the chat template cannot be read: {error}", model.chat_template, "a Jinja file"
            ) from None
    if tokenizer.chat_template is None:
        expected, fix = (
            "a template that renders the chat",
            "write it to a file and name it as model.chat_template",
        )
        raise TbpoError("the tokenizer has no chat template", where, expected, fix)
    return cast("PreTrainedTokenizerFast", tokenizer)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of all that decides which tokens a text becomes: of a tokenizer as it was loaded."""
    content = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.chat_template)
    return hashlib.sha256(content.encode()).hexdigest()
