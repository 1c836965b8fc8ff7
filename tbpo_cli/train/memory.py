"""What a training takes of a device: memory, from shapes alone, and floating-point operations."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.benchmark import Timer

from tbpo_cli.config.recipe import Model, Training
from tbpo_cli.core.head import CHUNK_TOKENS
from tbpo_cli.model.attention import BY_SEQUENCE
from tbpo_cli.model.policy import Policy
from tbpo_cli.model.sharding import LanguageModel, backbone, causal_model

TOKENS_ON_CPU = 1024  # enough for the full speed of its matrix products; more only takes memory
LEAST_TOKENS, MOST_TOKENS, PROBE_TOKENS = 64, 65536, 8
TYPICAL = 20  # times the hidden size: what a layer of a Llama with LoRA keeps of a token
NF4_BYTES = 0.516  # of a weight, with its part of the scales (arXiv 2305.14314)
MOMENTS = {"adamw": 2, "rmsprop": 1}  # numbers that an optimizer keeps of a weight
# Beside the tensors that must be there, in use or freed and not reused, as tests/benchmarks/memory.py measures it:
# bytes of python and torch; (CHUNK_TOKENS, V) tensors of the head; times what one layer keeps. The GPU's are a guess.
PEAKS = {"cpu": (0.51e9, 12, 5), "cuda": (0.0, 5, 3)}


def kept_bytes(model: LanguageModel, activation_checkpointing: bool) -> tuple[float, float]:
    """Bytes that all layers, and that one layer, keep of a token for the backward pass; before weights are sharded.

    They are counted in a pass without numbers ("meta"); a quantized model makes it on its device.
    """
    causal = causal_model(model)
    kept: dict[int, torch.UntypedStorage] = {}
    core = backbone(causal)
    config = causal.config.get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size * causal.dtype.itemsize
    device = causal.device if getattr(causal, "quantization_method", None) else torch.device("meta")
    own = (*core.named_parameters(), *core.named_buffers())
    twins = {name: each.to(device) for name, each in own}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    before = causal.config._attn_implementation
    rows = {
        "input_ids": torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device),
        "use_cache": False,
    }
    # Some layers note numbers of the pass (rotary positions do): all are put back as they were.
    attributes = [(module, dict(vars(module))) for module in causal.modules()]
    causal.train()
    try:
        causal.set_attn_implementation(BY_SEQUENCE)  # the others look at the numbers of their masks
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            functional_call(core, twins, (), rows)
        for twin in twins.values():
            kept.pop(twin.untyped_storage()._cdata, None)
        whole = sum(storage.nbytes() for storage in kept.values()) / PROBE_TOKENS
    except (
        RuntimeError,
        TypeError,
        ValueError,
        NotImplementedError,
        AttributeError,
        IndexError,
        KeyError,
    ):  # its code asks for numbers
        whole = float(TYPICAL * layers * width)
    finally:
        causal.set_attn_implementation(before)
        for module, kept_attributes in attributes:
            vars(module).clear()
            vars(module).update(kept_attributes)
    return (whole / layers + layers * width if activation_checkpointing else whole), whole / layers


def tokens_that_fit(kept: float, device: torch.device, used: float | None = None) -> int:
    """Tokens of a first micro-batch: a power of two that depends on model and device, not on what else runs there.

    Those that keep `kept` bytes each get a half of what is left of the device's memory; `used` bytes are taken, or as
    many as now.
    """
    if device.type != "cuda":
        return TOKENS_ON_CPU
    used = torch.cuda.memory_allocated(device) if used is None else used
    tokens = int((room(device) - used) / 2 / kept)
    return min(MOST_TOKENS, max(LEAST_TOKENS, int(2 ** (tokens.bit_length() - 1))))


def room(device: torch.device) -> int:
    """Bytes of a device's memory."""
    on_gpu = device.type == "cuda"
    return int(
        torch.cuda.get_device_properties(device).total_memory
        if on_gpu
        else psutil.virtual_memory().total
    )


def foresee(
    policy: Policy,
    model: Model,
    settings: Training,
    device: torch.device,
    processes: int,
    bounds: tuple[int, int],
) -> tuple[dict[str, float], int]:
    """Bytes that one process takes at its peak, by what takes them; and the tokens of its largest micro-batch.

    Args:
        policy: with the reference and the helpers; of shapes ("meta"), or as it will be trained.
        processes: that share the weights out; 1: each has all of them.
        bounds: tokens of the longest pair, and of the longest step.
    """
    libraries, tiles, in_flight = PEAKS[device.type]
    trained = {id(weight): weight.numel() for weight in policy.trained.values()}
    ends = (policy.model.get_input_embeddings(), policy.model.get_output_embeddings())
    weights = 0.0
    for p in (p for each in (policy.model, *policy.frozen.values()) for p in each.parameters()):
        in_4_bits = (
            model.quantization
            and p.ndim == 2
            and id(p) not in {*trained, *(id(end.weight) for end in ends)}
        )
        weights += p.numel() * (NF4_BYTES if in_4_bits else p.element_size()) / processes
    kept, layer = kept_bytes(policy.model, settings.activation_checkpointing)
    wanted = settings.max_tokens_per_device
    fit = wanted if isinstance(wanted, int) else tokens_that_fit(kept, device, weights)
    tokens = min(bounds[1], max(bounds[0], fit))
    return {
        "weights": weights,
        "gradients and moments": 4.0
        * sum(trained.values())
        * (1 + MOMENTS[settings.optimizer])
        / processes,
        "activations": tokens * (kept + in_flight * layer),
        "output head": 4.0
        * tiles
        * CHUNK_TOKENS
        * policy.model.config.get_text_config().vocab_size,
        "python and its libraries": libraries,
    }, tokens


def operations(policy: Policy, activation_checkpointing: bool) -> float:
    """Floating-point operations of training on one token: products with the weights, also of the frozen models."""
    embeddings: int = policy.model.get_input_embeddings().weight.numel()
    weights: int = sum(p.numel() for p in policy.model.parameters()) - embeddings
    return 2.0 * weights * (3 + len(policy.frozen) + activation_checkpointing)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of this device in matrix products, timed for half a second."""
    size = 8192 if device.type == "cuda" else 1024
    square = torch.ones(size, size, device=device, dtype=dtype)
    timer = Timer(
        "square @ square", globals={"square": square}, num_threads=torch.get_num_threads()
    )
    return float(2 * size**3 / timer.blocked_autorange(min_run_time=0.5).median)
