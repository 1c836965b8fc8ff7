"""Runs that share data prepare it once: what is copied from a run beside, and what is not."""

import json

import pytest
from conftest import change_recipe, preference_rows, run_stage, write_jsonl

from tbpo_cli.errors import TbpoError
from tbpo_cli.runs.run_dir import RunDir


def manifest(run):
    return json.loads((run / "prepare/manifest.json").read_text(encoding="utf-8"))


def was_copied(run):
    return "copied_from" in manifest(run)


@pytest.fixture
def first(recipe_file, tmp_path):
    """A run whose pairs are prepared."""
    return run_stage("prepare", recipe_file, tmp_path / "runs/first")


def test_a_run_with_the_same_inputs_has_the_pairs_of_the_one_beside_it(
    first, recipe_file, tmp_path, capsys
):
    """Another loss, another name: the data is the same. Both are whole, and each by itself."""
    change_recipe(recipe_file, run={"name": "other"}, align={"loss": {"name": "dpo"}})
    second = run_stage("align", recipe_file, tmp_path / "runs/second", "align.max_steps=1")
    said = " ".join(capsys.readouterr().err.split())
    assert "first are copied, which were made from the same inputs" in said
    assert manifest(second)["copied_from"] == str(first)
    assert manifest(second)["outputs"] == manifest(first)["outputs"]
    assert manifest(second)["counts"] == manifest(first)["counts"]
    assert "Prepared pairs of other" in (second / "prepare/report.html").read_text()
    for name in manifest(second)["outputs"]:
        assert not (second / "prepare" / name).samefile(first / "prepare" / name)
    (first / "prepare/rejects.jsonl").write_text("x")
    assert RunDir(second).damage("prepare") == [] and RunDir(first).damage("prepare")
    run_stage("align", recipe_file, second, "align.max_steps=1")
    assert "align is up to date" in capsys.readouterr().err


def test_nothing_is_copied_where_inputs_differ(first, recipe_file, rows, tmp_path):
    for number, change in enumerate(("data.max_length=40", "run.seed=5", "data.dedup=false")):
        assert not was_copied(run_stage("prepare", recipe_file, first.parent / f"{number}", change))
    run_stage("prepare", recipe_file, first.parent / "data.workers", "data.workers=2")
    assert was_copied(first.parent / "data.workers"), "that changes no pair"
    train = write_jsonl(tmp_path / "train.jsonl", preference_rows(40, seed=9))
    one = run_stage("prepare", recipe_file, first.parent / "one", f"data.train={train}")
    write_jsonl(tmp_path / "train.jsonl", preference_rows(40, seed=8))
    other = run_stage("prepare", recipe_file, first.parent / "other", f"data.train={train}")
    assert not was_copied(one) and not was_copied(other)
    assert manifest(one)["outputs"] != manifest(other)["outputs"]


def test_what_is_damaged_unfinished_or_of_other_libraries_is_not_copied(
    first, recipe_file, tmp_path, monkeypatch
):
    whole = (first / "prepare/manifest.json").read_text()
    for number, damaged in enumerate(("train/pairs.arrow", "manifest.json", "rejects.jsonl")):
        path = first / "prepare" / damaged
        content = path.read_bytes()
        path.write_bytes(content + b" x")
        run = run_stage("prepare", recipe_file, tmp_path / f"runs/{number}", restart=False)
        assert not was_copied(run), damaged
        path.write_bytes(content)
        run.rename(tmp_path / f"aside-{number}")
    (first / "prepare/manifest.json").unlink()
    run = run_stage("prepare", recipe_file, tmp_path / "runs/later")
    assert not was_copied(run), "it is not complete"
    run.rename(tmp_path / "aside")
    (first / "prepare/manifest.json").write_text(whole)
    monkeypatch.setattr("tbpo_cli.runs.run_dir.version", lambda library: "0.0")
    assert not was_copied(run_stage("prepare", recipe_file, tmp_path / "runs/newer"))


@pytest.mark.parametrize("name", ["train/pairs.arrow", "eval/pairs.arrow", "manifest.json"])
@pytest.mark.parametrize("fault", ["deleted", "flipped"])
def test_a_copy_that_was_damaged_since_is_noticed(first, recipe_file, tmp_path, name, fault):
    """One bit, or the whole file. The run that it was copied from stays whole."""
    second = run_stage("prepare", recipe_file, tmp_path / "runs/second")
    assert was_copied(second)
    path = second / "prepare" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if fault == "deleted":
        path.unlink()
    if (name, fault) == ("manifest.json", "deleted"):  # so it is not complete, and is made again
        run_stage("prepare", recipe_file, second)
        assert RunDir(second).damage("prepare") == [] and path.exists()
    else:
        with pytest.raises(TbpoError, match=r"not as it was written|missing|is damaged") as error:
            run_stage("align", recipe_file, second, "align.max_steps=1")
        assert name in str(error.value)
        assert not (second / "align").exists()
    assert RunDir(first).damage("prepare") == []


def test_a_restart_prepares_anew(first, recipe_file, tmp_path):
    run = run_stage("prepare", recipe_file, tmp_path / "runs/second")
    assert was_copied(run)
    assert not was_copied(run_stage("prepare", recipe_file, run, restart=True))


def test_a_copy_meets_the_bound_on_rejects_of_its_own_recipe(recipe_file, tmp_path):
    rows = preference_rows(20, seed=3)
    rows[0]["chosen"] = ""
    train = f"data.train={write_jsonl(tmp_path / 'some.jsonl', rows)}"
    run_stage("prepare", recipe_file, tmp_path / "runs/first", train)
    with pytest.raises(TbpoError, match=r"rows of data\.train cannot be used"):
        run_stage(
            "prepare", recipe_file, tmp_path / "runs/second", train, "data.max_reject_fraction=0.0"
        )
