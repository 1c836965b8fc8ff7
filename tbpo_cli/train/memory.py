"""The memory and the floating-point operations of a training, from shapes alone."""

from __future__ import annotations

from typing import Literal

import psutil
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.benchmark import Timer

from tbpo_cli.config.recipe import Model, Training
from tbpo_cli.core.head import CHUNK_TOKENS
from tbpo_cli.model.attention import BY_SEQUENCE
from tbpo_cli.model.policy import Policy
from tbpo_cli.model.probes import attention_of, set_attention
from tbpo_cli.model.sharding import LanguageModel, backbone, causal_model

TOKENS_ON_CPU = 1024  # enough for the full speed of its matrix products; more only takes memory
MIN_TOKENS = 64  # of a micro-batch
MAX_TOKENS = 65536
PROBE_TOKENS = 8
TYPICAL = 20  # times the hidden size: what a layer of a Llama with LoRA saves for a token
NF4_BYTES = 0.516  # of a weight, with its part of the scales (arXiv 2305.14314)
MOMENTS = {"adamw": 2, "rmsprop": 1}  # numbers of an optimizer's state for each weight
# What is allocated beside the tensors that must be there, by tests/benchmarks/memory.py: bytes of
# Python and torch; (CHUNK_TOKENS, V) tensors of the head; times what one layer saves. Those for a
# GPU are a guess.
PEAKS = {"cpu": (0.51e9, 12, 5), "cuda": (0.0, 5, 3)}


def kept_bytes(model: LanguageModel, activation_checkpointing: bool) -> tuple[float, float]:
    """Bytes that all layers, and that one layer, save for the backward pass for each token.

    They are counted in a pass over tensors without numbers ("meta"); a quantized model makes it on
    its device. The weights must not be sharded yet.
    """
    causal = causal_model(model)
    kept: dict[int, torch.UntypedStorage] = {}
    config = causal.config.get_text_config()
    layers = config.num_hidden_layers
    width = config.hidden_size * causal.dtype.itemsize
    device = causal.device if getattr(causal, "quantization_method", None) else torch.device("meta")
    core = backbone(causal)
    own = (*core.named_parameters(), *core.named_buffers())
    twins = {name: each.to(device) for name, each in own}

    def count(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    before = attention_of(causal)
    # Rotary positions may note what they saw in a pass: all modules are put back as they were.
    attributes = [(module, dict(vars(module))) for module in causal.modules()]
    rows = {
        "input_ids": torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device),
        "use_cache": False,
    }
    causal.train()
    try:
        # Other implementations read the numbers of their masks.
        set_attention(causal, BY_SEQUENCE)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            functional_call(core, twins, (), rows)
        for twin in twins.values():
            kept.pop(twin.untyped_storage()._cdata, None)
        whole = sum(storage.nbytes() for storage in kept.values()) / PROBE_TOKENS
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
        # Its code reads numbers.
        whole = float(TYPICAL * layers * width)
    finally:
        set_attention(causal, before)
        for module, own_attributes in attributes:
            vars(module).clear()
            vars(module).update(own_attributes)
    one_layer = whole / layers
    return (one_layer + layers * width if activation_checkpointing else whole), one_layer


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
) -> bool:
    """Whether activations are computed again in the backward pass.

    Args:
        wanted: `activation_checkpointing` of the recipe; "auto": if the longest pair takes more
            than half of the memory that is left, as a micro-batch may.
        longest: tokens of the longest pair; 0: unknown, and taken for short.
        device, used: as of `memory_left`.
    """
    if wanted != "auto":
        return wanted
    if longest == 0:
        return False
    kept, _ = kept_bytes(model, False)
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
    again = needs_checkpointing(policy.model, wanted, bounds[0], device, weights + learning)
    kept, layer = kept_bytes(policy.model, again)
    limit = settings.max_tokens_per_device
    fit = limit if isinstance(limit, int) else tokens_that_fit(kept, device, weights)
    tokens = min(bounds[1], max(bounds[0], fit))
    vocab_size = policy.model.config.get_text_config().vocab_size
    parts = {
        "weights": weights,
        "gradients and moments": learning,
        "activations": tokens * (kept + in_flight * layer),
        "output head": fp32 * tiles * CHUNK_TOKENS * vocab_size,
        "python and its libraries": libraries,
    }
    return parts, tokens


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
