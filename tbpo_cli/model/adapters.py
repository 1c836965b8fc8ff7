"""LoRA adapters: a new one on the text layers, and those of a folder, which must fit exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open

from tbpo_cli.config.recipe import Model
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.policy import POLICY, REFERENCE
from tbpo_cli.model.sharding import LanguageModel
from tbpo_cli.model.targets import text_layers

ALL_LINEAR = "all-linear"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SHOWN_KEYS = 6
# Ways to start an adapter that take its product away from the base as they are loaded.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A repetition of something with a repetition in it.
SLOW_PATTERN = re.compile(r"\([^()]*[+*][^()]*\)[+*{]")
LOADING_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    SafetensorError,
)


def local_adapter(source: str, key: str = "the adapter") -> Path:
    """The folder of an adapter, or that of "user/repo[@revision]" in the cache.

    Raises:
        TbpoError: if there is none.
    """
    folder = Path(source)
    repo, _, revision = source.partition("@")
    files = (CONFIG_FILE, WEIGHTS_FILE)
    try:
        if not folder.is_dir():
            patterns = list(files)
            folder = Path(
                snapshot_download(repo, revision=revision or None, allow_patterns=patterns)
            )
        if missing := [name for name in files if not (folder / name).exists()]:
            pickles = sorted(path.name for path in folder.glob("adapter_model.bin"))
            why = f", and a pickle is not loaded: {pickles[0]}" if pickles else ""
            raise OSError(f"it has no {missing[0]}{why}")
    except (OSError, ValueError) as error:
        what = f"the adapter cannot be loaded: {str(error).splitlines()[0]}"
        where = f"{key} = {source!r}"
        names = " and ".join(files)
        expected = f"a folder, or user/repo[@revision] on the Hub, with {names} (no pickle)"
        fix = "check it, and that the Hub can be reached; a whole model is named as model.base"
        raise TbpoError(what, where, expected, fix) from error
    return folder


def copies_layers(folder: Path) -> bool:
    """Whether an adapter has whole copies of layers of its base, by its config."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return bool(config.get("modules_to_save") or config.get("trainable_token_indices"))
    except (OSError, ValueError, AttributeError):  # it is refused where it is loaded
        return False


def new_adapter(base: LanguageModel, model: Model) -> LanguageModel:
    """A base with a new adapter, whose product is zero, as the policy.

    Raises:
        TbpoError: if target_modules name no layers that can have one.
    """
    lora = model.lora
    assert lora is not None
    targets = lora.target_modules
    names: str | list[str] = targets if isinstance(targets, str) else list(targets)
    if targets == ALL_LINEAR:
        names = text_layers(base)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int, and takes any number
        lora_dropout=lora.dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.base,
        revision=model.revision,
    )
    try:
        if not names:
            raise ValueError("no linear layer of its language part can have an adapter")
        if isinstance(names, list):
            modules = "".join(f".{name}\n" for name, _ in base.named_modules())
            if unknown := [name for name in names if f".{name}\n" not in modules]:
                raise ValueError(f"no layer is called {', '.join(unknown)}")
        adapted = get_peft_model(base, config)
        if lost := _not_loaded_back(adapted):
            if targets != ALL_LINEAR:
                raise ValueError(f"peft cannot load what it saves of {', '.join(lost)}")
            kept = [name for name in names if name.rsplit(".", 1)[-1] not in lost]
            config.target_modules = kept
            adapted = get_peft_model(adapted.unload(), config)
        return adapted
    except (ValueError, NotImplementedError, TypeError) as error:
        found = ", ".join(text_layers(base)) or "none"
        fix = 'target_modules = "all-linear", which takes those layers'
        if targets == ALL_LINEAR:
            fix = "leave [model.lora] out: all weights are then trained"
        raise TbpoError(
            f"the adapter does not fit the model: {str(error).splitlines()[0]}",
            "[model.lora] target_modules",
            f"names of its linear layers: {found}",
            fix,
        ) from error


def _not_loaded_back(adapted: LanguageModel) -> list[str]:
    """The last names of layers whose adapter would get lost between saving and loading.

    peft renames the weights of an adapter, as it loads them, by what transformers renames in the
    checkpoints of the architecture.
    """
    saved = get_peft_model_state_dict(adapted)
    loaded: Any = set_peft_model_state_dict(adapted, dict(saved))
    names = [key.partition(".lora_")[0] for key in loaded.missing_keys if f".{POLICY}." in key]
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def continued_adapter(
    base: LanguageModel, policy: Path, reference: Path | None, model: Model, trains: bool = True
) -> LanguageModel:
    """A base with the adapter of one folder as the policy, and another one as the reference.

    Args:
        policy: the folder of the policy's adapter.
        reference: that of the frozen reference's; None: the base itself is the reference.
        trains: whether the policy's adapter is trained further.

    Raises:
        TbpoError: if an adapter does not fit the base exactly.
    """
    with _exactly(base, policy, POLICY, model.base) as loaded:
        peft_model = PeftModel.from_pretrained(
            base, policy, adapter_name=POLICY, is_trainable=trains
        )
        loaded.append(peft_model)
    if reference is not None:
        add_adapter(peft_model, reference, REFERENCE, model.base)
    return peft_model


def add_adapter(model: LanguageModel, folder: Path, name: str, base: str) -> None:
    """Puts the adapter of a folder beside the policy's, as a frozen view.

    Raises:
        TbpoError: if it does not fit the base exactly.
    """
    with _exactly(model, folder, name, base) as loaded:
        model.load_adapter(folder, adapter_name=name, is_trainable=False)
        loaded.append(model)
        model.set_adapter(POLICY)


@contextmanager
def _exactly(
    model: LanguageModel, folder: Path, name: str, base: str
) -> Iterator[list[LanguageModel]]:
    """Checks that an adapter is loaded whole, and leaves the base as it was.

    1. Refuse an adapter whose config says that the base is changed as it is loaded.
    2. Note where the weights of the base are, and how often each was written.
    3. Let the caller load it, and give the model with the adapter.
    4. Compare the names in the file with those of the adapter, and the base with step 2.
    """
    _check_start(folder)
    written = [(p, p.data_ptr(), p._version) for p in model.parameters()]
    # An adapter on embeddings may bring a copy of theirs, which must be that of the base.
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    copies = {id(end.weight): end.weight.detach().clone() for end in ends if end is not None}
    loaded: list[LanguageModel] = []
    try:
        yield loaded
        fault = _wrong_names(loaded[0], folder, name)
    except LOADING_ERRORS as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _misfit(lines[-1] if lines else type(error).__name__, folder, base) from error
    for weight, pointer, version in written:
        is_untouched = (weight.data_ptr(), weight._version) == (pointer, version)
        copy = copies.get(id(weight))
        if not is_untouched and (copy is None or not torch.equal(weight, copy)):
            _refuse_biases(loaded[0].peft_config[name], folder)
            fault = fault or "it changes its base as it is loaded"
    if fault:
        raise _misfit(fault, folder, base)


def _misfit(fault: str, folder: Path, base: str) -> TbpoError:
    return TbpoError(
        f"the adapter does not fit the base: {fault}",
        str(folder),
        f"an adapter for {base}, all of whose weights find their place",
        "check model.base, and that the adapter was trained on it",
    )


def _refuse_biases(config: PeftConfig, folder: Path) -> None:
    """Raises TbpoError for an adapter that holds the biases of its base."""
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise TbpoError(
            f"the adapter changes its base as it is loaded: bias = {bias!r} has it hold the biases",
            str(folder / CONFIG_FILE),
            'bias = "none": policy and reference share one base',
            'train it again with bias = "none", or merge it into its base, to be named model.base',
        )


def _check_start(folder: Path) -> None:
    """Raises TbpoError if the adapter's config says that loading it changes the base."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
        _check_size(config, folder)
    except (*LOADING_ERRORS, RecursionError) as error:
        raise TbpoError(
            f"the adapter's files cannot be read: {' '.join(str(error).split())[:200]}",
            str(folder),
            "the config and the weights of a LoRA adapter, as peft writes them",
            "copy or download the adapter again",
        ) from error
    if getattr(config, "alora_invocation_tokens", None) is not None:
        raise TbpoError(
            "the adapter acts only after certain tokens (alora_invocation_tokens)",
            str(folder / CONFIG_FILE),
            "a plain LoRA adapter, which acts on every token",
            "train another one, or take the base alone",
        )
    start = str(getattr(config, "init_lora_weights", True)).lower()
    if start.startswith(CHANGES_THE_BASE):
        convert = "peft_model.save_pretrained(folder, path_initial_model_for_weight_conversion=…)"
        raise TbpoError(
            f"the adapter changes its base as it is loaded: it was started by {start}",
            str(folder / CONFIG_FILE),
            "a plain LoRA adapter: policy and reference share one base",
            f"convert it with {convert}, as peft's page on LoRA says; or merge it into its base",
        )


def _check_size(config: PeftConfig, folder: Path) -> None:
    """Raises TbpoError for a rank that the weights do not have, or a slow pattern of names."""
    ranks = [getattr(config, "r", 0), *(getattr(config, "rank_pattern", None) or {}).values()]
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        keys = [key for key in file.keys() if "lora_" in key]  # noqa: SIM118 - no dict
        sizes = [size for key in keys for size in file.get_slice(key).get_shape()]
    targets = getattr(config, "target_modules", None)
    is_slow = isinstance(targets, str) and (len(targets) > 1000 or SLOW_PATTERN.search(targets))
    what = ""
    if sizes and max(ranks) > max(sizes):
        what = f"the adapter's config has the rank {max(ranks):,}, and its weights have not"
    elif is_slow:
        what = "the adapter's target_modules is a pattern that may take for ever to match"
    if what:
        expected = "a config as peft wrote it beside these weights, with target_modules as a list"
        fix = "copy or download the adapter again"
        raise TbpoError(what, str(folder / CONFIG_FILE), expected, fix)


def _wrong_names(model: LanguageModel, folder: Path, name: str) -> str:
    """Which weights the file lacks, or has and the adapter does not, in words; "" if none."""
    state = get_peft_model_state_dict(model, adapter_name=name)
    expected = set(state)
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        found = set(file.keys())
        others = {
            key
            for key in expected & found
            if not torch.equal(state[key].cpu(), file.get_tensor(key).to(state[key].dtype))
        }
    faults = []
    for what, keys in (
        ("its file lacks", expected - found),
        ("the model has no place for", found - expected),
        ("peft does not load", others),
    ):
        # Copies of embeddings are written or not, as peft decides.
        names = sorted(key for key in keys if "lora_" in key)
        if names:
            more = len(names) - SHOWN_KEYS
            shown = ", ".join(names[:SHOWN_KEYS])
            faults.append(f"{what} {shown}" + (f" and {more} more" if more > 0 else ""))
    return "; ".join(faults)
