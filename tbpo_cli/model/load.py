"""The policy and its reference, from a recipe."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tbpo_cli.errors import TbpoError
from tbpo_cli.recipe import Model, Recipe

POLICY = "default"  # peft's own name for a first adapter: what is saved loads without naming it
REFERENCE = "reference"


@dataclass(frozen=True)
class Policy:
    """The model that is trained, and how to see its reference.

    Args:
        model: the transformers model; peft has put LoRA layers into it if the recipe has [model.lora].
        frozen: a frozen copy of the model as it was before training, for full fine-tuning with a reference.
        sft_adapter: the folder of the adapter that both sides start from.

    The reference is, in this order: the frozen copy; the frozen SFT adapter on the shared base; the base itself, with
    the adapter off.
    """

    model: nn.Module
    frozen: nn.Module | None = None
    sft_adapter: Path | None = None

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def has_reference(self) -> bool:
        return self.frozen is not None or hasattr(self.model, "peft_config")

    @contextlib.contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The reference model, in evaluation mode (no dropout) and without gradients, for the time of the context."""
        model = self.frozen or self.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self._reference_weights():
                yield model
        finally:
            model.train(was_training)

    def _reference_weights(self) -> contextlib.AbstractContextManager[None]:
        if self.frozen is not None:
            return contextlib.nullcontext()
        return self._reference_adapter() if self.sft_adapter is not None else self.model.disable_adapter()

    @contextlib.contextmanager
    def _reference_adapter(self) -> Iterator[None]:
        self.model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield
        finally:
            self.model.set_adapter(POLICY)

    def describe_reference(self) -> str:
        if self.frozen is not None:
            return "a frozen copy of the model"
        return f"the SFT adapter {self.sft_adapter}" if self.sft_adapter is not None else "the base (adapter off)"

    def save(self, folder: Path) -> list[Path]:
        """Writes what was trained: the adapter alone, or the whole model in the base's own dtype; returns the files."""
        if hasattr(self.model, "peft_config"):
            self.model.save_pretrained(folder, selected_adapters=[POLICY])
        else:
            state = {k: v.to(self.model.config.dtype or v.dtype) for k, v in self.model.state_dict().items()}
            self.model.save_pretrained(folder, state_dict=state)
        return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")


def load_policy(recipe: Recipe, device: torch.device, sft_output: Path | None, with_reference: bool) -> Policy:
    """The policy in its starting state.

    Args:
        sft_output: `sft/adapter` or `sft/model` of this run, if an SFT stage came before.
        with_reference: whether the loss, or the evaluation, compares with a reference.

    Raises:
        TbpoError: if the base cannot be loaded, or LoRA finds no layers.
    """
    lora = recipe.model.lora
    base_folder = str(sft_output) if lora is None and sft_output is not None else recipe.model.base
    torch.manual_seed(recipe.run.seed)  # random weights and LoRA's start are functions of the seed
    model = load_base(recipe.model, base_folder, device)
    if lora is None:
        frozen = copy.deepcopy(model).requires_grad_(False).eval() if with_reference else None
        return Policy(model, frozen)

    from peft import LoraConfig, PeftModel, get_peft_model

    if sft_output is not None:
        peft_model = PeftModel.from_pretrained(model, sft_output, adapter_name=POLICY, is_trainable=True)
        peft_model.load_adapter(sft_output, adapter_name=REFERENCE, is_trainable=False)
        peft_model.set_adapter(POLICY)
        return Policy(peft_model, sft_adapter=sft_output)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=recipe.model.base,
        revision=recipe.model.revision,
    )
    try:
        return Policy(get_peft_model(model, config))
    except ValueError as error:
        raise TbpoError(
            f"the adapter does not fit the model: {error}",
            "[model.lora] target_modules",
            'names of linear layers of the model, or "all-linear"',
            'target_modules = "all-linear"',
        ) from error


def load_base(model: Model, folder_or_id: str, device: torch.device) -> nn.Module:
    """A transformers causal language model, from safetensors only, or with random weights from its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    attention = None if model.attention == "auto" else model.attention
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        if model.initial_weights == "random" and folder_or_id == model.base:
            config = AutoConfig.from_pretrained(folder_or_id, **options)
            loaded = AutoModelForCausalLM.from_config(
                config, dtype=compute_dtype(model, device), attn_implementation=attention
            )
            loaded.config.dtype = config.dtype
        else:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder_or_id,
                dtype=compute_dtype(model, device),
                attn_implementation=attention,
                use_safetensors=True,
                **options,
            )
            loaded.config.dtype = AutoConfig.from_pretrained(folder_or_id, **options).dtype
    except (OSError, ValueError) as error:
        raise TbpoError(
            f"the model cannot be loaded: {str(error).splitlines()[0]}",
            f"model.base = {model.base!r}",
            "a folder with config.json and *.safetensors, or the id of a Hub repository",
            "check model.base (and model.revision), and that the Hub can be reached",
        ) from error
    loaded.config.use_cache = False
    return loaded.to(device)


def compute_dtype(model: Model, device: torch.device) -> torch.dtype:
    """`model.dtype`; "auto" is bfloat16 on a GPU that has it, float32 elsewhere."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_gpu else torch.float32
