"""Several processes train as one: the same trajectory, one voice, one end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import run_stage, write_recipe
from process import Process
from safetensors.torch import load_file

from tbpo_cli.errors import TbpoError
from tbpo_cli.runs import launch, machines
from tbpo_cli.runs.launch import Processes, processes_of
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages.chain import STAGES

EXACT = ("align.loss.name=tbpo_q", "model.lora.dropout=0.2")  # the baseline trains along
TIMINGS = {"seconds", "pairs_per_s", "tokens_per_s", "peak_memory_gb"}


def start(recipe_file, run, *arguments, sets=EXACT):
    overrides = [part for one in sets for part in ("--set", one)]
    return Process("align", recipe_file, "--run-dir", run, *overrides, *arguments, cwd=run.parent)


def finish(process):
    """(exit code, stdout, stderr) once it has ended."""
    done = process.finish()
    return done.returncode, done.stdout, done.stderr


def metrics(run):
    lines = [json.loads(line) for line in (run / "align/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same_training(run, other):
    ours, theirs = (
        load_file(folder / "align/adapter/adapter_model.safetensors") for folder in (run, other)
    )
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= 1e-6 * (1 + tensor.norm()), name
    assert len(metrics(run)) == len(metrics(other))
    for mine, yours in zip(metrics(run), metrics(other), strict=True):
        assert mine.pop("split") == yours.pop("split")
        assert mine == pytest.approx(yours, rel=1e-5, abs=1e-6)


def wait_for_step(run, step, process):
    path = run / "align/metrics.jsonl"
    process.wait_until(lambda: path.exists() and f'"train", "step": {step}' in path.read_text())


def wait_for_checkpoint(run, process):
    """It is written beside the steps that follow it."""
    process.wait_until(lambda: any((run / "align/checkpoints").glob("step-*")))


def workers_of(process):
    family = psutil.Process(process.pid).children(recursive=True)
    return [
        p
        for p in family
        if "tbpo_cli.cli.worker" in p.cmdline() and "tbpo_cli.runs.launch" not in p.cmdline()
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base, rows):
    """The training by one process."""
    folder = tmp_path_factory.mktemp("alone")
    return run_stage(
        "align", write_recipe(folder / "tiny.toml", base, rows), folder / "run", *EXACT
    )


def test_three_processes_train_as_one_does_and_only_the_first_speaks(recipe_file, tmp_path, alone):
    """8 pairs a step do not divide by 3, nor do the 8 held-out ones."""
    code, out, err = finish(start(recipe_file, tmp_path / "three", "--gpus", "3", "--cpu"))
    assert code == 0, err
    assert_same_training(alone, tmp_path / "three")
    assert err.count("align 6/6") == 1 and out.count("reward accuracy") == 1
    manifest = json.loads((tmp_path / "three/align/manifest.json").read_text())
    assert (manifest["num_processes"], manifest["device"]) == (3, "cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_two_processes_stop_together_and_one_goes_on_alone(recipe_file, tmp_path, alone, number):
    sets = (*EXACT, "align.log_every=2", "align.checkpoint_every=100")
    process = start(recipe_file, tmp_path / "two", "--gpus", "2", "--cpu", sets=sets)
    wait_for_step(tmp_path / "two", 2, process)
    process.send_signal(number)
    code, _, err = finish(process)
    assert (
        code == 128 + number
        and err.count("interrupted: a checkpoint of step") == 1
        and "Traceback" not in err
    )
    code, _, err = finish(start(recipe_file, tmp_path / "two", sets=sets))
    assert code == 0 and "going on from step" in err
    assert_same_training(alone, tmp_path / "two")


def test_a_worker_that_dies_ends_the_others_and_the_run_can_go_on(recipe_file, tmp_path):
    sets = (*EXACT, "align.max_steps=2000", "align.eval_every=2000")
    process = start(recipe_file, tmp_path / "run", "--gpus", "2", "--cpu", sets=sets)
    wait_for_checkpoint(tmp_path / "run", process)
    workers = workers_of(process)
    assert len(workers) == 2
    started = time.monotonic()
    workers[1].kill()
    code, _, err = finish(process)
    assert time.monotonic() - started < 30 and not any(worker.is_running() for worker in workers)
    assert code == 2 and "a worker process was killed by signal 9" in err and "Traceback" not in err
    assert any((tmp_path / "run/align/checkpoints").glob("step-*"))


def test_what_goes_wrong_in_all_processes_is_reported_once_with_its_exit_code(
    recipe_file, tmp_path
):
    sets = (*EXACT, "align.learning_rate=1e30", "align.warmup=0.0")
    code, _, err = finish(start(recipe_file, tmp_path / "run", "--gpus", "2", "--cpu", sets=sets))
    assert code == 3 and err.count("error: training diverged") == 1 and "Traceback" not in err


def test_workers_end_when_the_process_that_started_them_is_gone(recipe_file, tmp_path):
    sets = (*EXACT, "align.max_steps=2000", "align.eval_every=2000")
    process = start(recipe_file, tmp_path / "run", "--gpus", "2", "--cpu", sets=sets)
    wait_for_step(tmp_path / "run", 1, process)
    workers = workers_of(process)
    process.close()
    gone, alive = psutil.wait_procs(workers, timeout=40)
    assert len(gone) == 2 and not alive


def two_machines(recipe_file, run, *flags, sets=EXACT):
    """The second one and the first, each a process of one training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    where = ("--cpu", "--nodes", "2", "--main-address", address, *flags)
    return [start(recipe_file, run, "--node-rank", rank, *where, sets=sets) for rank in ("1", "0")]


def test_two_machines_train_as_one_process_does(recipe_file, tmp_path, alone):
    """Each machine is a loopback address; the second waits while the first prepares the data."""
    run = tmp_path / "run"
    ends = [finish(machine) for machine in two_machines(recipe_file, run)]
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert "waiting for" in ends[0][2] and "reward accuracy" in ends[1][1]
    assert_same_training(alone, run)
    again = [finish(machine) for machine in two_machines(recipe_file, run, "--restart")]
    assert [code for code, _, _ in again] == [0, 0] and "waiting for" in again[0][2], again
    assert_same_training(run, alone)
    assert (run / "align.old-1/manifest.json").exists()


def test_a_machine_is_alive_while_its_file_changes_and_lost_when_it_stops(tmp_path, monkeypatch):
    """One that has not begun, and one that has ended, are not lost."""
    monkeypatch.setattr(machines, "LOST", 0.2)
    (tmp_path / ".machine-1").write_text("of an earlier start")
    own, other = (machines.Signs(tmp_path, rank, 3) for rank in (0, 1))
    assert own.beat() is None
    time.sleep(0.3)
    assert own.beat() is None, "nobody else has begun"
    other.beat()
    assert own.beat() is None
    time.sleep(0.3)
    assert own.beat() == 1
    other.beat()
    assert own.beat() is None, "it was late"
    other.end()
    own.beat()
    time.sleep(0.3)
    assert own.beat() is None


QUICK = (
    "import tbpo_cli.runs.machines as m; m.EVERY, m.LOST = 0.2, 8.0; "
    "from tbpo_cli.cli.main import main; main()"
)


def test_a_machine_that_falls_silent_ends_the_others_with_a_message(recipe_file, tmp_path):
    """All processes of machine 1 are stopped, and their connections stay open, as when its power
    fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    steps = ("--set", "align.max_steps=100000", "--set", "align.checkpoint_every=1")
    where = ("--cpu", "--nodes", "2", "--main-address", address)
    command = [sys.executable, "-c", QUICK, "align", recipe_file, "--run-dir", tmp_path / "run"]
    first, second = (
        subprocess.Popen(
            [*command, *steps, *where, "--node-rank", rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    )
    try:
        until = time.monotonic() + 200
        while not [*tmp_path.glob("run/align/checkpoints/step-*")] and time.monotonic() < until:
            time.sleep(0.5)
        silent = [psutil.Process(second.pid), *psutil.Process(second.pid).children(recursive=True)]
        for process in silent:
            process.suspend()
        _, said = first.communicate(timeout=100)
        assert first.returncode == 2, said
        assert "machine 1 has given no sign of life for 8 seconds" in said
        assert "go on from the last checkpoint" in said
    finally:
        for process in silent:
            process.kill()
        first.kill()


def test_a_machine_waits_for_the_first_one_while_that_has_the_run_and_then_only_so_long(
    tmp_path, monkeypatch
):
    """Half a second here: the lock is held three times as long, then nobody takes up the run."""
    monkeypatch.setattr(launch, "ABSENT", 0.5)
    run_dir, other, waited = RunDir(tmp_path), Processes(1, True, 2, 1, "127.0.0.1:29500"), []

    def wait():
        with pytest.raises(TbpoError, match="the first machine does not begin align"):
            launch.join_workers(STAGES["align"], run_dir, other)
        waited.append(True)

    with run_dir.lock():
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(1.5)
        assert thread.is_alive()
    thread.join(timeout=60)
    assert waited == [True]


@pytest.mark.parametrize("gpus", ["1", "2"])
def test_a_gpu_that_is_not_there_is_said_before_anything_is_prepared(
    recipe_file, tmp_path, executable, gpus
):
    done = executable(
        "align", recipe_file, "--run-dir", "run", "--gpus", gpus, CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == 2 and f"{gpus} GPUs are asked for, and 0 are here" in done.stderr
    assert not (tmp_path / "run").exists()


def test_gpus_are_launched_by_accelerate_with_the_flags_of_the_command_line():
    line = Processes(8, False, 4, 2, "node0:29500", ("--num_cpu_threads_per_process=4",)).command(
        "runs/x/align"
    )
    assert line[1:3] == ["-m", "tbpo_cli.runs.launch"]
    for flag in (
        "--num_processes=32",
        "--num_machines=4",
        "--machine_rank=2",
        "--main_process_ip=node0",
        "--main_process_port=29500",
        "--num_cpu_threads_per_process=4",
    ):
        assert flag in line, flag
    assert line[-3:] == ["-m", "tbpo_cli.cli.worker", "runs/x/align"], (
        "the worker gets one argument"
    )


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_of_a_gpu_extends_its_segments_unless_the_user_has_set_it_up(
    monkeypatch, own
):
    for name in launch.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(own, "max_split_size_mb:128")
    launch.let_segments_grow()
    found = {name: os.environ[name] for name in launch.ALLOCATOR if name in os.environ}
    mine = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert found == (mine if own is None else {own: "max_split_size_mb:128"})


def test_inside_slurm_the_machines_find_each_other(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "gpu[3-4]" ] && printf "gpu3\\ngpu4\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = {
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "gpu[3-4]",
        "SLURM_JOB_ID": "70012",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert processes_of(8, False, None, None, None, []) == Processes(8, False, 2, 1, "gpu3:29512")
    scontrol.unlink()  # as in a container
    with pytest.raises(TbpoError, match="HOST:29500"):
        processes_of(8, False, None, None, None, [])
    assert processes_of(8, False, None, None, "gpu3:1", []) == Processes(8, False, 2, 1, "gpu3:1")
    monkeypatch.setenv("SLURM_NNODES", "1")
    assert (
        processes_of(8, False, None, None, None, [])
        == processes_of(8, False, 1, 0, None, [])
        == Processes(8)
    )


@pytest.mark.parametrize(
    "given",
    [
        (2, None, "a:1"),
        (2, 2, "a:1"),
        (2, 0, None),
        (2, 0, "host"),
        (1, 1, "a:1"),
        (None, 1, None),
        (None, None, "a:1"),
    ],
)
def test_machines_that_cannot_find_each_other_are_a_message(given):
    nodes, rank, address = given
    with pytest.raises(TbpoError, match="do not find each other"):
        processes_of(8, False, nodes, rank, address, [])


MEMORY = """
import os
import shutil
import sys
import torch
import torch.distributed as dist
from pathlib import Path
from tbpo_cli.errors import ReportedError
from tbpo_cli.runs.files import halved
from tbpo_cli.train.feed import TokenBudget
from tbpo_cli.train.group import Group
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
def work(tokens):
    if rank == 1 and tokens > 300:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return tokens
model = torch.nn.Linear(2, 2)
budget = TokenBudget("auto", 1024, Group(rank, 2))
print(budget.attempt(work), budget.tokens, flush=True)
# What all exchange: the second cannot do it alone once more, and has all begin again.
budget = TokenBudget("auto", 256, Group(rank, 2), folder=Path(store).parent)
try:
    budget.once_more(lambda: rank == 1 and work(1024), "a sum")
except ReportedError:
    assert rank == 1 and halved(Path(store).parent) == {"max_tokens_per_device": 128}
else:
    assert rank == 0
os._exit(0)  # as a worker ends
"""


def test_processes_agree_on_a_smaller_budget_when_one_runs_out_of_memory(tmp_path):
    """Only the second lacks memory for 1,024 and 512 tokens; both repeat the step with 256."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", MEMORY, str(rank), str(tmp_path / "store")], **pipes
        )
        for rank in (0, 1)
    ]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0] and [out for out, _ in ends] == [
        "256 256\n"
    ] * 2, ends


def launcher_of(process):
    family = psutil.Process(process.pid).children(recursive=True)
    return [p for p in family if "tbpo_cli.runs.launch" in p.cmdline()]


def test_workers_end_with_a_launcher_that_is_killed_and_the_run_stays_locked_until_then(
    recipe_file, tmp_path
):
    sets = (*EXACT, "align.max_steps=2000", "align.eval_every=2000")
    process = start(recipe_file, tmp_path / "run", "--gpus", "2", "--cpu", sets=sets)
    wait_for_step(tmp_path / "run", 3, process)
    workers = workers_of(process)
    lock = (tmp_path / "run/lock").stat().st_ino
    for worker in workers:
        assert Path(f"/proc/{worker.pid}/fd/0").stat().st_ino == lock, "a worker holds the lock"
    launcher_of(process)[0].kill()
    code, _, err = finish(process)
    assert code == 2 and "was killed by signal 9" in err
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_there_are_workers_ends_the_command(recipe_file, tmp_path, number):
    process = start(recipe_file, tmp_path / "run", "--gpus", "2", "--cpu")
    process.wait_until(lambda: launcher_of(process))
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 128 + number and "Traceback" not in err
    assert not (tmp_path / "run/align/manifest.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_sampling_of_several_processes_has_a_message_of_its_own(
    recipe_file, tmp_path, alone, number
):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    sets = [*EXACT, "sample.num_samples=200", "sample.max_new_tokens=200"]
    overrides = [part for one in sets for part in ("--set", one)]
    process = Process(
        "sample", recipe_file, "--run-dir", run, "--gpus", "2", "--cpu", *overrides, cwd=tmp_path
    )
    process.wait_until(lambda: [*run.glob("sample/part-*.jsonl")])
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 128 + number and "the same command goes on from there" in err
    assert "memory" not in err and "Traceback" not in err


def test_a_machine_that_never_joins_is_named_without_a_traceback(executable, recipe_file):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ("--cpu", "--nodes", "2", "--node-rank", "0", "--main-address", f"127.0.0.1:{port}")
    done = executable("align", recipe_file, *where, "--", "--rdzv_conf=timeout=3")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "waiting for 2 machines to meet at 127.0.0.1:" in done.stderr
    assert "not all of the 2 machines have come together" in done.stderr
