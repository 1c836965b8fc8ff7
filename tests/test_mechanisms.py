"""What a training claims to do is observed: kernels, dtypes, bytes, passes, waits."""

import functools
import json
from collections import Counter
from dataclasses import replace

import pytest
import tomli_w
import torch
from conftest import preference_rows, run_stage, write_jsonl
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tbpo_cli.batch.batches import collate_all
from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.data.store import PairStore
from tbpo_cli.model.load import load_policy
from tbpo_cli.train import loop
from tbpo_cli.train.memory import bytes_of_learning, kept_bytes
from tbpo_cli.train.run import TrainingRun

CPU = torch.device("cpu")
NUM_PAIRS = 8


class Operations(TorchDispatchMode):
    """Counts the operations of the thread by their name, and the matrix products by their dtype."""

    PRODUCTS = ("mm", "addmm", "addmm_", "bmm")
    READS = ("_local_scalar_dense", "item", "nonzero")  # a GPU would have to finish its work first

    def __init__(self):
        super().__init__()
        self.names = Counter()
        self.dtypes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.names[name] += 1
        if name in self.PRODUCTS:
            self.dtypes[result.dtype] += 1
        return result

    @property
    def num_reads(self):
        return sum(self.names[name] for name in self.READS)


class Functions(TorchFunctionMode):
    """Counts the calls of torch's functions by name: on a CPU, rms_norm is several operations."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names[getattr(function, "__name__", "")] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def make_run(tmp_path, base):
    """Makes a TrainingRun over NUM_PAIRS pairs from the tables of a recipe."""

    def make(name, model=(), **align):
        folder = tmp_path / name
        folder.mkdir()
        recipe = {
            "model": {"base": str(base), **dict(model)},
            "data": {
                "train": str(write_jsonl(folder / "rows.jsonl", preference_rows(NUM_PAIRS))),
                "eval_fraction": 0.0,
            },
            "align": {"batch_pairs": NUM_PAIRS, "max_steps": 1, "log_every": 1000, **align},
        }
        path = folder / "recipe.toml"
        path.write_text(tomli_w.dumps(recipe))
        run = run_stage("prepare", path, folder / "run")
        loaded = load_recipe(path)
        stores = [PairStore(run / "prepare" / split) for split in ("train", "eval")]
        policy = load_policy(loaded, CPU, None, with_reference=True)
        (run / "align").mkdir()
        reference = run / "reference/logps.f32"
        settings = loaded.align
        return TrainingRun(policy, settings.loss, settings, *stores, run / "align", 0, reference)

    return make


LORA = {"lora": {"r": 4, "dropout": 0.0}}


def test_weights_in_fp32_are_multiplied_in_bf16(make_run):
    """All weights of a bf16 base are kept in fp32, and most products are made in bf16."""
    run = make_run("bf16", {"dtype": "bfloat16"}, loss={"name": "dpo"})
    assert {p.dtype for p in run.policy.trained.values()} == {torch.float32}
    stepper = loop.build_stepper(run)
    with Operations() as seen:
        stepper.step(0)
    share = seen.dtypes[torch.bfloat16] / seen.dtypes.total()
    assert share > 0.7, seen.dtypes


def test_norms_positions_and_lora_layers_are_computed_by_the_fused_ones(make_run):
    """A Llama of 2 layers has 5 norms; the 7 LoRA layers of each add their product in place.

    One pass of the policy and one of the reference, which has no LoRA. transformers' own rotary
    positions negate a half of all queries, and of all keys, in each.
    """
    stepper = loop.build_stepper(make_run("fused", LORA))
    with Operations() as seen, Functions() as called:
        stepper.step(0)
    assert seen.names["addmm_"] >= 2 * 7
    assert seen.names["_foreach_copy_"] == 1, "all weights of the adapter are copied at once"
    assert called.names["rms_norm"] == 2 * 5
    assert seen.names["neg"] < 2 * 2 * 2


def saved_bytes(run):
    """Bytes that a training keeps for its backward passes, and the passes of its first layer."""
    bytes_of = {}
    passes = Counter()

    def pack(tensor):
        storage = tensor.untyped_storage()
        bytes_of[storage.data_ptr()] = storage.nbytes()
        return tensor

    norm = run.policy.model.get_base_model().model.layers[0].input_layernorm
    norm.register_forward_hook(lambda *_: passes.update(["layer"]))
    stepper = loop.build_stepper(run)
    passes.clear()
    own = {p.untyped_storage().data_ptr() for p in run.policy.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stepper.step(0)
    kept = sum(size for place, size in bytes_of.items() if place not in own)
    return kept, passes["layer"]


def test_activation_checkpointing_keeps_less_and_computes_layers_again(make_run):
    kept, passes = saved_bytes(make_run("kept", LORA))
    less, more_passes = saved_bytes(make_run("again", LORA, activation_checkpointing=True))
    assert more_passes == passes + 1, "one pass of the policy with gradients, made twice"
    assert less < 0.6 * kept


def test_log_pi_ref_is_computed_in_the_first_epoch_and_read_from_the_disk_in_the_others(make_run):
    """Three epochs of one micro-batch: two passes in the first one, one in each of the others."""
    run = make_run("cached", LORA, loss={"name": "dpo"}, max_steps=3)
    passes = []
    embeddings = run.policy.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda *_: passes.append(1))
    after = []
    loop.train(replace(run, track=lambda *_: after.append(len(passes))))
    first, second, third = after
    assert (second - first, third - second) == (1, 1)
    trial = first - 2  # the layout is tried before the first step
    assert trial >= 0


def note_reads(counts, seen, *_):
    counts.append(seen.num_reads)


def test_the_device_is_read_once_a_step_however_many_micro_batches_it_has(make_run):
    """The reads of a step with one micro-batch are those of a step with eight."""
    reads = {}
    for name, tokens in (("one", 4096), ("eight", 1)):
        run = make_run(name, LORA, max_tokens_per_device=tokens, max_steps=2)
        counts = []
        with Operations() as seen:
            track = functools.partial(note_reads, counts, seen)
            loop.train(replace(run, track=track))
        reads[name] = counts[1] - counts[0]
    assert reads["eight"] == reads["one"]


@pytest.mark.parametrize("layout", ["shared_prompt", "padded"])
def test_a_batch_that_is_moved_has_every_tensor_in_its_place(make_run, layout):
    store = make_run(layout).train
    (batch,) = collate_all(store, range(NUM_PAIRS), 10_000, "response", layout, True)
    known = torch.randn(len(batch.tokens))
    batch = replace(batch, reference_logps=known)
    moved = batch.to(torch.device("cpu", 0))
    assert moved is not batch
    tensors = ("input_ids", "position_ids", "tokens", "predictor")
    tensors += ("pair_weights", "token_keys", "reference_logps")
    pairs = [(getattr(moved, name), getattr(batch, name)) for name in tensors]
    for side in ("chosen", "rejected"):
        for name in ("mask", "slots"):
            both = [getattr(getattr(one, side), name) for one in (moved, batch)]
            pairs.append(both)
    for got, want in pairs:
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    assert not torch.equal(batch.input_ids, batch.position_ids)


def test_the_bytes_that_are_forecast_for_a_token_are_those_that_a_pass_saves(make_run):
    """By kept_bytes from shapes, and by the tensors that a real pass over 64 tokens keeps."""
    model = make_run("forecast", LORA).policy.model
    forecast, _ = kept_bytes(model, False)
    bytes_of = {}

    def pack(tensor):
        bytes_of[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    backbone = model.get_base_model().model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone(input_ids=torch.arange(64)[None], use_cache=False)
    kept = sum(size for place, size in bytes_of.items() if place not in own)
    assert kept / 64 == pytest.approx(forecast, rel=0.25)


def test_dropouts_masks_are_forecast_also_for_a_model_that_does_not_train_yet(make_run):
    """And the model is left as it was."""
    model = make_run("masks", {"lora": {"r": 4, "dropout": 0.1}}).policy.model
    without, _ = kept_bytes(make_run("without", LORA).policy.model, False)
    forecast = [kept_bytes(model.train(training), False) for training in (True, False)]
    assert forecast[0] == forecast[1] and forecast[0][0] > 1.1 * without
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_the_bytes_that_are_forecast_for_learning_are_those_of_gradients_and_moments(
    make_run, optimizer
):
    run = make_run("learning", LORA, optimizer=optimizer)
    stepper = loop.build_stepper(run)
    gradients = []
    for weight in run.policy.trained.values():
        weight.register_post_accumulate_grad_hook(lambda w: gradients.append(w.grad.nbytes))
    stepper.step(0)
    state = stepper.states["policy"].optimizer.state.values()
    moments = [tensor.nbytes for each in state for tensor in each.values() if tensor.ndim]
    assert len(gradients) == len(run.policy.trained)
    assert bytes_of_learning(run.policy, run.settings) == sum(gradients) + sum(moments)


def test_a_row_that_is_there_twice_is_trained_on_once(tmp_path, base):
    """Twelve rows of which four repeat others: eight pairs, unless dedup is off."""
    rows = preference_rows(NUM_PAIRS)
    path = tmp_path / "recipe.toml"
    train = write_jsonl(tmp_path / "rows.jsonl", [*rows, *rows[:4]])
    for dedup, expected in ((True, 8), (False, 12)):
        data = {
            "train": str(train),
            "eval_fraction": 0.0,
            "dedup": dedup,
            "max_reject_fraction": 0.5,
        }
        path.write_text(tomli_w.dumps({"model": {"base": str(base)}, "data": data}))
        run = run_stage("prepare", path, tmp_path / str(dedup))
        assert len(PairStore(run / "prepare/train")) == expected
        manifest = json.loads((run / "prepare/manifest.json").read_text())
        assert manifest["counts"][0]["kept"]["train"] == expected
