"""What libraries raise while a model is loaded, as messages that name the cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError

from tbpo_cli.core.memory import first_line, is_out_of_memory
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.out_of_memory import is_of_processes
from tbpo_cli.runs.files import DISK_ERRORS

WEIGHTS = (
    "a folder with config.json and *.safetensors (pickles are not loaded), or the id of a Hub"
    " repository"
)


@contextmanager
def refused_with_a_reason(source: str, key: str) -> Iterator[None]:
    """Makes whatever the libraries raise while a model is loaded an error that names the cause."""
    try:
        yield
    except TbpoError:
        raise
    except (
        MemoryError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        ImportError,
        RuntimeError,
        SafetensorError,
    ) as error:
        if is_of_processes(error):
            raise
        if lacks := _lacking(error, source, key):
            raise lacks from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Of an encoder's config, what follows are the names of some two hundred classes.
        why = " ".join(lines[:2]).partition(" Model type should be one of ")[0]
        what = f"the model cannot be loaded: {why or type(error).__name__}"
        raise TbpoError(what, f"{key} = {source!r}", WEIGHTS, _fix(error, source, key)) from error


def _lacking(error: BaseException, source: str, key: str) -> TbpoError | None:
    """The message for an exception of the loading that is due to too little memory or disk."""
    where = f"{key} = {source!r}"
    for cause in _causes(error):
        if is_out_of_memory(cause):
            return TbpoError(
                f"out of memory while the model is loaded: {first_line(cause)}",
                where,
                "a device that has memory for the weights",
                'model.quantization = "nf4", more --gpus with sharding = "fsdp", a smaller base, '
                "or a device where nothing else runs",
            )
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            return TbpoError(
                f"the model cannot be loaded: {cause.strerror}",
                str(cause.filename or where),
                "a disk with space for the download",
                "free some space, or give another disk with HF_HOME=FOLDER; then the same command",
            )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """An exception, what caused it, and what caused that."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return causes


def _fix(error: BaseException, source: str, key: str) -> str:
    """What to do about an exception of the loading, by what caused it."""
    causes = _causes(error)
    text = str(error)
    newer = f"an architecture that transformers {transformers.__version__} has"
    once = f"AutoModelForCausalLM.from_pretrained({source!r}).save_pretrained('converted')"
    convert = f'python -c "from transformers import AutoModelForCausalLM; {once}"'
    fixes = [
        (
            any(isinstance(each, GatedRepoError) for each in causes),
            f"ask for access at https://huggingface.co/{source}, then `hf auth login`",
        ),
        (
            any(isinstance(each, RepositoryNotFoundError) for each in causes),
            f"check {key}: no such repository, or a private one, which needs `hf auth login`",
        ),
        (
            isinstance(error, FileNotFoundError) and "safetensors" in text,
            "copy or download the model again: a file of its weights is missing",
        ),
        (
            isinstance(error, ImportError),
            'install what is missing; if it is for attention: model.attention = "auto"',
        ),
        (isinstance(error, SafetensorError), "its weights are damaged: copy them again"),
        ("does not recognize this architecture" in text, f"take {newer}, or upgrade transformers"),
        ("Unrecognized model" in text, f"check config.json: its model_type must name {newer}"),
        ("trust_remote_code" in text, "model.trust_remote_code = true, if you trust its code"),
        ("Unrecognized configuration class" in text, "take a decoder: a causal language model"),
        ("safetensors" in text, f"convert it once: {convert}"),
    ]
    known = next((fix for holds, fix in fixes if holds), "")
    return known or f"check {key} (and model.revision), and that the Hub can be reached"
