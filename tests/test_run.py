"""A run that cannot be lost: one writer, files that are whole, a disk that fills up, input that
is broken at random.
"""

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import preference_rows, run_stage, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tbpo_cli.config.recipe import load_recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.runs import lock
from tbpo_cli.runs.files import read_sealed, write_sealed
from tbpo_cli.runs.inputs import files_of
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages.chain import plan
from tbpo_cli.train.metrics import read_metrics

NUM_EXAMPLES = int(
    os.environ.get("FUZZ_EXAMPLES", "60")
)  # tests/benchmarks/soak.py asks for thousands
FUZZ = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


# ----------------------------------------------------------------------------------------- the lock

HOLDER = """
import sys, time
from pathlib import Path
from tbpo_cli.runs.inputs import files_of
from tbpo_cli.runs.run_dir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_with_the_pid_and_host_of_the_first(tmp_path, recipe_file):
    holder = hold(tmp_path / "run")
    try:
        with pytest.raises(
            TbpoError, match=f"in use by process {holder.pid} on {os.uname().nodename}"
        ) as error:
            run_stage("prepare", recipe_file, tmp_path / "run")
        assert "--run-dir" in error.value.fix and not (tmp_path / "run/prepare").exists()
    finally:
        holder.kill()


def test_the_lock_of_a_dead_process_is_taken_over_with_a_word_about_it(
    tmp_path, recipe_file, capsys
):
    holder = hold(tmp_path / "run")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    run_stage("prepare", recipe_file, tmp_path / "run")
    assert f"taking over the run from process {holder.pid}" in capsys.readouterr().err
    run_stage("prepare", recipe_file, tmp_path / "run", restart=True)
    assert "taking over" not in capsys.readouterr().err, "a lock that was given back leaves nothing"


@pytest.fixture
def impatient(monkeypatch):
    """A lock whose owner is gone after a second without a heartbeat."""
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "SILENCE", 1.0)
    monkeypatch.setattr(lock, "SETTLED", 0.2)


def test_the_lock_of_another_machine_that_still_works_is_left_alone(tmp_path, impatient):
    path = tmp_path / "lock"
    path.write_text("process 7 on elsewhere\nanother boot")
    stop = threading.Event()

    def work():
        while not stop.wait(0.2):
            os.utime(path)

    threading.Thread(target=work).start()
    try:
        with (
            pytest.raises(TbpoError, match="in use by process 7 on elsewhere"),
            RunDir(tmp_path).lock(),
        ):
            pass
    finally:
        stop.set()


@pytest.mark.parametrize("text", [b"process 7 on pod-abc\nanother boot", b"process 9 on v\xf6"])
def test_the_lock_of_a_machine_that_is_gone_or_a_damaged_one_is_taken_over(
    tmp_path, impatient, text, capsys
):
    (tmp_path / "lock").write_bytes(text)
    with RunDir(tmp_path).lock():
        assert "taking over the run from process" in capsys.readouterr().err
        with pytest.raises(TbpoError, match="is in use by process"), RunDir(tmp_path).lock():
            pass


def test_a_lock_that_a_crash_left_empty_or_zeroed_is_free(tmp_path, capsys):
    (tmp_path / "lock").write_bytes(bytes(20))
    with RunDir(tmp_path).lock():
        assert not capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_of_the_file_system_the_heartbeat_decides(
    tmp_path, impatient, monkeypatch, code
):
    def no_flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    in_use = f"the run is in use by process {os.getpid()}"
    with RunDir(tmp_path).lock(), pytest.raises(TbpoError, match=in_use), RunDir(tmp_path).lock():
        pass
    (tmp_path / "lock").write_text(f"process 1 on elsewhere\n{lock.BOOT_ID.read_text()}")
    with RunDir(tmp_path).lock():
        pass
    assert (tmp_path / "lock").read_bytes() == b""


# ----------------------------------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs more rights here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_stops_with_a_message_and_the_newest_checkpoint_stays_usable(
    small_disk, recipe_file, trained
):
    """Something else fills the disk after the first checkpoint; once there is space again, the run
    ends as it should.
    """
    straight = trained / "run"
    run, ballast = small_disk / "run", small_disk / "ballast"
    run_stage("prepare", recipe_file, run)

    def fill_the_disk():
        while not any((run / "align/checkpoints").glob("step-*")):
            time.sleep(0.001)
        ballast.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 4096))

    other = threading.Thread(target=fill_the_disk, daemon=True)
    other.start()
    with pytest.raises(TbpoError, match="cannot be written: No space left on device") as error:
        run_stage("align", recipe_file, run)
    other.join()
    assert "give the same command again" in error.value.fix
    kept = {path.name for path in (run / "align/checkpoints").iterdir()}
    assert kept and all(name.startswith("step-") for name in kept), "no half of a checkpoint"
    ballast.unlink()
    run_stage("align", recipe_file, run)
    name = "align/adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (straight / name).read_bytes()


def test_a_disk_that_turned_read_only_stops_with_a_message(small_disk, recipe_file):
    run_stage("prepare", recipe_file, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(TbpoError, match="cannot be written: Read-only file system"):
        run_stage("align", recipe_file, small_disk / "run")
    assert RunDir(small_disk / "run").manifest("prepare")


# ------------------------------------------------------------------------------------------- damage


def damaged(content, rng):
    """Bytes with something done to them that disks, editors and people do."""
    place, other = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
    kind = rng.randrange(5)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[other:]
    if kind == 2:
        return content[:place] + rng.randbytes(rng.randrange(1, 9)) + content[place:]
    if kind == 3:
        return content[:other] + content[place:other] + content[other:]
    return (
        content[:place]
        + bytes(byte ^ (1 << rng.randrange(8)) for byte in content[place:other])
        + content[other:]
    )


@FUZZ
@given(seed=st.integers(0, 2**32))
def test_a_damaged_recipe_is_a_message(recipe_file, tmp_path, seed):
    text = recipe_file.read_bytes()
    path = tmp_path / "damaged.toml"
    path.write_bytes(damaged(text, random.Random(seed)))
    try:
        load_recipe(path)
    except TbpoError as error:
        assert error.what and error.where and str(path) in str(error)


@FUZZ
@given(
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    table=st.sampled_from(["run", "model", "data", "align", "sft", "eval", "sample", "push"]),
)
def test_a_recipe_of_any_values_is_a_message(tmp_path, content, table):
    import tomli_w

    raw = {"model": {"base": "a/b"}, "data": {"train": "a/b"}, table: content}
    path = tmp_path / "any.toml"
    try:
        path.write_text(tomli_w.dumps(raw), encoding="utf-8")
    except (TypeError, ValueError, UnicodeEncodeError):
        return
    try:
        load_recipe(path)
    except TbpoError as error:
        assert error.expected


@FUZZ
@given(seed=st.integers(0, 2**32))
def test_damaged_rows_are_a_message_or_are_left_out_and_counted(recipe_file, tmp_path, seed):
    """However the file is damaged, no row vanishes: rows = kept + left out."""
    rng = random.Random(seed)
    rows = write_jsonl(tmp_path / "rows.jsonl", preference_rows(6, seed=5))
    rows.write_bytes(damaged(rows.read_bytes(), rng))
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    try:
        run_stage("prepare", recipe_file, run, f"data.train={rows}", "data.max_reject_fraction=1.0")
    except TbpoError as error:
        assert error.what and error.where
        return
    counts = json.loads((run / "prepare/manifest.json").read_text())["counts"][-1]
    rejected = (run / "prepare/rejects.jsonl").read_text().splitlines()
    left_out = sum(counts["rejected"].values()) + counts["noted"].get("duplicate", 0)
    assert counts["rows"] == sum(counts["kept"].values()) + left_out
    assert len(rejected) == sum(counts["rejected"].values())


@pytest.mark.parametrize(
    "name", ["prepare/manifest.json", "align/manifest.json", "align/inputs.json"]
)
@FUZZ
@given(seed=st.integers(0, 2**32))
def test_a_damaged_manifest_is_noticed(recipe_file, finished, name, seed):
    path = finished / name
    whole = path.read_bytes()
    broken = damaged(whole, random.Random(seed))
    path.write_bytes(broken)
    try:
        plan("align", load_recipe(recipe_file), RunDir(finished))
        assert json.loads(broken) == json.loads(whole), "what is read is what was written"
    except TbpoError as error:
        assert "damaged" in error.what and error.where == str(path) and "move" in error.fix
    finally:
        path.write_bytes(whole)


@settings(FUZZ, max_examples=NUM_EXAMPLES // 6)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_checkpoint_never_counts_and_never_costs_the_good_one(
    recipe_file, trained, tmp_path, seed
):
    """Whatever happens to the newest checkpoint, the run goes on from it or from the one before,
    to the same end.
    """
    rng, run = random.Random(seed), tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(trained / "run", run)
    (run / "align/manifest.json").unlink()
    victim = rng.choice(sorted((run / "align/checkpoints/step-6").iterdir()))
    victim.write_bytes(damaged(victim.read_bytes(), rng))
    run_stage("align", recipe_file, run)
    name = "align/adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (trained / "run" / name).read_bytes()


@FUZZ
@given(seed=st.integers(0, 2**32))
def test_a_damaged_line_of_the_metrics_is_a_message(trained, tmp_path, seed):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        damaged((trained / "run/align/metrics.jsonl").read_bytes(), random.Random(seed))
    )
    try:
        read_metrics(path)
    except TbpoError as error:
        assert "metrics.jsonl, line " in error.where


def test_what_is_sealed_is_read_back_and_nothing_else(tmp_path):
    content = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    write_sealed(tmp_path / "x.json", content)
    assert read_sealed(tmp_path / "x.json") == content and read_sealed(tmp_path / "none.json") == {}
    (tmp_path / "x.json").write_text((tmp_path / "x.json").read_text().replace("2.5", "2.6"))
    with pytest.raises(TbpoError, match="damaged"):
        read_sealed(tmp_path / "x.json")


# ----------------------------------------------------------------------------------------- security


def test_weights_that_are_a_pickle_are_refused_with_the_way_to_convert_them(
    recipe_file, tmp_path, base
):
    folder = tmp_path / "pickled"
    shutil.copytree(base, folder)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(TbpoError, match="cannot be loaded") as error:
        run_stage("align", recipe_file, tmp_path / "run", f"model.base={folder}")
    assert "convert it once: python -c" in error.value.fix and str(folder) in error.value.fix


def test_an_adapter_that_is_a_pickle_is_refused(trained, recipe_file, tmp_path):
    helper = tmp_path / "helper"
    shutil.copytree(trained / "run/align/adapter", helper)
    torch.save({}, helper / "adapter_model.bin")
    (helper / "adapter_model.safetensors").unlink()
    with pytest.raises(TbpoError, match="a pickle is not loaded"):
        run_stage(
            "align",
            recipe_file,
            tmp_path / "run",
            "align.loss.name=tis_dpo",
            f"align.loss.positive={helper}",
            f"align.loss.negative={helper}",
        )


OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_code_of_a_model_runs_only_if_the_recipe_says_so_and_then_it_is_said_loudly(
    recipe_file, tmp_path, base, tbpo, executable, weights
):
    """The model's folder brings code that leaves a mark; without the key the mark is not made."""
    folder, mark = tmp_path / "remote", tmp_path / "mark"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["Own"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE.format(mark=str(mark)))
    sets = (f"model.base={folder}", f"model.initial_weights={weights}", "align.max_steps=1")
    override = [part for each in sets for part in ("--set", each)]
    refused = tbpo("align", recipe_file, "--run-dir", "a", *override)
    assert refused.returncode == 2 and not mark.exists()
    allow = ("--set", "model.trust_remote_code=true")
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    allowed = executable("align", recipe_file, "--run-dir", "b", *override, *allow, **cache)
    assert allowed.returncode == 0, allowed.stderr
    assert mark.exists() and "WARNING: model.trust_remote_code = true" in allowed.stderr


@pytest.mark.parametrize("name", ["../escape", "a/b", "/abs", "..", ""])
def test_a_runs_name_cannot_leave_the_run_directory(recipe_file, name):
    with pytest.raises(TbpoError, match=r"run\.name"):
        load_recipe(recipe_file, (f'run.name="{name}"',))


def test_secrets_of_the_environment_are_in_no_file_and_no_output(recipe_file, tmp_path, start):
    canary = "hf_canary0123456789"
    secrets = dict.fromkeys(
        ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"), canary
    )
    done = start("align", recipe_file, "--run-dir", "run", **secrets).finish()
    failed = start(
        "align", recipe_file, "--run-dir", "other", "--set", "model.base=org/none", **secrets
    ).finish()
    assert (done.returncode, failed.returncode) == (0, 2)
    said = [done.stdout, done.stderr, failed.stdout, failed.stderr]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(canary in text for text in said) and not any(
        canary.encode() in content for content in written
    )


# -------------------------------------------------------------------------------- what stages leave


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("prepare", "train/pairs.arrow"),
        ("align", "adapter/adapter_model.safetensors"),
        ("align", "adapter/tokenizer.json"),
        ("align", "curves.svg"),
        ("align", "inputs.json"),
    ],
)
@pytest.mark.parametrize("damage", ["deleted", "emptied", "bit flipped"])
def test_a_complete_stage_that_is_not_as_it_was_written_is_refused(
    finished, trained, stage, name, damage
):
    path = finished / stage / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "emptied" else content)
    with pytest.raises(TbpoError) as error:
        run_stage("align", trained / "tiny.toml", finished)
    assert str(path) in str(error.value)
    if name == "inputs.json" and damage != "deleted":
        return  # it carries its own hash, and tells what to move away
    assert f"the complete stage {stage} is not as it was written" in error.value.what
    assert "--restart" in error.value.fix
    run_stage("align", trained / "tiny.toml", finished, restart=True)
    assert not RunDir(finished).damage(stage) and (finished / f"{stage}.old-1").exists()


def test_a_restart_that_was_interrupted_goes_on_when_it_is_given_again(
    finished, trained, start, capsys
):
    more = ("--set", "align.max_steps=400", "--set", "align.eval_every=400")
    arguments = ("align", trained / "tiny.toml", "--run-dir", finished, "--restart", *more)
    process = start(*arguments)
    log = finished / "align/metrics.jsonl"
    process.wait_until(lambda: (finished / "align.old-1").exists() and log.exists())
    process.wait_until(lambda: log.read_text().count('"train"') > 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    done = start(*arguments).finish()
    assert done.returncode == 0 and "going on from step" in done.stderr
    assert not (finished / "align.old-2").exists()
    again = start(*arguments[:-4], "--restart", *more[:2], "--set", "align.eval_every=200").finish()
    assert again.returncode == 0 and (finished / "align.old-2").exists(), "a complete one is redone"


def test_an_input_that_was_replaced_behind_its_name_size_and_time_is_noticed(
    tmp_path, recipe_file, rows
):
    train = write_jsonl(tmp_path / "mine.jsonl", preference_rows(20))
    settings = (f"data.train={train}",)
    run = run_stage("prepare", recipe_file, tmp_path / "run", *settings)
    before = train.stat()
    train.write_bytes(train.read_bytes().replace(b"dog", b"cat", 1))
    os.utime(train, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert train.stat().st_size == before.st_size
    with pytest.raises(TbpoError, match="the inputs of a stage changed"):
        run_stage("prepare", recipe_file, run, *settings)


def test_a_module_that_a_scorer_imports_is_an_input(tmp_path):
    code = tmp_path / "scorer.py"
    code.write_text("import json\nfrom helper import K\n")
    (tmp_path / "helper.py").write_text("from pack import more\nK = 1\n")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/__init__.py").write_text("")
    (tmp_path / "pack/more.py").write_text("")
    (tmp_path / "unused.py").write_text("")
    found = files_of("judge.scorer", f"python:{code}:score", ("*",))
    names = {str(path.relative_to(tmp_path)) for path in found}
    assert names == {"scorer.py", "helper.py", "pack/__init__.py", "pack/more.py"}


def test_modules_in_folders_that_a_scorer_names_and_relative_imports_are_inputs(tmp_path):
    """`sys.path` is changed by the code; a folder may be named in parts."""
    code = tmp_path / "scorer.py"
    code.write_text(
        "import os, sys\nHERE = os.path.dirname(__file__)\n"
        "sys.path.insert(0, os.path.join(HERE, 'lib', 'helper'))\nimport hs\nimport pack.more\n"
    )
    (tmp_path / "lib/helper/pack").mkdir(parents=True)
    (tmp_path / "lib/unused").mkdir()
    (tmp_path / "lib/unused/hs.py").write_text("")
    (tmp_path / "lib/helper/hs.py").write_text("")
    (tmp_path / "lib/helper/pack/__init__.py").write_text("from . import words\n")
    (tmp_path / "lib/helper/pack/more.py").write_text("")
    (tmp_path / "lib/helper/pack/words.py").write_text("")
    found = files_of("judge.scorer", f"python:{code}:score", ("*",))
    names = {str(path.relative_to(tmp_path)) for path in found}
    inner = ("hs.py", "pack/__init__.py", "pack/more.py", "pack/words.py")
    assert names == {"scorer.py", *(f"lib/helper/{name}" for name in inner)}


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_lock_that_is_no_file_is_named_and_nothing_is_written_through_it(tmp_path, kind):
    run, other = RunDir(tmp_path / "run"), tmp_path / "other"
    run.path.mkdir()
    other.write_text("precious")
    lock = run.path / "lock"
    lock.mkdir() if kind == "folder" else lock.symlink_to(other)
    with pytest.raises(TbpoError, match="the lock of the run is a") as error, run.lock():
        pass
    assert error.value.where == str(lock) and error.value.fix.startswith(f"mv {lock}")
    assert other.read_text() == "precious"
