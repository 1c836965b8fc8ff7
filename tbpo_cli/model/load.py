"""The policy and its reference, from a recipe."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from tbpo_cli import console
from tbpo_cli.config.recipe import Model, Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.fused import fuse_lora, fuse_norms
from tbpo_cli.model.sharding import LanguageModel, gather_all, shard

POLICY = "default"  # peft's own name for a first adapter: what is saved loads without naming it
REFERENCE, POSITIVE, NEGATIVE = "reference", "positive", "negative"


@dataclass(frozen=True)
class Policy:
    """The model that is trained, and the frozen models that it is seen beside.

    Args:
        model: the transformers model; peft has put LoRA layers into it if the recipe has [model.lora].
        frozen: whole models, by the name of their view.
        autocast: the dtype that products run in where the weights are kept in a wider one; None: that of the weights.

    A view is, in this order: the whole model of that name; the adapter of that name on the shared base; the base
    itself, with the adapters off.
    """

    model: LanguageModel
    frozen: dict[str, LanguageModel] = field(default_factory=dict)
    autocast: torch.dtype | None = None

    @property
    def adapters(self) -> dict[str, PeftConfig]:
        """The adapters in the model, by name; none in full fine-tuning."""
        return getattr(self.model, "peft_config", {})

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def has_reference(self) -> bool:
        return bool(self.adapters) or REFERENCE in self.frozen

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights: then all of them run the same passes, at the same time."""
        return isinstance(next(self.model.parameters()), DTensor)

    def share_out(self, mesh: DeviceMesh) -> None:
        """Leaves this process its part of the weights of all models, on the mesh's device."""
        for model in (self.model, *self.frozen.values()):
            shard(model, mesh, self.autocast)

    def move_to(self, device: torch.device) -> None:
        """Moves the models to a device, unless they are there; those that are quantized can only be loaded there."""
        for model in (self.model, *self.frozen.values()):
            if next(model.parameters()).device.type != device.type:
                model.to(device)

    @contextlib.contextmanager
    def view(self, name: str) -> Iterator[LanguageModel]:
        """A model, in evaluation mode (no dropout) and without gradients, for the time of the context."""
        model: LanguageModel = self.frozen.get(name, self.model)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self._weights(name):
                yield model
        finally:
            model.train(was_training)

    @contextlib.contextmanager
    def _weights(self, name: str) -> Iterator[None]:
        if name in self.frozen or name == POLICY:
            yield
        elif name in self.adapters:
            self.model.set_adapter(name, inference_mode=True)
            try:
                yield
            finally:
                self.model.set_adapter(POLICY)
        else:
            with self.model.disable_adapter():
                yield

    def describe_reference(self) -> str:
        """Which model it is, in words."""
        if REFERENCE in self.frozen:
            return "a frozen copy of the model"
        return (
            "a frozen copy of the SFT adapter"
            if REFERENCE in self.adapters
            else "the base, with the adapter off"
        )

    def save(self, folder: Path, writes: bool = True) -> list[Path]:
        """Writes what was trained: the adapter alone, or the whole model in the base's own dtype; returns the files.

        Args:
            writes: whether this process does. Of sharded models the others take part, for their parts of the weights.
        """
        state = self.trained if self.adapters else self.model.state_dict(keep_vars=True)
        state = gather_all(state, writes)
        if not writes:
            return []
        if self.adapters:
            self.model.save_pretrained(folder, selected_adapters=[POLICY], state_dict=state)
        else:
            dtype = self.model.config.dtype
            state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
            self.model.save_pretrained(folder, state_dict=state)
            self.model.config.dtype = (
                dtype  # save_pretrained notes the dtype of the weights in memory
            )
            self.model.config.save_pretrained(folder)
        return sorted(
            path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"
        )


def load_policy(
    recipe: Recipe,
    device: torch.device,
    sft_output: Path | None,
    with_reference: bool,
    home: torch.device | None = None,
) -> Policy:
    """The policy in its starting state.

    Args:
        device: it will compute on.
        home: where it is loaded, to be moved or shared out later; None: on that device.
        sft_output: `sft/adapter` or `sft/model` of this run, if an SFT stage came before.
        with_reference: whether the loss, or the evaluation, compares with a reference.

    Raises:
        TbpoError: if the base cannot be loaded, or LoRA finds no layers.
    """
    torch.manual_seed(recipe.run.seed)  # random weights and LoRA's start are functions of the seed
    compute, device = compute_dtype(recipe.model, device), home or device
    if (
        recipe.model.lora is None
    ):  # bf16 would round small updates of the weights away: they are kept in fp32
        model = load_base(recipe.model, str(sft_output or recipe.model.base), device, torch.float32)
        frozen = {REFERENCE: copy.deepcopy(model).requires_grad_(False)} if with_reference else {}
        return Policy(model, frozen, None if compute == torch.float32 else compute)
    model = load_base(recipe.model, recipe.model.base, device, compute)
    start = sft_output or _named_adapter(recipe.model)
    adapted = (
        _new_adapter(model, recipe.model)
        if start is None
        else _continue(model, start, start, recipe.model)
    )
    return _with_adapter(adapted, recipe.model, compute)


def load_trained(
    recipe: Recipe, device: torch.device, trained: Path, sft_output: Path | None
) -> Policy:
    """The policy as training left it, with its reference.

    Args:
        trained: `align/adapter` or `align/model`, or the folder of any other adapter for the base.
        sft_output: `sft/adapter` or `sft/model` of this run, if an SFT stage came before.
    """
    compute = compute_dtype(recipe.model, device)
    if not (trained / "adapter_config.json").exists():
        reference = load_base(recipe.model, str(sft_output or recipe.model.base), device, compute)
        return Policy(
            load_base(recipe.model, str(trained), device, compute), {REFERENCE: reference}
        )
    base = load_base(recipe.model, recipe.model.base, device, compute)
    reference_adapter = sft_output or _named_adapter(recipe.model)
    return _with_adapter(
        _continue(base, trained, reference_adapter, recipe.model, False), recipe.model, compute
    )


def _named_adapter(model: Model) -> Path | None:
    return None if model.adapter is None else local_adapter(model.adapter, "model.adapter")


def _new_adapter(base: LanguageModel, model: Model) -> LanguageModel:
    lora = model.lora
    assert lora is not None
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int, and takes any number
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules
        if isinstance(lora.target_modules, str)
        else list(lora.target_modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.base,
        revision=model.revision,
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise TbpoError(
            f"the adapter does not fit the model: {error}",
            "[model.lora] target_modules",
            'names of linear layers of the model, or "all-linear"',
            'target_modules = "all-linear"',
        ) from error


def _continue(
    base: nn.Module, policy: Path, reference: Path | None, model: Model, trains: bool = True
) -> nn.Module:
    """The base with the adapter of one folder as the policy, and that of another, if any, as the frozen reference."""
    try:
        peft_model = PeftModel.from_pretrained(
            base, policy, adapter_name=POLICY, is_trainable=trains
        )
        if reference is not None:
            peft_model.load_adapter(reference, adapter_name=REFERENCE, is_trainable=False)
            peft_model.set_adapter(POLICY)
    except (RuntimeError, ValueError) as error:
        what = f"the adapter does not fit the base: {str(error).strip().splitlines()[-1].strip()}"
        raise TbpoError(
            what, str(policy), f"an adapter for {model.base}", "check model.base"
        ) from error
    return peft_model


def _with_adapter(peft_model: LanguageModel, model: Model, compute: torch.dtype) -> Policy:
    fuse_lora(peft_model)
    half = compute != torch.float32
    return Policy(peft_model, autocast=compute if model.quantization is not None and half else None)


def add_helper(
    policy: Policy,
    name: str,
    source: str,
    model: Model,
    device: torch.device,
    home: torch.device | None = None,
    key: str = "align.loss",
) -> None:
    """Puts another policy beside the policy, as the view `name`: an adapter on the shared base, or a model of its own.

    Args:
        source: a run directory, or the folder of an adapter or model, or a Hub repository.
        device, home: as of `load_policy`.
        key: of the recipe, that names it.

    Raises:
        TbpoError: if nothing is named, or it cannot be loaded.
    """
    if not source:
        raise TbpoError(
            f"the {name} helper is not named",
            f"[align.loss] {name}",
            "a run directory, an adapter or a model",
            'train it with `[align.loss] name = "dpo"`, the negative one with `[align] reverse = true` as well',
        )
    runs = [Path(source) / "align" / kind for kind in ("adapter", "model")]
    folder = str(next((run for run in runs if run.is_dir()), source))
    try:
        if policy.adapters and not (Path(folder) / "config.json").exists():
            policy.model.load_adapter(local_adapter(folder), adapter_name=name, is_trainable=False)
            policy.model.set_adapter(POLICY)
        else:
            helper = load_base(model, folder, home or device, compute_dtype(model, device))
            policy.frozen[name] = helper.requires_grad_(False)
    except (OSError, ValueError, RuntimeError) as error:  # the last one for weights of other shapes
        raise TbpoError(
            f"what {key} names cannot be loaded: {str(error).splitlines()[0]}",
            source,
            "an adapter for the same base, or a model with its vocabulary",
            f"check {key}",
        ) from error


def load_base(
    model: Model, folder_or_id: str, device: torch.device, dtype: torch.dtype | str
) -> LanguageModel:
    """A transformers causal language model, from safetensors only, or with random weights from its config."""
    attention = None if model.attention == "auto" else model.attention
    if trusted := model.trust_remote_code:
        console.say(
            f"WARNING: model.trust_remote_code = true: code from {folder_or_id} runs with your rights"
        )
    options: dict[str, Any] = {"revision": model.revision, "trust_remote_code": trusted}
    if model.quantization is not None:
        options |= {"quantization_config": _quantization(dtype, device), "device_map": {"": device}}
    try:
        config = AutoConfig.from_pretrained(
            folder_or_id, revision=model.revision, trust_remote_code=trusted
        )
        own_dtype = config.dtype
        if model.initial_weights == "random" and folder_or_id == model.base:
            loaded = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=trusted
            )
        else:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder_or_id,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                **options,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        fix = "check model.base (and model.revision), and that the Hub can be reached"
        if isinstance(error, ImportError):
            fix = 'install what is missing; if it is for attention: model.attention = "auto"'
        elif isinstance(error, SafetensorError):
            fix = "its weights are damaged: copy or download them again"
        elif "safetensors" in str(error):
            once = f"AutoModelForCausalLM.from_pretrained({folder_or_id!r}).save_pretrained('converted')"
            fix = f'convert it once: python -c "from transformers import AutoModelForCausalLM; {once}"'
        raise TbpoError(
            f"the model cannot be loaded: {str(error).splitlines()[0]}",
            f"model.base = {model.base!r}",
            "a folder with config.json and *.safetensors (pickles are not loaded), or the id of a Hub repository",
            fix,
        ) from error
    loaded.config.dtype = own_dtype  # what it is saved in
    fuse_norms(loaded)
    return loaded if model.quantization is not None else loaded.to(device)


def _quantization(dtype: torch.dtype | str, device: torch.device) -> BitsAndBytesConfig:
    key = 'model.quantization = "nf4"'
    if (
        device.type == "cpu"
    ):  # bitsandbytes has no gradients there once a layer was used for inference
        raise TbpoError(
            "4-bit weights need a GPU", key, "a CUDA device", "leave model.quantization out"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TbpoError(
            "4-bit weights need bitsandbytes, which is not installed",
            key,
            "the optional extra `quantization`",
            "pip install 'tbpo[quantization]'",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )


def compute_dtype(model: Model, device: torch.device) -> torch.dtype:
    """`model.dtype`; "auto" is bfloat16 on a GPU that has it, float32 elsewhere."""
    if model.dtype != "auto":
        return cast(torch.dtype, getattr(torch, model.dtype))
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_gpu else torch.float32


def local_adapter(source: str, key: str = "the adapter") -> Path:
    """The folder of an adapter, or that of "user/repo[@revision]" in the cache. Raises TbpoError if there is none."""
    from huggingface_hub import snapshot_download

    folder, (repo, _, revision) = Path(source), source.partition("@")
    files = ("adapter_config.json", "adapter_model.safetensors")
    try:
        if not folder.is_dir():
            folder = Path(
                snapshot_download(repo, revision=revision or None, allow_patterns=list(files))
            )
        if missing := [name for name in files if not (folder / name).exists()]:
            raise OSError(f"it has no {missing[0]}")
    except (OSError, ValueError) as error:
        what, where = (
            f"the adapter cannot be loaded: {str(error).splitlines()[0]}",
            f"{key} = {source!r}",
        )
        expected = f"a folder, or user/repo[@revision] on the Hub, with {' and '.join(files)} (a pickle is not loaded)"
        fix = "check it, and that the Hub can be reached; a whole model is named as model.base"
        raise TbpoError(what, where, expected, fix) from error
    return folder
