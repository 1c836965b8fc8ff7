"""The wheel: what it has, what it needs, that it works when installed; the stages as a library."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import preference_rows, write_jsonl

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements):
    return {re.match(r"[A-Za-z0-9-]+", requirement).group().lower() for requirement in requirements}


def imported():
    """The distributions that the package imports, by the files that do so."""
    found, owners = {}, packages_distributions()
    for path in (ROOT / "tbpo_cli").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
        typing = {
            id(n)
            for b in blocks
            if getattr(b.test, "id", "") == "TYPE_CHECKING"
            for n in ast.walk(b)
        }
        for node in (node for node in ast.walk(tree) if id(node) not in typing):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in (
                {module.split(".")[0] for module in modules}
                - sys.stdlib_module_names
                - {"tbpo_cli"}
            ):
                for distribution in owners.get(top, [top]):
                    found.setdefault(distribution.lower().replace("_", "-"), set()).add(path.name)
    return found


def test_every_dependency_is_imported_and_every_import_is_declared():
    declared = names(PROJECT["dependencies"])
    optional = names(item for extra in PROJECT["optional-dependencies"].values() for item in extra)
    found = imported()
    assert declared <= found.keys(), "installed for nothing"
    undeclared = {name: files for name, files in found.items() if name not in declared | optional}
    assert not undeclared, "imported without being asked for"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(executable, folder of the package) of the wheel, installed beside this one's libraries."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True, timeout=300)
    venv.create(folder / "fresh", with_pip=False)
    site = next((folder / "fresh/lib").glob("python*")) / "site-packages"
    (wheel,) = folder.glob("tbpo-*.whl")
    subprocess.run(
        [*pip, "--python", str(folder / "fresh/bin/python"), "install", "--no-deps", str(wheel)],
        check=True,
    )
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "fresh/bin/tbpo", site / "tbpo_cli"


def test_the_wheel_works_in_a_fresh_environment_and_is_small(installed, tmp_path):
    executable, package = installed
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "COLUMNS": "100"}

    def tbpo(*arguments, **more):
        run = [executable, *arguments]
        return subprocess.run(
            run,
            cwd=tmp_path,
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=200,
        )

    assert sum(path.stat().st_size for path in package.rglob("*") if path.suffix != ".pyc") < 8e6
    assert tbpo("--version").stdout.strip() == PROJECT["version"]
    assert "quickstart" in tbpo("init").stdout
    assert (
        tbpo("init", "quickstart").returncode == 0
        and (tmp_path / "quickstart/train.jsonl").exists()
    )
    shown = tbpo("show", "quickstart.toml")
    assert shown.returncode == 0 and "memory" in shown.stdout, shown.stderr
    where = f"import tbpo_cli; assert tbpo_cli.__path__[0] == {str(package)!r}, tbpo_cli.__path__"
    subprocess.run(
        [package.parents[3] / "bin/python", "-c", where], check=True, cwd=tmp_path, env=environment
    )
    completed = tbpo(COMP_WORDS="tbpo al", COMP_CWORD="1", _TBPO_COMPLETE="complete_bash")
    assert "align" in completed.stdout.split()


def test_every_stage_is_a_call_with_typed_arguments(base, tmp_path):
    from tbpo_cli.config.recipe import Align, Data, Lora, Model, Recipe, Run, Sample, Sft, Source
    from tbpo_cli.runs.run_dir import RunDir
    from tbpo_cli.stages import align, prepare, sample, sft

    rows = write_jsonl(tmp_path / "rows.jsonl", preference_rows(24))
    recipe = Recipe(
        run=Run(name="mine"),
        model=Model(base=str(base), lora=Lora(r=4)),
        data=Data(train=(Source(str(rows)),)),
        sft=Sft(max_steps=1, batch_examples=4),
        align=Align(max_steps=1, batch_pairs=4, loss={"name": "dpo", "beta": 0.2}),
        sample=Sample(max_prompts=1, max_new_tokens=4),
    )
    run = RunDir(tmp_path / "run")
    outputs = {
        prepare: "train/pairs.arrow",
        sft: "adapter",
        align: "adapter",
        sample: "samples.jsonl",
    }
    for stage, output in outputs.items():
        stage.run(recipe, run)
        name = stage.__name__.rpartition(".")[2]
        assert (run.stage(name) / output).exists() and run.manifest(name)
