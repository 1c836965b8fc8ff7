"""What users get wrong, by the real command: each message says what, where, what was expected and
what to do.
"""

import gzip
import json
import os
import resource
import shutil
import signal
import time

import httpx
import pytest
import torch
from conftest import change_recipe, command, preference_rows, write_jsonl, write_recipe
from hub_server import hub
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from transformers import AutoTokenizer

from tbpo_cli.cli.last_resort import PACKAGE, message_for
from tbpo_cli.config.recipe import Model
from tbpo_cli.data.limits import at_most, limited
from tbpo_cli.data.tokenizer import load_chat
from tbpo_cli.errors import TbpoError

FULL = ("error:", "where:", "expected:", "fix:")


class Scene:
    """A folder with a recipe, its rows and its base, all of which may be spoilt."""

    def __init__(self, folder, base):
        self.folder, self._base = folder, base
        self.rows = write_jsonl(folder / "rows.jsonl", preference_rows(24))
        held_out = write_jsonl(folder / "held-out.jsonl", preference_rows(4, seed=1))
        self.recipe = write_recipe(folder / "mine.toml", base, (self.rows, held_out))

    def base(self):
        """A copy of the base, named by the recipe."""
        copy = self.folder / "base"
        shutil.copytree(self._base, copy)
        change_recipe(self.recipe, model={"base": str(copy)})
        return copy


def sets(command, *overrides):
    """The command with --set; nothing else is wrong."""
    return lambda scene: [
        command,
        scene.recipe,
        *(part for one in overrides for part in ("--set", one)),
    ]


def recipe_says(command="prepare", **changes):
    def provoke(scene):
        change_recipe(scene.recipe, **changes)
        return [command, scene.recipe]

    return provoke


def rows_are(content, name="rows.jsonl", *overrides, command="prepare"):
    """The training rows are this text, these bytes, or these rows."""

    def provoke(scene):
        path = scene.folder / name
        if isinstance(content, list):
            write_jsonl(path, content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        sets = (f"data.train={path}", *overrides)
        return [command, scene.recipe, *(part for one in sets for part in ("--set", one))]

    return provoke


def base_with(change, command="align"):
    """A base in which a file was changed: {name: None to remove it, bytes, or a dict that is
    merged into its JSON}.
    """

    def provoke(scene):
        base = scene.base()
        for name, content in change.items():
            path = base / name
            if content is None:
                path.unlink()
            elif isinstance(content, dict):
                path.write_text(json.dumps(json.loads(path.read_text()) | content))
            else:
                path.write_bytes(content)
        return [command, scene.recipe]

    return provoke


def after(stage, then):
    """`then`, once a first command has gone well."""

    def provoke(scene):
        done = command(stage, scene.recipe, "--set", "align.max_steps=2", cwd=scene.folder)
        assert done.returncode == 0, done.stderr
        return then(scene)

    return provoke


def recipe_is(content):
    def provoke(scene):
        scene.recipe.write_bytes(content)
        return ["prepare", scene.recipe]

    return provoke


def file_in_the_way(scene):
    (scene.folder / "taken").write_text("")
    return ["prepare", scene.recipe, "--run-dir", scene.folder / "taken"]


def run_in_use(scene):
    from tbpo_cli.runs.run_dir import RunDir

    scene.held = RunDir(scene.folder / "run").lock()
    scene.held.__enter__()
    return ["prepare", scene.recipe, "--run-dir", scene.folder / "run"]


def damaged_manifest(scene):
    path = scene.folder / "runs/mine/prepare/manifest.json"
    path.write_text(path.read_text().replace("seconds", "secands"))
    return ["prepare", scene.recipe]


def prompts_file(line):
    def then(scene):
        path = scene.folder / "prompts.jsonl"
        path.write_text(line + "\n")
        return [
            "sample",
            scene.recipe,
            "--set",
            f"sample.prompts={path}",
            "--set",
            "align.max_steps=2",
        ]

    return after("align", then)


def other_vocabulary(scene):
    """A tokenizer with more ids than the model has embeddings."""
    config = scene.base() / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 50}))
    return ["align", scene.recipe, "--set", "model.initial_weights=random"]


def saved_without_split(scene):
    import datasets

    datasets.DatasetDict({"all": datasets.Dataset.from_list(preference_rows(4))}).save_to_disk(
        scene.folder / "saved"
    )
    return ["prepare", scene.recipe, "--set", f"data.train={scene.folder / 'saved'}"]


def starter_is_there(scene):
    (scene.folder / "quickstart.toml").write_text("")
    return ["init", "quickstart"]


def after_rejects(scene):
    write_jsonl(scene.rows, [*preference_rows(24), {"prompt": "no answer"}])
    assert command("prepare", scene.recipe, cwd=scene.folder).returncode == 0
    return ["prepare", scene.recipe, "--set", "data.max_reject_fraction=0.0"]


def recipe_text(line):
    def provoke(scene):
        scene.recipe.write_text(f"{line}\n{scene.recipe.read_text()}")
        return ["show", scene.recipe]

    return provoke


PAIR = preference_rows(1)[0]
MISTAKES = {
    # ---------------------------------------------------------------------------------- the command
    "a typo in the command": (lambda s: ["algin", s.recipe], ("No such command 'algin'", "align")),
    "a typo in an option": (
        lambda s: ["align", s.recipe, "--restat"],
        ("No such option: --restat", "--restart"),
    ),
    "no recipe": (lambda s: ["align"], ("Missing argument 'RECIPE'",)),
    "a number that is none": (
        lambda s: ["align", s.recipe, "--gpus", "two"],
        ("--gpus", "a valid integer"),
    ),
    "no process at all": (
        lambda s: ["align", s.recipe, "--gpus", "0"],
        ("--gpus", "greater than or equal to 1"),
    ),
    "a starter that is none": (
        lambda s: ["init", "quikstart"],
        ("there is no recipe 'quikstart'", "quickstart"),
    ),
    "a starter that is there": (
        starter_is_there,
        ("quickstart.toml is there already", "move it away"),
    ),
    "--set without a value": (
        sets("prepare", "seed"),
        ("--set is not understood", "table.key=value", "run.seed"),
    ),
    "--set without a table": (
        sets("prepare", "seed=1"),
        ("--set is not understood", "--set seed=1"),
    ),
    "--set of an unknown key": (
        sets("prepare", "align.lerning_rate=1"),
        (*FULL, "align.lerning_rate is an unknown key", "align.learning_rate?"),
    ),
    # ----------------------------------------------------------------------------------- the recipe
    "a recipe that is not there": (
        lambda s: ["align", s.folder / "mime.toml"],
        (*FULL, "there is no such recipe", "mime.toml", "did you mean", "mine.toml?"),
    ),
    "a folder for a recipe": (lambda s: ["align", s.folder], (*FULL, "the recipe is a folder")),
    "a recipe that is not text": (
        recipe_is(b"\xff\xfe[model]"),
        (*FULL, "not UTF-8", "byte 0", "save it as UTF-8"),
    ),
    "a recipe that is not TOML": (
        recipe_is(b"[model]\nbase = a/b\n"),
        (*FULL, "a text without quotes", "line 2", "quotes"),
    ),
    "an empty recipe": (
        recipe_is(b""),
        (*FULL, "model is missing", "data is missing", "add a table [model]"),
    ),
    "no base": (
        recipe_is(b'[model]\n[data]\ntrain = "x.jsonl"\n'),
        (*FULL, "model.base is missing", "add base = …"),
    ),
    "no rows": (
        recipe_is(b'[model]\nbase = "a/b"\n[data]\n'),
        (*FULL, "data.train is missing", "add train = …"),
    ),
    "an unknown table": (
        recipe_says(algn={}),
        (*FULL, "algn is an unknown table", "did you mean align?"),
    ),
    "an unknown key": (
        recipe_says(align={"lr": 1}),
        (*FULL, "align.lr is an unknown key", "[align] lr", "a key of [align]"),
    ),
    "a typo in a key": (
        recipe_says(align={"warmpu": 0.1}),
        (*FULL, "align.warmpu", "did you mean align.warmup?"),
    ),
    "another program's key": (
        recipe_says(sft={"batch_pairs": 8}),
        (*FULL, "sft.batch_pairs is an unknown key", "batch_examples?"),
    ),
    "text for a number": (
        sets("prepare", 'align.warmup="1"'),
        (*FULL, 'align.warmup = "1" is not possible'),
    ),
    "percent for a share": (
        sets("prepare", "align.warmup=5"),
        (*FULL, "align.warmup = 5", "a share of the steps from 0 to 1", "for 5 %, warmup = 0.05"),
    ),
    "no pairs a step": (
        sets("prepare", "align.batch_pairs=0"),
        (*FULL, "align.batch_pairs = 0", "at least 1"),
    ),
    "a rate below 0": (
        sets("prepare", "align.learning_rate=-1e-5"),
        (*FULL, "align.learning_rate", "more than 0"),
    ),
    "a rate without end": (
        sets("prepare", "align.learning_rate=inf"),
        (*FULL, "align.learning_rate", "finite"),
    ),
    "an unknown loss": (
        sets("prepare", "align.loss.name=tbp_a"),
        (*FULL, "align.loss.name = 'tbp_a' is unknown", "fix: --set align.loss.name=tbpo_a"),
    ),
    "an unknown optimizer": (
        sets("prepare", "align.optimizer=adam"),
        (*FULL, 'align.optimizer = "adam"', "'rmsprop'", "fix: --set align.optimizer=adamw"),
    ),
    "an unknown schedule": (
        sets("prepare", "align.schedule=cosin"),
        (*FULL, "fix: --set align.schedule=cosine"),
    ),
    "an unknown dtype": (
        sets("prepare", "model.dtype=bfloat"),
        (*FULL, 'model.dtype = "bfloat"', "fix: --set model.dtype=bfloat16"),
    ),
    "an unknown layout": (
        sets("prepare", "align.layout=packd"),
        (*FULL, "fix: --set align.layout=packed"),
    ),
    "an unknown sharding": (
        sets("prepare", "align.sharding=fspd"),
        (*FULL, "fix: --set align.sharding=fsdp"),
    ),
    "an unknown tracker": (
        sets("prepare", 'run.trackers=["wandbb"]'),
        (*FULL, "run.trackers", """fix: --set 'run.trackers=["wandb"]'"""),
    ),
    "a day that is none": (
        sets("prepare", "data.template_date=today"),
        (*FULL, "data.template_date", "YYYY-MM-DD"),
    ),
    "4 bits without LoRA": (
        recipe_says(model={"lora": None, "quantization": "nf4"}),
        (*FULL, "model.quantization is not possible", "a table [model.lora]"),
    ),
    "4 bits sharded": (
        sets("prepare", "model.quantization=nf4", "align.sharding=fsdp"),
        (*FULL, "align.sharding", "cannot be fsdp"),
    ),
    "several at once": (
        sets("prepare", "align.layuot=padded", "data.overlong=dorp", "model.dtyp=auto"),
        (
            *FULL,
            "did you mean align.layout?",
            "--set data.overlong=drop",
            "did you mean model.dtype?",
        ),
    ),
    # ------------------------------------------------------------------------------------- the rows
    "rows that are not there": (
        sets("prepare", "data.train=rows.json"),
        (*FULL, "data.train names a file that is not there", "--set data.train="),
    ),
    "rows that are not there, shown": (
        sets("show", "data.train=rows.json"),
        (*FULL, "data.train names a file that is not there"),
    ),
    "no row": (rows_are(""), (*FULL, "data.train has no rows", "at least one row")),
    "a broken line": (
        rows_are(json.dumps(PAIR) + "\n{'prompt': 1}\n"),
        (*FULL, "the line cannot be read", "rows.jsonl, line 2"),
    ),
    "lines that are not text": (
        rows_are(b'{"prompt": "\xff"}\n'),
        (*FULL, "the line is not in UTF-8", "line 1", "in UTF-8"),
    ),
    "lines that are no objects": (
        rows_are("1\n2\n"),
        (*FULL, "none of the known formats", "it is int, without names"),
    ),
    "other columns": (
        rows_are([{"question": "a", "good": "b", "bad": "c"}]),
        (
            *FULL,
            "none of the known formats",
            "question ('a'), good ('b'), bad ('c')",
            "prompt, chosen, rejected",
            '[data.columns] prompt = "question" chosen = "good" rejected = "bad"',
        ),
    ),
    "the same twice": (
        rows_are([PAIR | {"rejected": PAIR["chosen"]}] * 3),
        (
            *FULL,
            "3 of 3 rows of data.train cannot be used, 3 identical",
            "rejects.jsonl",
            "give rows whose answers differ",
        ),
    ),
    "everything too long": (
        sets("prepare", "data.max_length=4"),
        (*FULL, "4 of 4 rows of data.eval cannot be used, 4 overlong", "raise data.max_length"),
    ),
    "a damaged archive": (
        rows_are(gzip.compress(b"{}\n" * 99)[:-9], "rows.jsonl.gz"),
        (*FULL, "the compressed file is damaged", "again"),
    ),
    "a table of another kind": (
        rows_are(b"PK", "rows.xlsx"),
        (*FULL, "data.train is of an unknown kind", ".csv", "convert"),
    ),
    "a table with gaps": (
        rows_are("prompt,chosen,rejected\na,b\n", "rows.csv"),
        (*FULL, "2 fields, but the first line names 3", "line 2"),
    ),
    "a damaged parquet file": (
        rows_are(b"PAR1", "rows.parquet"),
        (*FULL, "data.train cannot be read", "rows.parquet"),
    ),
    "a split that is none": (
        saved_without_split,
        (*FULL, "data.train cannot be read: KeyError", "split 'train'"),
    ),
    "held-out rows that are not there": (
        sets("prepare", "data.eval=none.jsonl"),
        (*FULL, "data.eval names a file that is not there"),
    ),
    "demonstrations for align": (
        rows_are(
            [{"prompt": r["prompt"], "completion": r["chosen"]} for r in preference_rows(9)],
            command="align",
        ),
        (*FULL, "they have no rejected responses", "demonstrations are for `tbpo sft`"),
    ),
    "a prompt that is none": (
        prompts_file('{"text": "a"}'),
        (*FULL, "a prompt cannot be used", "prompts.jsonl, row 1"),
    ),
    # ------------------------------------------------------------------------------------ the model
    "a base that is not there": (
        sets("align", "model.base=./nowhere"),
        (*FULL, "model.base names a file that is not there", "nowhere", "--set model.base="),
    ),
    "a base without a config": (
        base_with({"config.json": None}),
        (*FULL, "cannot be loaded", "model.base"),
    ),
    "a base with a broken config": (
        base_with({"config.json": b"{"}),
        (*FULL, "cannot be loaded", "model.base"),
    ),
    "a base without a tokenizer": (
        base_with({"tokenizer.json": None, "tokenizer_config.json": None}, "prepare"),
        (*FULL, "tokenizer", "model.base"),
    ),
    "a base without a chat template": (
        base_with({"chat_template.jinja": None}, "prepare"),
        (*FULL, "no chat template", "model.chat_template"),
    ),
    "a base without weights": (
        base_with({"model.safetensors": None}),
        (*FULL, "the model cannot be loaded", "safetensors"),
    ),
    "a base with damaged weights": (
        base_with({"model.safetensors": b"\x08" + b"\0" * 99}),
        (*FULL, "the model cannot be loaded", "model.base"),
    ),
    "an unknown architecture": (
        base_with({"config.json": {"model_type": "lama", "architectures": []}}),
        (*FULL, "cannot be loaded", "model.base"),
    ),
    "another model's tokenizer": (
        other_vocabulary,
        (*FULL, "the tokenizer has an id that the model has no embedding for", "ids below 50"),
    ),
    "a template that is not there": (
        sets("prepare", "model.chat_template=none.jinja"),
        (*FULL, "model.chat_template", "none.jinja"),
    ),
    "a template that is no template": (
        rows_are("{% for", "chat.jinja", "data.train=rows.jsonl", "model.chat_template=chat.jinja"),
        (*FULL, "the chat template is no Jinja template", "line 1", "model.chat_template"),
    ),
    "one of the layers has a typo": (
        sets("align", 'model.lora.target_modules=["q_proj", "v_prj"]'),
        (*FULL, "no layer is called v_prj", '"all-linear"'),
    ),
    "layers that LoRA does not find": (
        sets("align", 'model.lora.target_modules=["query"]'),
        (*FULL, "the adapter does not fit the model", '"all-linear"'),
    ),
    "attention that cannot": (
        sets("align", "model.attention=eager", "align.layout=packed"),
        (*FULL, "its attention is eager", "layout = 'packed'", 'layout = "auto"'),
    ),
    "attention that is not installed": (
        sets("align", "model.attention=flash_attention_2"),
        (*FULL, "the model cannot be loaded", "model.attention"),
    ),
    "helpers that are not named": (
        sets("align", "align.loss.name=tis_dpo"),
        (*FULL, "the positive helper is not named", "align.loss.positive"),
    ),
    "a helper that is not there": (
        sets(
            "align",
            "align.loss.name=tis_dpo",
            "align.loss.positive=./none",
            "align.loss.negative=./none",
        ),
        (*FULL, "align.loss.positive", "none"),
    ),
    "a tracker that is not installed": (
        sets("align", 'run.trackers=["trackio"]'),
        (*FULL, "trackio is not installed", "pip install trackio"),
    ),
    # -------------------------------------------------------------------------------------- the Hub
    "a base that nobody published": (
        sets("prepare", "model.base=nobody/nothing"),
        (*FULL, "the tokenizer cannot be loaded", "check model.base"),
    ),
    "rows that nobody published": (
        sets("prepare", "data.train=nobody/nothing"),
        (*FULL, "data.train cannot be read", "nobody/nothing", "Hub"),
    ),
    # --------------------------------------------------------------------------------- the machines
    "more GPUs than there are": (
        lambda s: ["align", s.recipe, "--gpus", "64"],
        (*FULL, "64 GPUs are asked for, and", "--gpus"),
    ),
    "4 bits on a CPU": (
        sets("align", "model.quantization=nf4"),
        (*FULL, "4-bit weights need", "quantization"),
    ),
    "machines without a rank": (
        lambda s: ["align", s.recipe, "--nodes", "2"],
        (*FULL, "the machines do not find each other", "--node-rank K"),
    ),
    "a rank beyond the machines": (
        lambda s: ["align", s.recipe, "--nodes", "2", "--node-rank", "2", "--main-address", "a:1"],
        (*FULL, "the machines do not find each other", "the number of this machine, from 0"),
    ),
    "an address without a port": (
        lambda s: ["align", s.recipe, "--nodes", "2", "--node-rank", "1", "--main-address", "a"],
        (*FULL, "the machines do not find each other", "HOST:PORT"),
    ),
    # -------------------------------------------------------------------------------- an evaluation
    "samples of another adapter": (
        sets("eval", "sample.adapter=other/tuned"),
        (
            *FULL,
            "another model than the figures",
            "sample.adapter = 'other/tuned'",
            "--against other/tuned",
        ),
    ),
    "a judge without an address": (
        sets("eval", "judge.model=judge"),
        (*FULL, "judge.endpoint is not possible", "given together"),
    ),
    "a judge without a name": (
        sets("eval", 'judge.endpoint="http://127.0.0.1:9/v1"'),
        (*FULL, "judge.endpoint is not possible", "given together"),
    ),
    "a judge that names nobody": (
        sets("eval", "judge.concurrency=2"),
        (*FULL, "judge.scorer is not possible", "or reward_model, or endpoint and model"),
    ),
    "a key of a language model beside a function": (
        sets("eval", "judge.scorer=python:x.py:f", "judge.repeats=3"),
        (*FULL, "judge.repeats is not possible", "of a language model"),
    ),
    "a scale that goes down": (
        sets("eval", "judge.scorer=python:x.py:f", "judge.scale=[10.0, 1.0]"),
        (*FULL, "judge.scale is not possible", "the lowest and the highest mark"),
    ),
    "the scorer where it was": (
        sets("eval", "eval.scorer=python:x.py:f"),
        (*FULL, "eval.scorer is an unknown key", "it is called judge.scorer now"),
    ),
    "the reward model where it was": (
        sets("eval", "eval.reward_model=x"),
        (*FULL, "eval.reward_model is an unknown key", "it is called judge.reward_model now"),
    ),
    "a served policy without a name": (
        sets("sample", 'sample.endpoint="http://127.0.0.1:9/v1"'),
        (*FULL, "sample.endpoint", "given together"),
    ),
    "an unknown opponent": (
        sets("eval", 'eval.opponents=["referense"]'),
        (*FULL, "eval.opponents", """fix: --set 'eval.opponents=["reference"]'"""),
    ),
    "a scorer that is not there": (
        sets("eval", "judge.scorer=python:none.py:score"),
        (*FULL, "judge.scorer", "none.py"),
    ),
    # ------------------------------------------------------------------------- the disk and the run
    "a file in the way": (
        file_in_the_way,
        (*FULL, "the run directory cannot be written", "--run-dir"),
    ),
    "nowhere to write": (
        lambda s: ["prepare", s.recipe, "--run-dir", "/proc/none"],
        (*FULL, "cannot be written", "/proc/none", "--run-dir"),
    ),
    "a run in use": (
        run_in_use,
        (*FULL, f"the run is in use by process {os.getpid()}", "another --run-dir"),
    ),
    "a damaged manifest": (
        after("prepare", damaged_manifest),
        (*FULL, "a file of the run is damaged", "prepare/manifest.json", "move"),
    ),
    "a changed recipe": (
        after("align", sets("align", "align.max_steps=2", "align.loss.beta=0.5")),
        (
            *FULL,
            "the inputs of a stage changed",
            "align.loss.beta: 0.1 → 0.5",
            "--restart redoes align",
        ),
    ),
    "a key without --set": (
        lambda s: ["align", s.recipe, "align.max_steps=2"],
        (*FULL, "align.max_steps=2 is not understood", "--set align.max_steps=2"),
    ),
    "ids of nothing": (
        lambda s: ["prepare", s.recipe, "--ids"],
        (*FULL, "--ids needs --show", "--show 3 --ids"),
    ),
    "a second recipe": (
        lambda s: ["sft", s.recipe, "b.toml"],
        (*FULL, "b.toml is not understood", "leave it out"),
    ),
    "flags for a launcher that is not needed": (
        lambda s: ["align", s.recipe, "--", "--num_cpu_threads_per_process=2"],
        (*FULL, "one process takes no flags", "-- --num_cpu_threads_per_process=2", "--gpus N"),
    ),
    "a prompt for several processes": (
        lambda s: ["sample", s.recipe, "--prompt", "a", "--gpus", "2"],
        (*FULL, "--prompt is answered in one process", "sample.prompts=FILE"),
    ),
    "an answer before there is a policy": (
        lambda s: ["sample", s.recipe, "--prompt", "a"],
        (*FULL, "the run has no aligned policy", "tbpo align RECIPE"),
    ),
    "a temperature below 0": (
        sets("sample", "sample.temperature=-1"),
        (*FULL, "sample.temperature = -1 is not possible", "at least 0"),
    ),
    "sft without a table": (
        lambda s: ["sft", s.recipe],
        (*FULL, "the recipe has no SFT stage", "add [sft]"),
    ),
    # ------------------------------------------------------------------------ what nothing reads,
    # or can bear
    "a split of a file": (
        recipe_says(data={"train": [{"path": "rows.jsonl", "split": "x"}]}),
        (*FULL, "split is of a data set, and path is a file"),
    ),
    "a revision of local rows": (
        recipe_says(data={"train": [{"path": "rows.jsonl", "revision": "x"}]}),
        (*FULL, "revision is of a Hub data set, and path is local"),
    ),
    "a revision of a folder": (
        sets("prepare", "model.revision=abc"),
        (*FULL, "revision is of a Hub repository, and base is a folder"),
    ),
    "a split that no source has": (
        sets("prepare", "data.eval_split=validation"),
        (*FULL, "eval_split is not read"),
    ),
    "a column that no row has": (
        sets("prepare", "data.columns={prompt='question'}"),
        (*FULL, 'data.columns.prompt = "question" names a column that no row has'),
    ),
    "a lower limit of rejects on a complete stage": (
        after_rejects,
        (*FULL, "1 of 25 rows of data.train cannot be used"),
    ),
    "a recipe that is nested too deeply": (
        recipe_text("x = " + "[" * 5000 + "]" * 5000),
        (*FULL, "the recipe is nested too deeply"),
    ),
    "a number of thousands of digits": (
        recipe_text("x = " + "9" * 5000),
        (*FULL, "the recipe has a value that cannot be read"),
    ),
    "a path that no system has": (
        sets("prepare", "data.train=./" + "a" * 300),
        (*FULL, "a path cannot be used: File name too long"),
    ),
    "the home of nobody": (
        sets("prepare", "model.base=~nosuchuser/x"),
        (*FULL, "a path cannot be used"),
    ),
    "a number that is not a number": (
        sets("align", "align.loss={name='simpo',gamma=nan}"),
        (*FULL, "align.loss.gamma is nan", "a finite number"),
    ),
}


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (LOOP, "takes more than 0.5 s for one conversation"),
        (
            "{% for message in messages %}{{ 'a' * 200000000 }}{% endfor %}",
            "takes more than 0.125 GiB of memory for one conversation",
        ),
    ],
)
def test_a_template_that_does_not_end_or_prints_without_end_is_stopped(
    tmp_path, base, monkeypatch, template, says
):
    monkeypatch.setattr("tbpo_cli.data.limits.MAX_SECONDS", 0.5)
    monkeypatch.setattr("tbpo_cli.data.limits.MAX_BYTES", 2**27)
    scene = Scene(tmp_path, base)
    (tmp_path / "t.jinja").write_text(template)
    template = f"model.chat_template={tmp_path / 't.jinja'}"
    done = command("prepare", scene.recipe, "--set", template, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr, done.stderr


def test_the_limits_of_a_program_end_with_it():
    """No alarm, no bound of memory and no handler is left behind, also by one that failed."""

    def limits():
        alarm, memory = signal.getitimer(signal.ITIMER_REAL), resource.RLIMIT_AS
        return alarm, resource.getrlimit(memory), signal.getsignal(signal.SIGALRM)

    before = limits()
    with at_most(60, 2**30):
        assert 0 < limits()[0][0] <= 60 and limits()[1] != before[1]
    assert limits() == before
    with pytest.raises(ValueError, match="broken"), at_most(60, 2**30):
        raise ValueError("broken")
    assert limits() == before


OF_ONE_ROW = {
    "loops": (LOOP, "takes more than 0.5 s"),
    "prints": ("{{ m.content * 400000000 }}", "takes more than 1 GiB of memory"),
    "computes": ("{{ 9 ** (m.content | length ** 15) }}", "takes more than"),
}


@pytest.mark.parametrize(("does", "workers"), [*((does, 1) for does in OF_ONE_ROW), ("prints", 2)])
def test_a_template_that_does_not_end_on_one_row_is_stopped_and_the_row_named(
    tmp_path, base, monkeypatch, does, workers
):
    """Row 5 of data.train, and a prompt to sample from."""
    what, says = OF_ONE_ROW[does]
    if workers == 1:  # another process has the 10 s
        monkeypatch.setattr("tbpo_cli.data.limits.MAX_SECONDS", 0.5)
    scene = Scene(tmp_path, base)
    rows = [*preference_rows(24)]
    rows[4]["prompt"] = "purple"
    write_jsonl(scene.rows, rows)
    plain = AutoTokenizer.from_pretrained(base).chat_template
    if_purple = "{% for m in messages %}{% if 'purple' in m.content %}"
    (tmp_path / "t.jinja").write_text(f"{if_purple}{what}{{% endif %}}{{% endfor %}}{plain}")
    sets = ("--set", f"model.chat_template={tmp_path / 't.jinja'}")
    done = command("prepare", scene.recipe, *sets, "--set", f"data.workers={workers}", cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert f"met in {scene.rows}, row 5" in done.stderr
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "red"}, {"prompt": "purple"}])
    sets += ("--set", f"sample.prompts={prompts}", "--set", "sample.models=['reference']")
    done = command("sample", scene.recipe, *sets, cwd=tmp_path)
    assert done.returncode == 2 and f"met in {prompts}, row 2" in done.stderr, done.stderr


def test_a_process_that_was_stopped_for_a_while_has_not_rendered_for_so_long(monkeypatch):
    """Only what is computed counts: sleep is not."""
    monkeypatch.setattr("tbpo_cli.data.limits.MAX_SECONDS", 0.2)
    assert limited(lambda: time.sleep(0.6) or "rendered")() == "rendered"


def test_an_error_of_the_system_or_a_library_names_the_input_and_a_bug_has_its_traceback(tmp_path):
    """A library fails below the loading of a model; then a function of ours does."""
    code = "class Broken:\n    def __init__(self, *_, **__): raise KeyError('of the library')\n"
    library = compile(code, "/x/site-packages/library/broken.py", "exec")
    names = {}
    exec(library, names)
    failing = message_of(lambda: called_in("model/load.py", names["Broken"]))
    assert "library cannot use an input: KeyError" in str(failing) and "model.base" in failing.where
    (tmp_path / "weights").write_bytes(b"1234567890")  # a library in Rust has no frame
    opened = {"function": lambda: None, "open": safe_open, "path": tmp_path / "weights"}
    rust = compile("open(path, 'pt')", str(PACKAGE / "model/load.py"), "exec")
    assert "safetensors cannot use an input" in str(message_of(lambda: exec(rust, opened)))
    assert message_of(lambda: called_in("model/load.py", ours_fails)) is None
    assert message_of(lambda: called_in("train/loop.py", names["Broken"])) is None
    assert "out of memory" in message_for(torch.OutOfMemoryError("CUDA out of memory")).what
    assert message_for(RuntimeError("a bug")) is None
    with pytest.raises(OSError) as error:
        (tmp_path / "none").read_text()
    assert str(tmp_path / "none") in message_for(error.value).where


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": 10**9}, "has the rank 1,000,000,000"),
        ({"target_modules": "(a+)+$"}, "may take for ever to match"),
        ({"r": "many"}, "the adapter's files cannot be read"),
        ({"alora_invocation_tokens": [5]}, "acts only after certain tokens"),
        (b"1234567890", "the adapter's files cannot be read"),
    ],
)
def test_an_absurd_adapter_is_refused_before_it_is_made(tmp_path, trained, change, says):
    """A change of its config, or other weights: here a header that is longer than the file."""
    adapter = shutil.copytree(trained / "run/align/adapter", tmp_path / "adapter")
    if isinstance(change, bytes):
        (adapter / "adapter_model.safetensors").write_bytes(change)
    else:
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    arguments = ("align", trained / "tiny.toml", "--run-dir", tmp_path / "run")
    done = command(*arguments, "--set", f"model.adapter={adapter}", cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr


def ours_fails():
    """Raises an exception in a file of the package."""
    called_in("model/load.py", lambda: None, fails=True)


def called_in(name, function, fails=False):
    """Calls a function from a frame whose file is one of the package."""
    code = "raise KeyError('a bug')" if fails else "function()"
    exec(compile(code, str(PACKAGE / name), "exec"), {"function": function})


def message_of(act):
    try:
        act()
    except Exception as error:
        return message_for(error)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_message_that_helps_with_exit_2(mistake, tmp_path, base):
    provoke, says = MISTAKES[mistake]
    scene = Scene(tmp_path, base)
    done = command(*provoke(scene), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    err = " ".join(done.stderr.replace("│", " ").split())
    for part in says:
        assert part in err, f"{part!r} is not in: {err}"


def test_the_executable_says_the_same_without_a_traceback(executable, recipe_file):
    for arguments, part in (
        (
            ("prepare", recipe_file, "--set", "align.loss.name=tbp_a"),
            "fix: --set align.loss.name=tbpo_a",
        ),
        (("algin", recipe_file), "No such command 'algin'"),
    ):
        done = executable(*arguments)
        assert (
            done.returncode == 2
            and part in done.stderr
            and "Traceback" not in done.stderr
            and not done.stdout
        )


HUB = {
    "a base that is not there": (("model.base=user/none",), "loaded: the Hub has no such model"),
    "rows that are not there": (
        ("data.train=user/none",),
        "data.train cannot be read: DatasetNotFoundError",
    ),
    "a split that is not there": (
        ("data.train=user/pairs", "data.train_split=tran"),
        "data.train cannot be read",
    ),
}


@pytest.mark.parametrize("mistake", HUB)
def test_what_the_hub_does_not_have_is_a_message(mistake, executable, recipe_file, tmp_path):
    folder = tmp_path / "hub/datasets/user/pairs"
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl", preference_rows(9))
    (tmp_path / "hub/models/user").mkdir(parents=True)
    overrides, what = HUB[mistake]
    with hub(tmp_path / "hub") as (address, _):
        done = executable(
            "prepare", recipe_file, *(part for one in overrides for part in ("--set", one)),
            HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "cache"),
        )  # fmt: skip
    assert done.returncode == 2 and what in done.stderr and "Traceback" not in done.stderr, (
        done.stderr
    )
    assert all(word in done.stderr for word in FULL) and "user/" in done.stderr


def test_a_base_that_is_in_no_cache_and_on_no_hub_that_answers_is_a_message():
    with pytest.raises(TbpoError, match="the Hub cannot be reached, and the base is not") as error:
        load_chat(Model(base="user/none"), "2026-01-01")
    assert error.value.where == "model.base = 'user/none'" and "network" in error.value.fix


RESPONSE = httpx.Response(403, request=httpx.Request("GET", "https://hub"))
OF_THE_HUB = {
    "gated": (GatedRepoError("no", response=RESPONSE), "the base is gated", "ask for access"),
    "revision": (RevisionNotFoundError("no", response=RESPONSE), "no such revision", "revision"),
    "model": (RepositoryNotFoundError("no", response=RESPONSE), "no such model", "hf auth login"),
    "offline": (OfflineModeIsEnabled("no"), "may not be asked", "unset HF_HUB_OFFLINE"),
    "network": (LocalEntryNotFoundError("no"), "cannot be reached", "the network"),
    "another": (ValueError("no"), "loaded: transformers is confused", "a newer transformers"),
}


@pytest.mark.parametrize("has_cause", [True, False])
@pytest.mark.parametrize("name", OF_THE_HUB)
def test_the_error_behind_that_of_transformers_says_what_to_do(monkeypatch, name, has_cause):
    """Raised `from` the Hub's own error, or merely while that was handled."""
    error, what, fix = OF_THE_HUB[name]

    def fails(*_, **__):
        try:
            raise error
        except Exception as behind:
            confused = OSError("transformers is confused")
            if has_cause:
                raise confused from behind
            raise confused  # noqa: B904

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fails)
    with pytest.raises(TbpoError) as raised:
        load_chat(Model(base="user/none"), "2026-01-01")
    assert what in raised.value.what and fix in raised.value.fix


def test_show_asks_a_hub_that_does_not_answer_only_once(executable, recipe_file, tmp_path):
    started = time.monotonic()
    done = executable(
        "show", recipe_file, "--set", "model.base=user/none",
        HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0 and "could not be found out: the model cannot" in " ".join(
        done.stdout.split()
    )
    assert time.monotonic() - started < 30 and not done.stderr
