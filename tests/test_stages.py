"""What a user sees of the stages: up to date, resumed, changed inputs, exit codes."""

import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import change_recipe, preference_rows, run_stage, write_jsonl
from safetensors.torch import load_file

from tbpo_cli.data.store import PairStore
from tbpo_cli.errors import DivergenceError, TbpoError
from tbpo_cli.runs.files import read_sealed, write_sealed


def adapter(run):
    return load_file(run / "align/adapter/adapter_model.safetensors")


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


UNSTABLE = ("seconds", "pairs_per_s", "tokens_per_s", "peak_memory_gb")


def metrics(run, stage="align"):
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in UNSTABLE} for line in lines]


def test_align_prepares_first_trains_and_leaves_the_files_of_the_contract(trained):
    run = trained / "run"
    for name in (
        "recipe.toml",
        "prepare/manifest.json",
        "prepare/rejects.jsonl",
        "prepare/train",
        "prepare/eval",
        "align/metrics.jsonl",
        "align/manifest.json",
        "align/checkpoints/step-6",
    ):
        assert (run / name).exists(), name
    assert sorted(p.name for p in (run / "align/adapter").iterdir() if p.suffix != ".md") == [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert [(line["split"], line["step"]) for line in metrics(run)] == [
        ("eval", 0),
        *(("train", s) for s in (1, 2, 3)),
        ("eval", 3),
        *(("train", s) for s in (4, 5, 6)),
        ("eval", 6),
    ]
    assert not [p for p in run.rglob("*") if p.suffix in {".pt", ".pth", ".pkl", ".bin"}]
    kept = {path.name for path in (run / "align/checkpoints").iterdir()}
    assert kept == {"step-4", "step-6"}, "the newest two of three"
    manifest = json.loads((run / "align/manifest.json").read_text())
    assert manifest["seed"] == 0 and manifest["device"] == "cpu" and "torch" in manifest["versions"]
    assert set(manifest["outputs"]) >= {"adapter/adapter_model.safetensors", "metrics.jsonl"}


def test_every_log_step_has_all_metrics_and_the_others_what_they_know(trained):
    lines = metrics(trained / "run")
    every = {
        "loss",
        "accuracy",
        "margin",
        "reward_chosen",
        "reward_rejected",
        "token_accuracy",
        "kl",
        "reverse_kl",
        "entropy",
        "logps_chosen",
        "logps_rejected",
        "num_clipped",
    }
    before = {"accuracy", "token_accuracy"}  # absent while the policy is its reference
    for line in lines:
        if line["step"] == 0 or (line["split"], line["step"]) == ("train", 1):
            assert not before & line.keys()
            line |= dict.fromkeys(before)
        if line["split"] == "eval" or line["step"] % 2 == 0:
            assert every <= line.keys(), line["step"]
        else:
            assert (
                "kl" not in line
                and {"loss", "token_accuracy", "grad_norm", "learning_rate"} <= line.keys()
            )


def test_a_finished_adapter_loads_with_transformers_and_peft_with_the_trained_weights(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained / "run/align/adapter"
    loaded = {
        name: p
        for name, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()
        if "lora" in name
    }
    assert len(loaded) == len(adapter(trained / "run")) > 0
    for name, weight in adapter(trained / "run").items():
        wanted = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(loaded[wanted], weight), name
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_baseline_of_tbpo_q_learns_is_kept_to_go_on_with_and_is_never_published(
    recipe_file, tmp_path
):
    run = run_stage("align", recipe_file, tmp_path / "run", "align.loss.name=tbpo_q")
    before, after = ([line for line in metrics(run) if line["split"] == "eval"][i] for i in (0, -1))
    assert before["kl"] == pytest.approx(0, abs=1e-6) and after["kl"] > 1e-6
    checkpoint = run / "align/checkpoints/step-6"
    assert load_file(checkpoint / "baseline.safetensors")["parameter|out.weight"].abs().max() > 0
    for weights in (load_file(checkpoint / "policy.safetensors"), adapter(run)):
        assert not any("baseline" in name for name in weights)


def test_tis_dpo_weighs_tokens_by_two_helpers_that_it_can_train(recipe_file, tmp_path):
    """π⁺ by DPO, π⁻ by DPO on reversed pairs; TIS-DPO from both, as run directory and adapter."""
    dpo = ("align.loss.name=dpo", "align.learning_rate=1e-2")
    positive = run_stage("align", recipe_file, tmp_path / "positive", *dpo)
    negative = run_stage("align", recipe_file, tmp_path / "negative", *dpo, "align.reverse=true")
    first, mirrored = (metrics(run)[0] for run in (positive, negative))
    assert mirrored["logps_chosen"] == pytest.approx(first["logps_rejected"]), (
        "chosen and rejected changed places"
    )
    helpers = (
        f"align.loss.positive={positive}",
        f"align.loss.negative={negative / 'align/adapter'}",
    )
    run = run_stage("align", recipe_file, tmp_path / "tis", "align.loss.name=tis_dpo", *helpers)
    plain = run_stage("align", recipe_file, tmp_path / "dpo", "align.loss.name=dpo")
    assert metrics(run)[1]["loss"] == pytest.approx(metrics(plain)[1]["loss"]), (
        "both start at log 2"
    )
    assert metrics(run)[-2]["loss"] != metrics(plain)[-2]["loss"]
    manifest = json.loads((run / "align/manifest.json").read_text())
    assert set(manifest["inputs"]["files"]) >= {"align.loss.positive", "align.loss.negative"}
    with pytest.raises(TbpoError, match="the positive helper is not named"):
        run_stage("align", recipe_file, tmp_path / "none", "align.loss.name=tis_dpo")


def test_tgdpo_weighs_tokens_by_a_helper_that_another_run_has_trained(recipe_file, tmp_path):
    """A helper that is the reference gives every token weight 1, and so DPO."""
    dpo = ("align.loss.name=dpo", "align.learning_rate=1e-2")
    guide = run_stage("align", recipe_file, tmp_path / "guide", *dpo)
    same = run_stage("align", recipe_file, tmp_path / "same", *dpo, "align.learning_rate=1e-12")
    losses = {}
    for name, helper in (("guided", guide), ("unguided", same)):
        sets = ("align.loss.name=tgdpo", "align.loss.alpha=50.0", f"align.loss.guide={helper}")
        run = run_stage("align", recipe_file, tmp_path / name, *sets)
        losses[name] = metrics(run)[-2]["loss"]
    plain = metrics(run_stage("align", recipe_file, tmp_path / "dpo", "align.loss.name=dpo"))
    assert losses["unguided"] == pytest.approx(plain[-2]["loss"], rel=1e-5)
    assert losses["guided"] != pytest.approx(plain[-2]["loss"], rel=1e-3)
    manifest = json.loads((run / "align/manifest.json").read_text())
    assert "align.loss.guide" in manifest["inputs"]["files"]
    with pytest.raises(TbpoError, match="the guide helper is not named"):
        run_stage("align", recipe_file, tmp_path / "none", "align.loss.name=tgdpo")


def test_how_rows_attention_and_head_are_computed_is_said_and_in_the_manifest(
    recipe_file, tmp_path, capsys
):
    run = run_stage("align", recipe_file, tmp_path / "run", "align.max_steps=1")
    said = capsys.readouterr().err
    ways = json.loads((run / "align/manifest.json").read_text())["ways"]
    assert ways == {
        "rows": "shared_prompt: every prompt is read once, nothing is padded",
        "attention": "a call of torch's fused attention for each sequence",
        "head": "no policy logits: policy and reference have one frozen, linear head",
    }
    assert f"attention: {ways['attention']}; output head: {ways['head']}" in said
    assert "WARNING: a slower way" not in said
    eager = run_stage(
        "align", recipe_file, tmp_path / "eager", "align.max_steps=1", "model.attention=eager"
    )
    assert "WARNING: a slower way is taken: its attention is eager" in capsys.readouterr().err
    ways = json.loads((eager / "align/manifest.json").read_text())["ways"]
    assert ways["attention"] == "eager" and ways["slow"] == "its attention is eager"


def test_sft_comes_before_align_if_the_recipe_has_it(recipe_file, tmp_path):
    change_recipe(recipe_file, sft={"batch_examples": 8, "max_steps": 4, "learning_rate": 1e-2})
    run = run_stage("align", recipe_file, tmp_path / "run")
    losses = [line["loss"] for line in metrics(run, "sft") if line["split"] == "eval"]
    assert losses[-1] < losses[0]
    assert (run / "sft/adapter/adapter_model.safetensors").exists()
    first = next(line for line in metrics(run) if line["split"] == "eval")
    assert first["kl"] == pytest.approx(0, abs=1e-6), (
        "align starts where sft ended, and so does its reference"
    )


def test_sft_can_train_on_demonstrations_of_its_own(recipe_file, tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"]}
        for row in preference_rows(20, seed=3)
    ]
    demonstrations = write_jsonl(tmp_path / "demonstrations.jsonl", rows)
    change_recipe(recipe_file, sft={"batch_examples": 8, "max_steps": 2})
    run = run_stage("sft", recipe_file, tmp_path / "run", f"sft.train={demonstrations}")
    assert json.loads((run / "prepare/manifest.json").read_text())["counts"][-1]["kept"] == {
        "sft": 20
    }
    assert len(metrics(run, "sft")) == 4


def test_the_sft_loss_is_a_mean_over_tokens_whatever_the_micro_batches(recipe_file, tmp_path):
    change_recipe(recipe_file, sft={"batch_examples": 8, "max_steps": 3})
    runs = [
        run_stage(
            "sft",
            recipe_file,
            tmp_path / str(tokens),
            f"sft.max_tokens_per_device={tokens}",
            "model.lora.dropout=0.0",
        )
        for tokens in (60, 10_000)
    ]
    for first, second in zip(*(metrics(run, "sft") for run in runs), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)


def test_micro_batches_layouts_logs_and_checkpointing_change_the_result_by_rounding_alone(
    recipe_file, tmp_path
):
    """One loss with all that a step has, dropout too: test_layouts.py has every loss, in one
    pass.
    """
    settings = {
        "whole": (),
        "cut": ("align.max_tokens_per_device=120",),
        "padded": ("align.layout=padded",),
        "packed": ("align.layout=packed",),
        "ckpt": ("align.activation_checkpointing=true",),
        "logged": ("align.log_every=1",),
    }
    weights = {}
    for name, extra in settings.items():
        run = run_stage(
            "align",
            recipe_file,
            tmp_path / name,
            "model.lora.dropout=0.2",
            "align.loss.name=tbpo_q",
            "align.optimizer=rmsprop",
            "align.learning_rate=1e-4",
            *extra,
        )
        weights[name] = adapter(run)
    for name in settings.keys() - {"whole"}:
        for key, value in weights["whole"].items():
            torch.testing.assert_close(weights[name][key], value, rtol=1e-3, atol=2e-6)


# --------------------------------------------------------------------------- up to date, or changed


def test_a_finished_stage_is_up_to_date_and_is_not_touched(recipe_file, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    run_stage("align", recipe_file, finished)
    assert "align is up to date" in capsys.readouterr().err
    assert before == {
        path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    ("override", "line", "redone"),
    [
        ("align.learning_rate=0.002", "align.learning_rate: 0.001 → 0.002", "align"),
        ("align.loss.beta=0.5", "align.loss.beta: 0.1 → 0.5", "align"),
        ("data.max_length=300", "data.max_length: 2048 → 300", "prepare and align"),
        ("run.seed=1", "run.seed: 0 → 1", "prepare and align"),
    ],
)
def test_a_changed_recipe_stops_and_names_the_keys_and_what_they_invalidate(
    recipe_file, trained, finished, override, line, redone
):
    with pytest.raises(TbpoError) as error:
        run_stage("align", recipe_file, finished, override)
    assert (
        line in str(error.value)
        and f"--restart redoes {redone}" in error.value.fix
        and "--run-dir" in error.value.fix
    )
    assert_same_weights(adapter(finished), adapter(trained / "run"))


def test_restart_moves_the_old_folder_aside_and_deletes_nothing(recipe_file, trained, finished):
    run_stage("align", recipe_file, finished, "align.max_steps=2", restart=True)
    run_stage("align", recipe_file, finished, "align.max_steps=1", restart=True)
    old = load_file(finished / "align.old-1/adapter/adapter_model.safetensors")
    assert_same_weights(old, adapter(trained / "run"))
    assert (finished / "align.old-2/manifest.json").exists() and not (
        finished / "prepare.old-1"
    ).exists()


def of_an_earlier_version(run):
    manifest = read_sealed(run / "prepare/manifest.json")
    write_sealed(
        run / "prepare/manifest.json", {k: manifest[k] for k in manifest if k != "reading"}
    )


def test_pairs_that_an_earlier_version_may_have_exchanged_are_made_anew(recipe_file, tmp_path):
    """Numbers 1 and 2 for the better answer; also where a run beside it has them already."""
    rows = [
        {"prompt": row["prompt"], "response_a": row["chosen"], "response_b": row["rejected"]}
        | {"winner": 1 + number % 2}
        for number, row in enumerate(preference_rows(20, seed=4))
    ]
    sets = (f"data.train={write_jsonl(tmp_path / 'numbered.jsonl', rows)}",)
    runs = [tmp_path / "runs" / name for name in ("old", "new")]
    run_stage("prepare", recipe_file, runs[0], *sets)
    of_an_earlier_version(runs[0])
    with pytest.raises(TbpoError, match="rows of the format winner") as error:
        run_stage("align", recipe_file, runs[0], *sets)
    assert "--restart redoes prepare" in error.value.fix
    run_stage("prepare", recipe_file, runs[1], *sets)
    assert "copied_from" not in read_sealed(runs[1] / "prepare/manifest.json")
    run_stage("prepare", recipe_file, runs[0], *sets, restart=True)
    assert read_sealed(runs[0] / "prepare/manifest.json")["outputs"]
    run_stage("prepare", recipe_file, runs[0], *sets)


def test_pairs_of_an_earlier_version_that_read_the_same_are_kept(recipe_file, finished, capsys):
    of_an_earlier_version(finished)
    run_stage("align", recipe_file, finished)
    assert "align is up to date" in capsys.readouterr().err


def test_a_lost_manifest_of_prepare_is_named_with_the_command_that_makes_it(recipe_file, finished):
    (finished / "prepare/manifest.json").unlink()
    with pytest.raises(TbpoError, match="inputs of a stage changed") as error:
        run_stage("align", recipe_file, finished)
    assert f"{finished / 'prepare/manifest.json'} is missing" in error.value.expected
    assert error.value.fix.startswith("tbpo prepare RECIPE first")
    run_stage("prepare", recipe_file, finished)
    run_stage("align", recipe_file, finished)


SWALLOWS = """import os, signal, sys, transformers
of = getattr(transformers, sys.argv.pop(1))
load = of.from_pretrained.__func__

def swallow(cls, *given, **named):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        pass
    return load(cls, *given, **named)

of.from_pretrained = classmethod(swallow)
from tbpo_cli.cli.main import main
main()
"""


@pytest.mark.parametrize(
    ("command", "library", "made", "not_made"),
    [
        ("prepare", "AutoTokenizer", "prepare/manifest.json", "align"),
        ("align", "AutoTokenizer", "prepare/manifest.json", "align"),
        ("align", "AutoModelForCausalLM", "align/inputs.json", "align/checkpoints"),
    ],
)
def test_a_signal_that_a_library_swallows_ends_the_command_at_the_next_step(
    recipe_file, tmp_path, command, library, made, not_made
):
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWS, library, command, str(recipe_file), "--run-dir", "run"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 143 and "interrupted: nothing is lost" in done.stderr, done.stderr
    assert (tmp_path / "run" / made).exists() and not (tmp_path / "run" / not_made).exists()


def test_restart_redoes_an_earlier_stage_whose_inputs_changed(recipe_file, finished):
    run_stage("align", recipe_file, finished, "data.max_length=300", restart=True)
    assert all(
        (finished / name).exists()
        for name in ("prepare.old-1", "align.old-1", "align/manifest.json")
    )


def test_a_stage_that_failed_begins_anew_once_its_cause_is_mended(recipe_file, tmp_path):
    rows = [{"ask": row["prompt"], **row} for row in preference_rows(20, seed=4)]
    train = write_jsonl(
        tmp_path / "odd.jsonl", [{k: v for k, v in row.items() if k != "prompt"} for row in rows]
    )
    with pytest.raises(TbpoError, match="none of the known formats"):
        run_stage("prepare", recipe_file, tmp_path / "run", f"data.train={train}")
    run = run_stage(
        "prepare",
        recipe_file,
        tmp_path / "run",
        f"data.train={train}",
        'data.columns={prompt = "ask"}',
    )
    assert json.loads((run / "prepare/manifest.json").read_text())["counts"][-1]["kept"] == {
        "train": 20
    }


@pytest.mark.parametrize(
    "key", ["log_every", "checkpoint_every", "eval_every", "max_tokens_per_device", "layout"]
)
def test_keys_that_change_the_result_by_rounding_at_most_invalidate_nothing(
    recipe_file, finished, capsys, key
):
    value = "packed" if key == "layout" else 77
    run_stage("align", recipe_file, finished, f"align.{key}={value}")
    assert "align is up to date" in capsys.readouterr().err


def test_changed_rows_are_noticed_and_touched_or_moved_ones_are_not(
    recipe_file, tmp_path, rows, capsys
):
    mine = write_jsonl(tmp_path / "mine.jsonl", preference_rows(20, seed=4))
    source = f"data.train={mine}"
    run_stage("prepare", recipe_file, tmp_path / "run", source)
    mine.touch()
    moved = write_jsonl(tmp_path / "moved.jsonl", preference_rows(20, seed=4))
    for same in (source, f"data.train={moved}"):
        run_stage("prepare", recipe_file, tmp_path / "run", same)
        assert "prepare is up to date" in capsys.readouterr().err
    write_jsonl(mine, preference_rows(20, seed=5))
    with pytest.raises(TbpoError) as error:
        run_stage("prepare", recipe_file, tmp_path / "run", source)
    assert f"data.train: the content of {mine} changed" in str(error.value)


@pytest.mark.parametrize(
    "stages", [["prepare", "align"], ["prepare", "align", "sample"]], ids=["align", "prompt"]
)
def test_dry_run_says_what_would_run_and_writes_nothing(tbpo, recipe_file, tmp_path, stages):
    """Also of a prompt that is to be answered."""
    prompt = ["--prompt", "Hello"] if stages[-1] == "sample" else []
    result = tbpo(stages[-1], recipe_file, "--run-dir", "run", "--dry-run", *prompt)
    assert (result.returncode, result.stdout.splitlines()) == (
        0,
        [f"{stage}: would run" for stage in stages],
    )
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------- kill and go on


@pytest.fixture
def started(recipe_file, start):
    """Starts the real command and waits until metrics.jsonl says that some steps are done."""

    def started(run, steps, *overrides):
        process = start(
            "align",
            recipe_file,
            "--run-dir",
            run,
            *(part for one in overrides for part in ("--set", one)),
        )
        log = run / "align/metrics.jsonl"
        process.wait_until(lambda: log.exists() and log.read_text().count('"train"') >= steps)
        return process

    return started


LONG = (
    "align.max_steps=40",
    "align.eval_every=16",
    "align.loss.name=tbpo_q",
    "align.checkpoint_every=3",
)


def test_a_killed_run_goes_on_and_ends_with_the_same_adapter_and_metrics(
    recipe_file, tmp_path, started
):
    """SIGKILL twice in a run with LoRA dropout and a state baseline, over several epochs."""
    killed = tmp_path / "killed"
    for steps in (5, 22):
        process = started(killed, steps, *LONG)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    run_stage("align", recipe_file, killed, *LONG)
    whole = run_stage("align", recipe_file, tmp_path / "whole", *LONG)
    assert_same_weights(adapter(killed), adapter(whole))
    assert metrics(killed) == metrics(whole)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_writes_a_checkpoint_and_exits_with_its_code(tmp_path, started, number, code):
    run = tmp_path / "run"
    process = started(run, 2, "align.max_steps=400", "align.checkpoint_every=300")
    process.send_signal(number)
    done = process.finish()
    assert (
        done.returncode == code
        and "a checkpoint of step" in done.stderr
        and "Traceback" not in done.stderr
    )
    (checkpoint,) = (run / "align/checkpoints").iterdir()
    steps = [
        json.loads(line)["step"] for line in (run / "align/metrics.jsonl").read_text().splitlines()
    ]
    assert checkpoint.name == f"step-{max(steps)}"


def test_a_second_interrupt_stops_at_once_and_loses_only_the_steps_since_the_last_checkpoint(
    recipe_file, tmp_path, started
):
    run = tmp_path / "run"
    process = started(run, 8, *LONG, "align.batch_pairs=40")
    process.send_signal(signal.SIGINT)
    process.wait_until(lambda: "stopping" in process.err)
    process.send_signal(signal.SIGINT)
    assert process.wait() in (-signal.SIGINT, 130)
    run_stage("align", recipe_file, run, *LONG, "align.batch_pairs=40")
    whole = run_stage("align", recipe_file, tmp_path / "whole", *LONG, "align.batch_pairs=40")
    assert_same_weights(adapter(run), adapter(whole))
    assert metrics(run) == metrics(whole)


def test_a_damaged_checkpoint_is_named_and_skipped(recipe_file, trained, finished, capsys):
    (finished / "align/manifest.json").unlink()
    newest = finished / "align/checkpoints/step-6/policy.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x00")
    (finished / "align/checkpoints/step-4/checkpoint.json").rename(
        finished / "align/checkpoints/step-4/gone"
    )
    run_stage("align", recipe_file, finished)
    errors = capsys.readouterr().err
    assert (
        "step-6 is skipped: policy.safetensors is damaged" in errors
        and "step-4 is skipped: it is incom" in errors
    )
    assert_same_weights(adapter(finished), adapter(trained / "run"))
    assert metrics(finished) == metrics(trained / "run")


def test_divergence_stops_before_the_step_with_exit_3(recipe_file, tmp_path):
    with pytest.raises(DivergenceError) as error:
        run_stage(
            "align",
            recipe_file,
            tmp_path / "run",
            "align.learning_rate=1e30",
            "align.max_grad_norm=1e30",
            "align.optimizer=rmsprop",
            "align.max_steps=50",
            "align.checkpoint_every=1",
        )
    assert error.value.exit_code == 3
    named = re.search(
        r"step (\d+), pairs ([0-9a-f, ]+); the losses of the micro-batch are", error.value.where
    )
    kept = PairStore(tmp_path / "run/align/diverged")
    assert [pair.pair_id for pair in kept] == named[2].split(", "), (
        "the batch is there, to be run again alone"
    )
    facts = json.loads((tmp_path / "run/align/diverged/diverged.json").read_text())
    assert facts["step"] == int(named[1]) and len(facts["losses"]) == len(kept)
    last = f"align/checkpoints/step-{facts['step'] - 1}"
    assert error.value.expected.endswith(f"the last good state is {tmp_path / 'run' / last}")
    assert not (tmp_path / "run/align/manifest.json").exists()


# --------------------------------------------------------------------------------- the real command


def test_help_never_imports_torch():
    """`-X importtime` names every import."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tbpo_cli.cli.main", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "align" in result.stdout
    for library in ("torch", "transformers", "pydantic.dataclasses", "datasets"):
        assert f" {library}\n" not in result.stderr, library


@pytest.mark.parametrize(
    ("end", "flags"), [("sys.exit(0)", ()), ("os._exit(0)", ("--gpus", "2", "--cpu"))]
)
def test_code_of_a_model_that_ends_the_process_is_no_success(
    tbpo, recipe_file, base, tmp_path, end, flags
):
    folder = shutil.copytree(base, tmp_path / "own")
    code = (
        "import os, sys\nfrom transformers import LlamaForCausalLM\n"
        f"class Own(LlamaForCausalLM):\n    def forward(self, *_, **__):\n        {end}\n"
    )
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    sets = ("--set", f"model.base={folder}", "--set", "model.trust_remote_code=true")
    done = tbpo("align", recipe_file, "--run-dir", tmp_path / "run", *sets, *flags)
    assert done.returncode == 2, done.stderr
    assert "the stage align ended and is not complete" in done.stderr
    assert not (tmp_path / "run/align/manifest.json").exists()
