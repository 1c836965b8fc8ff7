"""What the README says can be typed, and does what it says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import preference_rows, write_jsonl
from hub_server import hub

from tbpo_cli.core import LOSSES, PairScores, SideScores, build_loss

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SET_UP = {"pip install . && tbpo align recipes/quickstart.toml", 'pip install ".[test]" && pytest'}


def blocks(language, text=TEXT):
    found = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


INTERNALS = (ROOT / "docs/internals.md").read_text(encoding="utf-8")
(RECIPE,) = blocks("toml")
LINES = [
    line.split("#")[0].strip()
    for block in blocks("bash")
    for line in block.replace("\\\n", "").splitlines()
    if line.split("#")[0].strip()
]
COMMANDS = [line.removeprefix("srun ") for line in LINES if "tbpo" in line and line not in SET_UP]


@pytest.fixture(scope="module")
def user(tmp_path_factory, base):
    """(A user's folder with rows and mine.toml as it stands there, what runs Python in it); a Hub
    has its base, a tiny one. Processes of their own, as the libraries read the Hub's address when
    they are imported."""
    here = tmp_path_factory.mktemp("user")
    (here / "mine.toml").write_text(RECIPE, encoding="utf-8")
    write_jsonl(here / "pairs.jsonl", preference_rows(40))
    write_jsonl(here / "mine.jsonl", preference_rows(8, seed=1))
    shutil.copytree(base, here / "hub/models" / tomllib.loads(RECIPE)["model"]["base"])
    with hub(here / "hub") as (address, _):
        environment = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(here / "cache"),
            "HF_HUB_OFFLINE": "0",
        }

        def run(*arguments):
            called, known = [sys.executable, *arguments], {**os.environ, **environment}
            return subprocess.run(
                called, cwd=here, env=known, capture_output=True, text=True, timeout=120
            )

        yield here, run


def test_the_readme_is_short_has_two_set_up_commands_and_its_links_lead_somewhere():
    assert TEXT.count("\n") <= 150
    assert [line for line in LINES if line.startswith("pip")] == sorted(SET_UP)[::-1]
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]+)?\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    for anchor in re.findall(r"\]\(#([^)]+)\)", TEXT):
        headings = [
            re.sub(r"[^\w -]", "", line).lower().replace(" ", "-")
            for line in re.findall(r"^#+ (.*)", TEXT, re.M)
        ]
        assert anchor in headings, anchor


@pytest.mark.parametrize("line", COMMANDS, ids=COMMANDS)
def test_every_command_runs_in_the_order_of_the_page(user, line):
    """Of several processes or machines only the plan is asked for."""
    _, name, *arguments = shlex.split(line)
    plan = ["--dry-run"] if "--gpus" in arguments else []
    done = user[1]("-m", "tbpo_cli.cli.main", name, *plan, *arguments)
    assert done.returncode == 0, done.stderr
    if name == "push":
        assert "base_model: Qwen/Qwen2.5-0.5B-Instruct" in done.stdout


def test_the_stages_run_as_a_library_in_the_way_that_is_shown(user):
    code = next(block for block in blocks("python", INTERNALS) if "load_recipe" in block)
    done = user[1]("-c", code.replace("runs/dpo", "runs/library"))
    assert done.returncode == 0, done.stderr
    assert (user[0] / "runs/library/align/adapter/adapter_model.safetensors").exists()


def test_a_loss_is_added_as_it_is_shown():
    """One pair, Σr^w = 2 and Σr^l = −1: (1 − 3)² = 4."""
    exec(
        compile(
            next(block for block in blocks("python", INTERNALS) if "LOSSES[" in block),
            "README.md",
            "exec",
        ),
        {},
    )
    side = [
        SideScores(torch.ones(1, 1, dtype=torch.bool), log_ratio=torch.tensor([[value]]))
        for value in (2.0, -1.0)
    ]
    try:
        assert build_loss("squared", scale=1.0)(PairScores(*side)).per_pair.tolist() == [4.0]
    finally:
        del LOSSES["squared"]
