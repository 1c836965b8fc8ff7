"""A device that is not there: tensors with shapes, types and devices, and without numbers.

An operation that mixes it with the CPU is an error, as on a GPU. (torch pretends a CUDA device
where it is built for CUDA alone: here it is a device that torch's Python backends may register.)
A process that has it takes it for its accelerator, so that it is for processes of their own; they
import this module.
"""

from dataclasses import replace

import torch
from one_step import collated, make_pairs, make_scorer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tbpo_cli.core import StateBaseline, build_loss
from tbpo_cli.model.dropout import use_token_dropout
from tbpo_cli.model.layout import apply_layout
from tbpo_cli.model.scoring import Scorer
from tbpo_cli.train.metrics import measure, pair_weights

NAME = "pretended"
# On the device autocast may be on, and casts nothing.
_AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")


class _Backend:
    """What torch asks of a device's module."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


def the_device():
    """The device; registered in this process at the first call."""
    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME, _Backend)
        _AUTOCAST.fallback(torch.library.fallthrough_kernel)
    return torch.device(NAME, 0)


def moved(module, device):
    """Puts a module's tensors on the device, in place; tied weights stay tied."""
    known = {}
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    twin = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, torch.nn.Parameter):
                        twin = torch.nn.Parameter(twin, tensor.requires_grad)
                    known[id(tensor)] = twin
                tensors[name] = known[id(tensor)]
    return module


def moved_scorer(scorer, device):
    """A scorer whose models, heads and baseline are on the device."""
    policy = scorer.policy
    for model in policy.models:
        moved(model, device)
    own = {
        view: policy.frozen.get(view, policy.model).get_output_embeddings().weight
        for view in scorer.heads
    }
    known = {}
    heads = {}
    for view, head in scorer.heads.items():
        weight = own[view]
        heads[view] = known.setdefault(id(weight), replace(head, weight=weight))
    baseline = scorer.baseline and moved(scorer.baseline, device)
    return Scorer(policy, heads, baseline)


class Transfers(TorchDispatchMode):
    """Counts the operations that take a tensor from the CPU to the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            {each.device.type for each in tree_leaves(of) if isinstance(each, torch.Tensor)}
            for of in ((args, kwargs), result)
        )
        self.count += "cpu" in given and NAME in made
        return result


def transfers(recipe):
    """(transfers of a batch with log π_ref of its tokens, those of its scores and their loss)."""
    loss, device = build_loss("dpo"), the_device()
    scorer = make_scorer(recipe, loss, "adapter", "float32", "cpu")
    apply_layout(scorer.policy.models, "shared_prompt")
    on_cpu = collated(make_pairs(300), loss, "shared_prompt", "cpu")
    on_cpu = replace(on_cpu, reference_logps=torch.zeros(len(on_cpu.tokens)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = moved_scorer(scorer, device)
        with Transfers() as of_batch:
            batch = on_cpu.to(device)
        with Transfers() as of_scores:
            loss(fake.score(batch, loss.needs, batch.reference_logps)).per_pair.sum().backward()
    return of_batch.count, of_scores.count


def step(recipe, name, trained, dtype, layout, left_behind=""):
    """Forward, loss, metrics, backward and optimizer, without diagnostics and with them.

    Args:
        left_behind: what stays on the CPU: "batch", "baseline" or "weight".

    Returns:
        The error that was raised, in words; "" for none.
    """
    loss, device = build_loss(name), the_device()
    scorer = make_scorer(recipe, loss, trained, dtype, "cpu")
    policy = scorer.policy
    apply_layout(policy.models, layout)
    token_keys = use_token_dropout(policy.model)
    on_cpu = collated(make_pairs(300), loss, layout, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = moved_scorer(scorer, device)
        batch = on_cpu.to(device)
        if left_behind == "batch":
            batch = replace(batch, tokens=torch.zeros_like(on_cpu.tokens))
        if left_behind == "weight":
            layer = policy.model.get_input_embeddings()
            weight = torch.zeros(layer.weight.shape)
            layer._parameters["weight"] = torch.nn.Parameter(weight, False)
        if left_behind == "baseline":
            fake = replace(fake, baseline=StateBaseline(32))
        if token_keys is not None:
            token_keys.set(batch.token_keys, 0, 1)
        optimizer = torch.optim.AdamW(policy.trained.values())
        policy.train()
        try:
            for score in (fake.score, fake.score_and_measure):
                scores = score(batch, loss.needs)
                output = loss(scores)
                totals = measure(scores, output, loss)
                (output.per_pair * pair_weights(scores, loss)).sum().backward()
                norm = torch.nn.utils.clip_grad_norm_(policy.trained.values(), 1.0)
                optimizer.step()
        except RuntimeError as error:
            return str(error)
        tensors = [norm, *(value for value, _ in totals.values())]
        tensors += [weight.grad for weight in policy.trained.values()]
        elsewhere = {str(each.device) for each in tensors} - {str(device)}
        return f"on {elsewhere}" if elsewhere else ""
