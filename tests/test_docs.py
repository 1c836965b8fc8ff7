"""What docs/ says can be typed, and does it; the generated pages are those of the code."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import tomli_w
from conftest import command, merged, preference_rows, write_jsonl

from tbpo_cli.config.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
}
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRL = "model_name_or_path: org/model\ndataset_name: org/pairs\nlearning_rate: 5e-7\nbeta: 0.05\n"
SCORER = "def score(prompt, completion):\n    return len(completion)\n"


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """The tbpo commands of a page, in order."""
    lines = [
        line for block in blocks(text, "bash") for line in block.replace("\\\n", "").split("\n")
    ]
    words = [line.split("#")[0].strip().removeprefix("srun ") for line in lines]
    return [line for line in words if line.startswith("tbpo")]


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    """A user's folder: rows, mine.toml, a finished run of it and one by DPO, a config of TRL."""
    here = tmp_path_factory.mktemp("docs")
    (recipe,) = blocks(README, "toml")
    tables = tomllib.loads(recipe) | {"eval": {"diversity_prompts": 2}}
    short = {"model": {"base": str(base)}, "align": {"max_steps": 2, "batch_pairs": 4}}
    short["push"] = {"base_model": "org/base"}
    short |= {"sample": {"max_new_tokens": 4, "max_prompts": 2}}
    (here / "mine.toml").write_text(tomli_w.dumps(merged(tables, short)), encoding="utf-8")
    write_jsonl(here / "pairs.jsonl", preference_rows(40))
    (here / "scorer.py").write_text(SCORER)
    (here / "dpo.yaml").write_text(TRL)
    for arguments in ((), ("--set", "align.loss=dpo", "--run-dir", "runs/dpo")):
        done = command("align", "mine.toml", *arguments, cwd=here)
        assert done.returncode == 0, done.stderr
    return here


def shorten_quickstart(here):
    """The quickstart that `tbpo init` wrote, with few rows and steps."""
    path = here / "quickstart.toml"
    tables = merged(
        tomllib.loads(path.read_text(encoding="utf-8")),
        {
            "align": {"max_steps": 2, "batch_pairs": 4},
            "eval": {"diversity_prompts": 2},
            "sample": {"max_prompts": 4, "max_new_tokens": 8},
        },
    )
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    for name, count in (("train", 40), ("eval", 8)):
        rows = here / f"quickstart/{name}.jsonl"
        rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:count]))


def shorten_rounds(here):
    """The recipe of rounds that `tbpo init` wrote, with two rounds of few prompts."""
    path = here / "rounds.toml"
    tables = merged(
        tomllib.loads(path.read_text(encoding="utf-8")),
        {
            "rounds": {"number": 2, "prompts": 6, "held_out_prompts": 4},
            "align": {"max_steps": 1, "batch_pairs": 4},
            "eval": {"diversity_prompts": 2},
            "sample": {"max_prompts": 4, "max_new_tokens": 8},
        },
    )
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if commands(PAGES[page])])
def test_every_command_of_a_page_runs_in_its_order(folder, tmp_path, page):
    """Of several processes or machines only the plan is asked for."""
    here = tmp_path if page == "tutorial" else folder
    for line in commands(PAGES[page]):
        _, name, *arguments = shlex.split(line)
        plan = ["--dry-run"] if "--gpus" in arguments else []
        done = command(name, *plan, *arguments, cwd=here)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        if (name, *arguments) == ("init", "quickstart"):
            shorten_quickstart(here)
        if (name, *arguments) == ("init", "rounds"):
            shorten_rounds(here)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(PAGES[page], "toml")])
def test_every_piece_of_a_recipe_loads(page, tmp_path):
    (whole,) = blocks(README, "toml")
    for fragment in blocks(PAGES[page], "toml"):
        path = tmp_path / "whole.toml"
        path.write_text(tomli_w.dumps(tomllib.loads(whole) | tomllib.loads(fragment)))
        load_recipe(path)


def test_the_python_that_loads_an_adapter_does(folder, monkeypatch):
    (code,) = blocks(PAGES["serving"], "python")
    monkeypatch.chdir(folder)
    known = {}
    exec(compile(code, "serving.md", "exec"), known)
    assert known["tokenizer"].chat_template and known["model"].num_parameters() > 0


@pytest.mark.parametrize("page", generator().PAGES)
def test_the_generated_pages_are_those_of_the_code(page):
    """Otherwise: python docs/generate.py"""
    assert generator().PAGES[page]() == (ROOT / "docs" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]+)?\)", PAGES[page]):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target


def test_every_page_is_in_the_list_and_the_readme():
    for page in PAGES.keys() - {"README"}:
        assert f"({page}.md)" in PAGES["README"] and f"(docs/{page}.md)" in README, page
