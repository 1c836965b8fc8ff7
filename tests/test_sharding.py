"""Training with weights that are sharded over processes (FSDP2) is that of one process."""

import copy
import os
import signal
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import change_recipe, preference_rows, run_stage, small_second_device, write_jsonl
from safetensors.torch import load_file
from test_processes import finish, metrics, start, two_machines, wait_for_step, workers_of
from torch.testing._internal.distributed.fake_pg import FakeStore

from tbpo_cli.batch.layouts import blank_batch, collate
from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.core import LOSSES
from tbpo_cli.core.baseline import StateBaseline
from tbpo_cli.data.tokens import TokenizedPair
from tbpo_cli.errors import TbpoError
from tbpo_cli.model.load import load_policy
from tbpo_cli.model.policy import POLICY, Policy
from tbpo_cli.model.scoring import Scorer
from tbpo_cli.model.shapes import policy_of_shapes
from tbpo_cli.model.sharding import Shards, gathered, shard
from tbpo_cli.train.checkpoint import kept_checkpoints
from tbpo_cli.train.feed import TokenBudget
from tbpo_cli.train.group import Group
from tbpo_cli.train.memory import bytes_of_weights
from tbpo_cli.train.metrics import average, measure
from tbpo_cli.train.placement import mesh_of

CPU = torch.device("cpu")
SHARDED = ("--cpu", "--set", "align.sharding=fsdp", "--gpus")


@pytest.fixture
def untied(base, tmp_path):
    """The same base with an output head of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
    model.save_pretrained(tmp_path / "untied")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


@pytest.fixture
def full_recipe(recipe_file):
    """Without the adapter: all weights are trained."""
    return change_recipe(recipe_file, model={"lora": None})


def assert_same_training(run, other, weights="model/model.safetensors", within=1e-6):
    ours, theirs = (load_file(folder / "align" / weights) for folder in (run, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (
            tensor.dtype == theirs[name].dtype
            and (tensor - theirs[name]).norm() <= within * tensor.norm()
        ), name
    for mine, yours in zip(metrics(run), metrics(other), strict=True):
        assert mine.pop("split") == yours.pop("split")
        assert mine == pytest.approx(yours, rel=1e-5, abs=1e-6)


def stop(recipe_file, run, gpus, step, sets):
    process = start(recipe_file, run, *SHARDED, gpus, sets=sets)
    wait_for_step(run, step, process)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143 and "interrupted: a checkpoint of step" in err and "Traceback" not in err, (
        err
    )


def test_two_processes_shard_a_full_fine_tuning_by_themselves(full_recipe, tmp_path):
    """A tied head, activation checkpointing, and a norm that is clipped, in both runs.

    Of the two processes one writes to a tracker, and both save the weights after that is closed.
    """
    sets = (
        "align.activation_checkpointing=true",
        "align.max_grad_norm=0.01",
        "align.optimizer=rmsprop",
    )
    run_stage("align", full_recipe, tmp_path / "alone", *sets)
    tracked = (*sets, 'run.trackers=["tensorboard"]')
    two = start(full_recipe, tmp_path / "two", "--cpu", "--gpus", "2", sets=tracked)
    code, _, err = finish(two)
    assert list((tmp_path / "two/align/logs").rglob("events.out.*"))
    assert (
        code == 0
        and err.count("the weights are sharded over the processes (fsdp): all of them are trained")
        == 1
    ), err
    assert_same_training(tmp_path / "alone", tmp_path / "two")


def test_a_sharded_run_goes_on_in_another_number_of_processes_and_without_sharding(
    full_recipe, tmp_path, untied
):
    """14 pairs a step, a few tokens at a time: 5, 5 and 4 passes, or 7 and 7; one held-out pair
    for three processes.

    The third step mixes pairs whose log π_ref is known with such whose is not.
    """
    held_out = write_jsonl(tmp_path / "held_out.jsonl", preference_rows(1, seed=2))
    sets = (
        "align.loss.name=tbpo_q",
        f"model.base={untied}",
        f"data.eval={held_out}",
        "align.batch_pairs=14",
        "align.max_tokens_per_device=70",
        "align.max_steps=12",
        "align.checkpoint_every=100",
    )
    run_stage("align", full_recipe, tmp_path / "alone", *sets)
    stop(full_recipe, tmp_path / "run", "3", 4, sets)
    (parts,) = (tmp_path / "run/align/checkpoints").glob("step-*/policy")
    sizes = [path.stat().st_size for path in parts.iterdir()]
    assert len(sizes) == 3 and max(sizes) < 0.4 * sum(sizes), "each process has written its part"
    stop(full_recipe, tmp_path / "run", "2", 7, sets)
    run_stage("align", full_recipe, tmp_path / "run", *sets)
    assert_same_training(tmp_path / "alone", tmp_path / "run")


@pytest.mark.parametrize(
    ("on_machine", "over", "shape"),
    [
        (2, "auto", (2, 2)),
        (2, "machine", (2, 2)),
        (2, "all", (4,)),
        (4, "auto", (4,)),
        (1, "auto", (4,)),
        (3, "auto", (4,)),
    ],
)
def test_each_of_several_machines_has_a_copy_of_the_weights_unless_the_recipe_says_otherwise(
    full_recipe, monkeypatch, on_machine, over, shape
):
    """Of four processes; not where a machine has one of them, or another number than the others."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_machine))
    recipe = load_recipe(full_recipe, (f"align.shard_over={over}",))
    shapes = policy_of_shapes(recipe, recipe.align.loss, CPU, after_sft=False)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        assert tuple(mesh_of(bytes_of_weights(shapes), over, Group(0, 4)).shape) == shape
    finally:
        dist.destroy_process_group()


def test_two_machines_of_two_processes_each_train_as_one_process(full_recipe, tmp_path):
    """Each machine has a copy of the weights, in two parts."""
    sets = ("align.max_steps=3", "align.max_grad_norm=0.01", "align.loss.name=tbpo_q")
    run_stage("align", full_recipe, tmp_path / "alone", *sets)
    machines = two_machines(full_recipe, tmp_path / "run", "--gpus", "2", sets=sets)
    ends = [finish(machine) for machine in machines]
    assert [code for code, _, _ in ends] == [0, 0], ends
    copies = "each of the 2 machines has a copy of the weights, in 2 parts"
    assert ends[1][2].count(copies) == 1
    assert_same_training(tmp_path / "alone", tmp_path / "run")


def test_a_base_under_an_adapter_is_sharded_if_the_recipe_says_so(recipe_file, tmp_path):
    sets = ("model.lora.dropout=0.0", "align.max_steps=3")
    run_stage("align", recipe_file, tmp_path / "alone", *sets)
    code, _, err = finish(start(recipe_file, tmp_path / "two", *SHARDED, "2", sets=sets))
    assert code == 0, err
    assert_same_training(tmp_path / "alone", tmp_path / "two", "adapter/adapter_model.safetensors")


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_pass_without_a_pair_adds_nothing_to_a_loss_or_a_gradient(full_recipe, name):
    """Zeros, not nothing: every weight's gradient takes part in the sum over the processes. Not
    NaN either.
    """
    recipe, loss = load_recipe(full_recipe), LOSSES[name]()
    policy = load_policy(recipe, CPU, None, with_reference=True)
    policy.frozen.update(positive=policy.frozen["reference"], negative=policy.frozen["reference"])
    scorers = [Scorer.of(policy, StateBaseline(32))]
    if "state_baseline" not in loss.needs:
        scorers.append(
            replace(scorers[0], heads=dict.fromkeys(scorers[0].heads))
        )  # the oracle's way
    for scorer in scorers:
        scores = scorer.score_and_measure(blank_batch(), loss.needs)
        output = loss(scores)
        output.per_pair.sum().backward()
        assert all(
            parameter.grad is not None and not parameter.grad.any()
            for parameter in policy.trained.values()
        )
        assert average([measure(scores, output, loss)], Group()).items() <= {("num_clipped", 0.0)}
        policy.model.zero_grad()


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
ATTENDS = {
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS = {
    "a softcap": ("Gemma2Config", {**SMALL, **ATTENDS, "head_dim": 8}),
    "a factor": ("CohereConfig", {**SMALL, **ATTENDS, "logit_scale": 0.25}),
    "experts": ("MixtralConfig", {**SMALL, **ATTENDS, "num_local_experts": 4}),
    "a block in several layers": (
        "ZambaConfig",
        {
            **SMALL,
            **ATTENDS,
            "num_hidden_layers": 5,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "n_mamba_heads": 2,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "layers within layers": ("MambaConfig", {**SMALL, "state_size": 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_many_kinds_can_be_sharded(mesh, name):
    config = getattr(transformers, MODELS[name][0])(**MODELS[name][1])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    batch = collate([TokenizedPair("0", [1, 2, 3], [4, 5, 6], [7, 8])], "padded")
    gradients = []
    for sharded, compute in ((False, None), (True, None), (True, torch.bfloat16)):
        policy = Policy(copy.deepcopy(model), autocast=compute)
        if sharded:
            shard(policy.model, Shards(mesh, compute, trains=True))
        scorer = Scorer.of(policy)
        assert scorer.heads[POLICY] is not None and policy.is_sharded == sharded
        scorer.score(batch, frozenset({"logps"})).chosen.logps.sum().backward()
        gradients.append([gathered(parameter.grad) for parameter in policy.trained.values()])
    for want, got, rounded in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert (rounded - want).norm() < 0.1 * want.norm() + 1e-2


def test_all_processes_begin_again_with_half_the_tokens_when_one_of_a_sharded_run_is_out_of_memory(
    full_recipe, tmp_path, monkeypatch
):
    """The others wait for it within the pass, so that they cannot be asked. 1,024 → 512 → 256
    tokens.
    """
    sets = ("align.max_steps=2", "align.batch_pairs=64", "align.eval_every=1")
    run_stage("align", full_recipe, tmp_path / "whole", *sets)
    (tmp_path / "sitecustomize.py").write_text(small_second_device(300))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    code, _, err = finish(start(full_recipe, tmp_path / "run", *SHARDED, "2", sets=sets))
    assert code == 0, err
    assert "Traceback" not in err and err.count("out of memory: all processes begin again") == 2
    assert "max_tokens_per_device = 256" in err and not (tmp_path / "run/align/.halved").exists()
    assert_same_training(
        tmp_path / "run", tmp_path / "whole", within=1e-5
    )  # other sums, through AdamW's first steps


# The second process gets no answer, or an error, from the disk for its part of the fourth step's
# checkpoint.
DISK_OF_SECOND = """
import os, time
from pathlib import Path
reach = os.open
def on_its_disk(path, *arguments, **named):
    if os.environ.get("RANK") == "1" and ".step-4.partial/policy" in str(path):
        {what}
    return reach(path, *arguments, **named)
os.open = on_its_disk
"""


def give_second_a_disk(folder, monkeypatch, what):
    (folder / "sitecustomize.py").write_text(DISK_OF_SECOND.format(what=what))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def test_processes_that_are_killed_while_a_checkpoint_is_written_go_on_from_the_one_before(
    full_recipe, tmp_path, monkeypatch
):
    """First one of them, then all: the fifth step was made while the thread wrote the fourth."""
    run_stage("align", full_recipe, tmp_path / "alone")
    run = tmp_path / "run"
    waits = tmp_path / "waits"
    before = os.environ.get("PYTHONPATH", "")
    give_second_a_disk(tmp_path, monkeypatch, f"Path({str(waits)!r}).touch(); time.sleep(900)")
    for kills_all in (False, True):
        process = start(full_recipe, run, *SHARDED, "2", sets=())
        process.wait_until(waits.exists)
        wait_for_step(run, 5, process)
        assert list((run / "align/checkpoints/.step-4.partial/policy").iterdir())
        waits.unlink()
        killed = workers_of(process)[1:]
        if kills_all:
            killed = psutil.Process(process.pid).children(recursive=True)
            process.close()
        for each in killed:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(killed, timeout=40)
        if not kills_all:
            code, _, err = finish(process)
            assert code == 2 and "a worker process was killed by signal 9" in err, err
            assert "Traceback" not in err
        assert [*kept_checkpoints(run / "align/checkpoints")] == [2]
    monkeypatch.setenv("PYTHONPATH", before)
    run_stage("align", full_recipe, run)
    assert_same_training(tmp_path / "alone", run)
    names = {path.name for path in (run / "align/checkpoints").iterdir()}
    assert names == {"step-4", "step-6"}


def test_a_full_disk_of_one_process_ends_all_with_a_message_and_leaves_the_checkpoint_before(
    full_recipe, tmp_path, monkeypatch
):
    give_second_a_disk(tmp_path, monkeypatch, "raise OSError(28, os.strerror(28), str(path))")
    process = start(full_recipe, tmp_path / "run", *SHARDED, "2", sets=())
    code, _, err = finish(process)
    assert code == 2 and "Traceback" not in err, err
    assert err.count("the run directory cannot be written: No space left on device") == 1
    names = [path.name for path in (tmp_path / "run/align/checkpoints").iterdir()]
    assert names == ["step-2"]


def test_a_number_of_the_recipe_is_not_halved(tmp_path):
    def work(tokens):
        raise torch.OutOfMemoryError("CUDA out of memory")

    budget = TokenBudget(4096, 1024, Group(), tmp_path)
    with pytest.raises(TbpoError, match='fix: max_tokens_per_device = "auto"'):
        budget.attempt(work)
