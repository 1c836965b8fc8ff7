"""The policy, and the frozen models beside it."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from tbpo_cli.model.fused import Siblings
from tbpo_cli.model.sharding import LanguageModel, causal_model, gather_all, save_gathered

# The policy's adapter has peft's own name for a first one, so that what is saved loads anywhere.
POLICY = "default"
REFERENCE = "reference"
POSITIVE = "positive"
NEGATIVE = "negative"
GUIDE = "guide"


@dataclass(frozen=True)
class Policy:
    """The model that is trained, and the frozen models that it is compared with.

    A view is one of these models by its name: a whole model in `frozen`; else the adapter of that
    name on the shared base; else the base itself, with the adapters off.

    Args:
        model: the transformers model; peft's around it if the recipe has [model.lora].
        frozen: whole models, by the name of their view.
        autocast: the dtype of matrix products where the weights are kept in a wider one; None: the
            dtype of the weights.
        fused: LoRA layers that are computed in groups.
    """

    model: LanguageModel
    frozen: dict[str, LanguageModel] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    fused: Sequence[Siblings] = ()

    @property
    def adapters(self) -> dict[str, PeftConfig]:
        """The adapters in the model, by name; empty where all weights are trained."""
        return getattr(self.model, "peft_config", {})

    @property
    def models(self) -> list[LanguageModel]:
        """The model that is trained, then the frozen ones."""
        return [self.model, *self.frozen.values()]

    @property
    def views(self) -> list[str]:
        """The names of all models: the policy, the reference if there is one, and the helpers."""
        base = [REFERENCE] if self.has_reference else []
        return list(dict.fromkeys([POLICY, *base, *self.adapters, *self.frozen]))

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference to compare with."""
        return bool(self.adapters) or REFERENCE in self.frozen

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds a part of the weights: all then run the same passes at once."""
        return isinstance(next(self.model.parameters()), DTensor)

    @property
    def num_parts(self) -> int:
        """Into how many parts the weights are divided; 1: this process has all of them."""
        weight = next(self.model.parameters())
        if not isinstance(weight, DTensor):
            return 1
        return weight.device_mesh.size(weight.device_mesh.ndim - 1)

    def train(self) -> None:
        """Turns the adapters' dropout and the activation checkpointing on, and nothing else.

        The base's own dropout, and the noise that some routers add in training, stay off: the
        policy is then the reference plus what was trained, and a loss starts where it should.
        """
        for module in self._in_training:
            module.training = True

    @functools.cached_property
    def _in_training(self) -> list[nn.Module]:
        """What `train` turns on; made at the first call, when no module is put in any more.

        A pass over all modules, as by `Module.eval`, takes the host as long as a layer's pass.
        """
        self.model.eval()
        return [
            module
            for name, module in self.model.named_modules()
            if ".lora_dropout." in name or isinstance(module, GradientCheckpointingLayer)
        ]

    @functools.cached_property
    def _adapted(self) -> list[Any]:
        """peft's layers, each of which has the adapters' weights."""
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        return [module for module in self.model.modules() if isinstance(module, kinds)]

    @contextlib.contextmanager
    def view(self, name: str) -> Iterator[LanguageModel]:
        """A model in evaluation mode (no dropout) and without gradients, within the context."""
        model: LanguageModel = self.frozen.get(name, self.model)
        is_known = model is self.model and "_in_training" in vars(self)
        modules = self._in_training if is_known else model.modules()
        in_training = [module for module in modules if module.training]
        for module in in_training:
            module.training = False
        try:
            with torch.no_grad(), self._weights(name):
                yield model
        finally:
            for module in in_training:
                module.training = True

    @contextlib.contextmanager
    def _weights(self, name: str) -> Iterator[None]:
        """The adapters as a view has them, within the context.

        What peft's `disable_adapter` and `set_adapter` set in its layers, and not what they set
        besides: whether weights have gradients, which none have here.
        """
        if name in self.frozen or name == POLICY:
            yield
            return
        key, value = (
            ("_active_adapter", name) if name in self.adapters else ("_disable_adapters", True)
        )
        before = [getattr(layer, key) for layer in self._adapted]  # some have the class's value
        for layer in self._adapted:
            vars(layer)[key] = value
        try:
            yield
        finally:
            for layer, own in zip(self._adapted, before, strict=True):
                vars(layer)[key] = own

    def describe_reference(self) -> str:
        """Which model the reference is, in words."""
        if REFERENCE in self.frozen:
            return "a frozen model beside the policy"
        if REFERENCE in self.adapters:
            return "a frozen adapter beside the policy's, on the same base"
        return "the base, with the adapter off"

    def save(self, folder: Path, writes: bool = True, end_ids: Sequence[int] = ()) -> list[Path]:
        """Writes what was trained: the adapter, or the whole model in the dtype of the base.

        Args:
            writes: whether this process writes. Where weights are sharded the other processes take
                part, to give their parts.
            end_ids: the tokens at which generation is to stop, for generation_config.json.

        Returns:
            The files.
        """
        converts = getattr(self.model, "_weight_conversions", None) != []
        if self.is_sharded and not self.adapters and not converts:
            self._save_sharded(folder, writes)
        else:
            self._save_at_once(folder, writes)
        if not writes:
            return []
        generation_config(causal_model(self.model), end_ids).save_pretrained(folder)
        files = (path for path in folder.rglob("*") if path.is_file())
        return sorted(path for path in files if path.name != "README.md")

    def _save_sharded(self, folder: Path, writes: bool) -> None:
        """Writes weights that stand in the files as they are in the model, and the config."""
        config = self.model.config
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            config.architectures = [type(self.model).__name__.removeprefix("FSDP")]
            with published_config(self.model):
                config.save_pretrained(folder)
        save_gathered(self.model, folder, config.dtype or torch.float32, writes)

    def _save_at_once(self, folder: Path, writes: bool) -> None:
        """Writes an adapter, or a model whose weights transformers converts as it saves them."""
        state = self.model.state_dict(keep_vars=True)
        if self.adapters:  # tied weights by each of their names, for which peft asks
            state = {name: tensor for name, tensor in state.items() if tensor.requires_grad}
        state = gather_all(state, writes)
        if not writes:
            return
        if self.adapters:
            config = self.adapters[POLICY]
            for name, value in vars(config).items():
                if isinstance(value, set):  # its order differs from process to process
                    setattr(config, name, sorted(value))
            self.model.save_pretrained(folder, selected_adapters=[POLICY], state_dict=state)
        else:
            dtype = self.model.config.dtype
            with published_config(self.model):
                self.model.save_pretrained(folder, state_dict=cast_state(state, dtype))
                self.model.config.dtype = dtype  # save_pretrained sets the dtype of the weights
                self.model.config.save_pretrained(folder)


def cast_state(state: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors in another dtype; those that are tied, one tensor with two names, stay tied."""
    cast: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in cast:
            cast[id(tensor)] = tensor.to(dtype or tensor.dtype)
    return {name: cast[id(tensor)] for name, tensor in state.items()}


@contextlib.contextmanager
def published_config(causal: LanguageModel) -> Iterator[None]:
    """The base's config with the outputs that it was published with, within the context."""
    outputs = getattr(causal, "published_outputs", ())
    for config, name in outputs:
        setattr(config, name, True)
    try:
        yield
    finally:
        for config, name in outputs:
            setattr(config, name, False)


def generation_config(causal: LanguageModel, end_ids: Sequence[int]) -> GenerationConfig:
    """The base's own generation config, as it was published, which stops at some tokens as well."""
    published = getattr(causal, "published_generation_config", None) or causal.generation_config
    config = copy.deepcopy(published or GenerationConfig())
    own = config.eos_token_id
    own_ids = own if isinstance(own, list) else [own] * (own is not None)
    if ids := list(dict.fromkeys([*end_ids, *own_ids])):
        config.eos_token_id = ids if len(ids) > 1 else ids[0]
    try:
        config.validate(strict=True)
    except ValueError:  # the base's own file contradicts itself: only its tokens are kept
        config = special_tokens_of(config)
    return config


def special_tokens_of(config: GenerationConfig) -> GenerationConfig:
    """A generation config with the special tokens of another one, and defaults for the rest."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    kept = {name: getattr(config, name, None) for name in names}
    return GenerationConfig(**{name: value for name, value in kept.items() if value is not None})
