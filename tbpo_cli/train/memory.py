"""The memory and the floating-point operations of a training, from shapes alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Literal

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.fake_tensor import log as fake_tensor_log
from torch.func import functional_call
from torch.utils.benchmark import Timer

from tbpo_cli.config.recipe import Model, Training
from tbpo_cli.core.head import chunk_tokens
from tbpo_cli.model.attention import BY_SEQUENCE
from tbpo_cli.model.policy import Policy
from tbpo_cli.model.probes import attention_of, set_attention
from tbpo_cli.model.sharding import LanguageModel, backbone, causal_model

TOKENS_ON_CPU = 1024  # enough for the full speed of its matrix products; more only takes memory
MIN_TOKENS = 64  # of a micro-batch
MAX_TOKENS = 65536
PROBE_TOKENS = 8
FAKE = torch.device("cpu")  # of tensors that have no numbers
# What a pass over tensors without numbers raises where a model's code reads numbers.
UNKNOWN = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
TYPICAL = 20  # times the hidden size: what a layer of a Llama with LoRA saves for a token
NF4_BYTES = 0.516  # of a weight, with its part of the scales (arXiv 2305.14314)
MOMENTS = {"adamw": 2, "rmsprop": 1}  # numbers of an optimizer's state for each weight
# What is allocated beside the tensors that must be there, by tests/benchmarks/memory.py: bytes of
# Python and torch, or CUDA's context and workspaces; (`chunk_tokens`, V) tensors of the head; times
# what one layer saves. Those for a GPU are a guess.
PEAKS = {"cpu": (0.51e9, 12, 5), "cuda": (0.6e9, 5, 3)}


def kept_bytes(
    model: LanguageModel, activation_checkpointing: bool, autocast: torch.dtype | None = None
) -> tuple[float, float]:
    """Bytes that all layers, and that one layer, save for the backward pass for each token.

    They are counted in two passes over tensors without numbers, of which one has more tokens: what
    both save alike, as autocast's copies of the weights, does not count. A quantized model makes
    them on its device. The weights must not be sharded yet.

    Args:
        autocast: the dtype of matrix products, if it is not that of the weights.
    """
    causal = causal_model(model)
    config = causal.config.get_text_config()
    layers = config.num_hidden_layers
    width = config.hidden_size * causal.dtype.itemsize
    whole = float(TYPICAL * layers * width)  # where its code reads numbers
    quantized = getattr(causal, "quantization_method", None) is not None
    for device in (causal.device,) if quantized else (FAKE, torch.device("meta")):
        with suppress(*UNKNOWN):
            few, many = (_saved(causal, n * PROBE_TOKENS, device, autocast) for n in (1, 2))
            whole = (many - few) / PROBE_TOKENS
            break
    one_layer = whole / layers
    return (one_layer + layers * width if activation_checkpointing else whole), one_layer


def _saved(
    causal: LanguageModel, num_tokens: int, device: torch.device, autocast: torch.dtype | None
) -> float:
    """Bytes that a pass over some tokens saves beside the model's own tensors.

    Args:
        device: FAKE for torch's fake tensors, which take the kernels of the CPU and know autocast;
            "meta" has other kernels, and no autocast.
    """
    kept: dict[int, torch.UntypedStorage] = {}
    is_fake = device == FAKE
    core = backbone(causal)
    own = {**dict(core.named_parameters()), **dict(core.named_buffers())}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    def twin(tensor: Tensor) -> Tensor:
        if not is_fake:
            return tensor.to(device)
        return torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)

    before = attention_of(causal)
    # Rotary positions may note what they saw in a pass: all modules are put back as they were.
    attributes = [(module, dict(vars(module))) for module in causal.modules()]
    causal.train()
    try:
        # Other implementations read the numbers of their masks.
        set_attention(causal, BY_SEQUENCE)
        with (
            silent(fake_tensor_log),
            FakeTensorMode(allow_non_fake_inputs=True) if is_fake else nullcontext(),
        ):
            twins = {name: twin(each) for name, each in own.items()}
            rows = {
                "input_ids": torch.zeros(1, num_tokens, dtype=torch.long, device=device),
                "use_cache": False,
            }
            hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
            with hooks, torch.autocast("cpu", autocast, enabled=is_fake and autocast is not None):
                functional_call(core, twins, (), rows)
        for each in twins.values():
            kept.pop(each.untyped_storage()._cdata, None)
        return float(sum(storage.nbytes() for storage in kept.values()))
    finally:
        set_attention(causal, before)
        for module, own_attributes in attributes:
            vars(module).clear()
            vars(module).update(own_attributes)


@contextmanager
def silent(log: logging.Logger) -> Iterator[None]:
    """Without a logger's lines: a pass that fails is done on another device, as `_saved` is."""
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def bytes_of_weights(policy: Policy) -> int:
    """Bytes of the weights of the policy and of the models that it is compared with."""
    weights = (weight for model in policy.models for weight in model.parameters())
    return sum(weight.numel() * weight.element_size() for weight in weights)


def bytes_of_learning(policy: Policy, settings: Training) -> float:
    """Bytes of the gradients and the optimizer's moments of all trained weights, in fp32."""
    trained = sum(weight.numel() for weight in policy.trained.values())
    return 4.0 * (1 + MOMENTS[settings.optimizer]) * trained


def needs_checkpointing(
    model: LanguageModel,
    wanted: bool | Literal["auto"],
    longest: int,
    device: torch.device,
    used: float | None = None,
    autocast: torch.dtype | None = None,
) -> bool:
    """Whether activations are computed again in the backward pass.

    Args:
        wanted: `activation_checkpointing` of the recipe; "auto": if the longest pair takes more
            than half of the memory that is left, as a micro-batch may.
        longest: tokens of the longest pair; 0: unknown, and taken for short.
        device, used: as of `memory_left`.
        autocast: as of `kept_bytes`.
    """
    if wanted != "auto":
        return wanted
    if longest == 0:
        return False
    kept, _ = kept_bytes(model, False, autocast)
    return longest * kept > memory_left(device, used) / 2


def tokens_that_fit(kept: float, device: torch.device, used: float | None = None) -> int:
    """Tokens of the first micro-batch, a power of two: they fill half of the memory that is left.

    It depends on the model and the device, not on what else runs there.

    Args:
        kept: bytes that each token takes.
        device: where the training runs.
        used: bytes of the device's memory that are taken; None: those that are allocated now.
    """
    if device.type != "cuda":
        return TOKENS_ON_CPU
    tokens = int(memory_left(device, used) / 2 / kept)
    return min(MAX_TOKENS, max(MIN_TOKENS, int(2 ** (tokens.bit_length() - 1))))


def memory_left(device: torch.device, used: float | None = None) -> float:
    """Bytes of a device's memory without those that this process uses.

    Args:
        used: bytes that are taken; None: those that this process has allocated.
    """
    if used is None and device.type == "cuda":
        used = torch.cuda.memory_allocated(device)
    elif used is None:
        used = psutil.Process().memory_info().rss
    return device_memory(device) - used


def device_memory(device: torch.device) -> int:
    """Bytes of a device's memory."""
    on_gpu = device.type == "cuda"
    return int(
        torch.cuda.get_device_properties(device).total_memory
        if on_gpu
        else psutil.virtual_memory().total
    )


def estimate_memory(
    policy: Policy,
    model: Model,
    settings: Training,
    device: torch.device,
    processes: int,
    bounds: tuple[int, int],
) -> tuple[dict[str, float], int]:
    """What one process allocates at its peak.

    Args:
        policy: with the reference and the helpers; of shapes ("meta"), or as it will be trained.
        model: the recipe's table.
        settings: of the training.
        device: where it runs.
        processes: over which the weights are sharded; 1: each has all of them.
        bounds: tokens of the longest pair, and of the longest step.

    Returns:
        Bytes by what they are for, and the tokens of the largest micro-batch.
    """
    libraries, tiles, in_flight = PEAKS[device.type]
    trained = {id(weight): weight.numel() for weight in policy.trained.values()}
    ends = (policy.model.get_input_embeddings(), policy.model.get_output_embeddings())
    weights = 0.0
    never_quantized = {*trained, *(id(end.weight) for end in ends)}
    for p in (p for each in policy.models for p in each.parameters()):
        is_quantized = model.quantization and p.ndim == 2 and id(p) not in never_quantized
        weights += p.numel() * (NF4_BYTES if is_quantized else p.element_size()) / processes
    fp32 = 4.0
    learning = bytes_of_learning(policy, settings) / processes
    wanted = settings.activation_checkpointing
    used = weights + learning
    autocast = policy.autocast
    again = needs_checkpointing(policy.model, wanted, bounds[0], device, used, autocast)
    kept, layer = kept_bytes(policy.model, again, autocast)
    limit = settings.max_tokens_per_device
    fit = limit if isinstance(limit, int) else tokens_that_fit(kept, device, weights)
    tokens = min(bounds[1], max(bounds[0], fit))
    vocab_size = policy.model.config.get_text_config().vocab_size
    chunk = chunk_tokens(id(ends[1].weight) in trained, device.type)
    parts = {
        "weights": weights,
        "gradients and moments": learning,
        "copies of weights": _copies(policy, processes),
        "activations": tokens * (kept + in_flight * layer),
        "output head": fp32 * tiles * chunk * vocab_size,
        "CUDA" if device.type == "cuda" else "python and its libraries": libraries,
    }
    copy = learning  # of weights instead of gradients, and the moments: see CheckpointWriter
    if device.type == "cpu" and copy <= memory_left(device, sum(parts.values())) / 2:
        parts["copy for checkpoints"] = copy
    return parts, tokens


def _copies(policy: Policy, processes: int) -> float:
    """Bytes of weights that a step has besides: what autocast or a gathering copies.

    1. A step keeps a copy, in the dtype of its products, of each matrix that is trained: that of
       autocast, or of `cast_once`.
    2. Sharded weights are gathered instead: the heads of policy and reference, which a step reads
       in chunks, and one layer.
    3. The gradient of a head that is trained is made beside that of the micro-batch before.
    """
    models = policy.models
    autocast = policy.autocast
    itemsize = autocast.itemsize if autocast else policy.model.dtype.itemsize
    head = policy.model.get_output_embeddings()
    ends = {id(head.weight), id(policy.model.get_input_embeddings().weight)}
    trained = (weight for weight in policy.trained.values() if id(weight) not in ends)
    matrices = [weight.numel() for weight in trained if weight.ndim == 2]
    head_size = head.weight.numel()
    if processes > 1:
        num_layers = policy.model.config.get_text_config().num_hidden_layers
        body = sum(weight.numel() for weight in policy.model.parameters()) - head_size
        size = itemsize * (head_size * len(models) + body / num_layers)
    else:
        size = itemsize * sum(matrices) if autocast or policy.adapters else 0.0
    is_trained = any(weight is head.weight for weight in policy.trained.values())
    return float(size + (4.0 * head_size if is_trained else 0.0))


def operations(policy: Policy, activation_checkpointing: bool) -> float:
    """Floating-point operations of training on one token.

    These are the products with the weights, also with those of the frozen models.
    """
    embeddings: int = policy.model.get_input_embeddings().weight.numel()
    weights: int = sum(p.numel() for p in policy.model.parameters()) - embeddings
    return 2.0 * weights * (3 + len(policy.frozen) + activation_checkpointing)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of this device, from half a second of matrix products."""
    size = 8192 if device.type == "cuda" else 1024
    square = torch.ones(size, size, device=device, dtype=dtype)
    timer = Timer(
        "square @ square", globals={"square": square}, num_threads=torch.get_num_threads()
    )
    return float(2 * size**3 / timer.blocked_autorange(min_run_time=0.5).median)
