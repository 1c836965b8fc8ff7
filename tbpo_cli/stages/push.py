"""`tbpo push`: the adapter (or the merged model) and its card → the Hub."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.config.judging import default_body
from tbpo_cli.config.recipe import Judge, Recipe
from tbpo_cli.config.toml import TOKENIZER_FILES, WEIGHT_FILES
from tbpo_cli.errors import TbpoError
from tbpo_cli.hub.base import Base, local_base, published_base
from tbpo_cli.hub.card import is_whole, render_card
from tbpo_cli.hub.markdown import unescaped
from tbpo_cli.hub.publish import Files, open_repository, publish
from tbpo_cli.hub.publish import check_repository as check_repository
from tbpo_cli.hub.publish import check_token as check_token
from tbpo_cli.hub.secrets import check_no_secret, without_folders
from tbpo_cli.runs.files import (
    explaining_disk_errors,
    is_sealed,
    read_sealed,
    seal_folder,
    sync_tree,
    write_sealed,
)
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages.chain import require_complete

SHARD_SIZE = "5GB"  # of a file of merged weights
NOWHERE = "http://endpoint.invalid/v1"  # stands for a server that is nobody else's business


def run(
    recipe: Recipe, run_dir: RunDir, dry_run: bool = False, allow_unevaluated: bool = False
) -> None:
    """Publishes a complete run, and writes push/receipt.json.

    Args:
        dry_run: show files and card instead, and ask the Hub nothing.

    Raises:
        TbpoError: if the run is not complete, damaged or not evaluated, or cannot be published.
    """
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    manifests = require_complete("align", recipe, run_dir)
    results = _results(run_dir, allow_unevaluated)
    repo = recipe.push.repo or ""
    if not (repo or dry_run):
        raise TbpoError(
            "push.repo is missing", "[push] repo", '"user/name"', "--set push.repo=user/name"
        )
    with run_dir.lock(), explaining_disk_errors(run_dir.path):
        base = published_base(recipe, manifests["align"], online=not dry_run)
        if not (base.licence or dry_run):
            raise TbpoError(
                "the base's licence is not known",
                base.id,
                "e.g. apache-2.0",
                "--set push.license=…",
            )
        card = _card(recipe, run_dir, base, results, manifests)
        texts = _texts(recipe, run_dir, base, card, results)
        head = "" if dry_run else open_repository(repo, recipe, texts["README.md"])
        files: Files = {name: text.encode() for name, text in texts.items()}
        files |= _weights(recipe, run_dir, base)
        if dry_run:
            _show(files, texts["README.md"])
            return
        path = run_dir.stage("push") / "receipt.json"
        before = read_sealed(path)
        old = before["sha256"] if before.get("repo") == repo else ()
        receipt = publish(repo, f"{recipe.run.name}, by tbpo", files, old)
        path.parent.mkdir(exist_ok=True)
        write_sealed(path, receipt)
    is_unchanged = receipt["commit"] == head
    outcome = "unchanged, the Hub has all of it" if is_unchanged else "published, and read back"
    console.say(f"{outcome}: {len(files)} files, commit {receipt['commit']}; receipt: {path}")
    console.show(receipt["url"])


def export(recipe: Recipe, run_dir: RunDir, folder: Path) -> None:
    """Writes what `run` would publish into a folder, asks the Hub nothing, and says how to serve
    it.

    Raises:
        TbpoError: if the run is not complete or damaged, or the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        fix = "give another folder, or remove it"
        raise TbpoError("the folder holds something already", str(folder), "a new folder", fix)
    manifests = require_complete("align", recipe, run_dir)
    results = _results(run_dir, allow_unevaluated=True)
    part = folder.with_name(f".{folder.name}.partial")
    with run_dir.lock(), explaining_disk_errors(folder.parent):
        base = local_base(recipe, manifests["align"])
        card = _card(recipe, run_dir, base, results, manifests)
        texts = _texts(recipe, run_dir, base, card, results)
        files: Files = {name: text.encode() for name, text in texts.items()}
        files |= _weights(recipe, run_dir, base)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, content in files.items():
            if isinstance(content, bytes):
                (part / name).write_bytes(content)
            else:
                shutil.copyfile(content, part / name)
        sync_tree(part)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    console.say(f"{len(files)} files; serve them with vLLM:")
    if is_whole(recipe):
        words = ["vllm", "serve", str(folder)]
    else:
        rank = str(recipe.model.lora.r if recipe.model.lora else 0)
        module = f"{recipe.run.name}={folder}"
        words = ["vllm", "serve", base.id, "--enable-lora", "--max-lora-rank", rank]
        words += ["--lora-modules", module]
    console.show(shlex.join(words))


def _card(
    recipe: Recipe,
    run_dir: RunDir,
    base: Base,
    results: dict[str, Any] | None,
    manifests: dict[str, Any],
) -> str:
    from tbpo_cli.model.merge import saved_end_ids

    ends = saved_end_ids(run_dir.weights("align"))
    return render_card(recipe, base, results, manifests, ends)


def _results(run_dir: RunDir, allow_unevaluated: bool) -> dict[str, Any] | None:
    """The evaluation of these weights.

    Raises:
        TbpoError: without one, unless that is allowed: then it is said that it is left out.
    """
    manifest = run_dir.manifest("eval")
    path = run_dir.stage("eval") / "results.json"
    if manifest and manifest["inputs"]["outputs"]["align"] == run_dir.outputs_hash("align"):
        run_dir.check("eval")
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return results
    what = "the run is not evaluated"
    fix = "tbpo eval RECIPE first"
    if manifest:
        what = "the evaluation is older than the weights"
    elif path.exists():
        what = f"the evaluation has lost {path.with_name('manifest.json')}, which vouches for it"
    if allow_unevaluated:
        console.say(f"warning: {what}: its results are left out of the card ({fix})")
        return None
    expected = "results of what is published"
    raise TbpoError(what, str(path), expected, f"{fix}, or --allow-unevaluated")


def _texts(
    recipe: Recipe, run_dir: RunDir, base: Base, card: str, results: dict[str, Any] | None
) -> dict[str, str]:
    """The published texts by file name, without folders and servers of this machine.

    Raises:
        TbpoError: if one holds what looks like a secret.
    """
    settings = recipe.settings()
    paths = [
        Path(path).parent
        for value in settings.values()
        for path in (value if isinstance(value, list) else [value])
        if isinstance(path, str) and path.startswith("/")
    ]
    folders = {*paths, run_dir.path, run_dir.path.parent, Path.home(), Path.cwd()} - {Path("/")}
    texts = {"README.md": card, "recipe.toml": _public(recipe, base).to_toml()}
    if results is not None:
        texts["results.json"] = json.dumps(results, indent=1, ensure_ascii=False)
    texts = {name: without_folders(text, folders) for name, text in texts.items()}
    commits = {
        value.rpartition("@")[2]
        for key, value in settings.items()
        if isinstance(value, str) and (key.endswith("revision") or "@" in value)
    }
    check_no_secret(texts | {"README.md": unescaped(card)}, {base.revision, *commits})
    return texts


def _public(recipe: Recipe, base: Base) -> Recipe:
    """The recipe as others can run it: with the base on the Hub, and without private servers."""
    sample = recipe.sample
    if sample.endpoint is not None:
        sample = replace(sample, endpoint=NOWHERE)
    rounds = recipe.rounds
    if rounds is not None and rounds.endpoint is not None:
        rounds = replace(rounds, endpoint=NOWHERE)
    revision = None if Path(base.id).is_absolute() else base.revision
    return replace(
        recipe,
        rounds=rounds,
        model=replace(recipe.model, base=base.id, revision=revision),
        sample=sample,
        judge=_public_judge(recipe.judge),
        eval=replace(recipe.eval, judge=_public_judge(recipe.eval.judge)),
    )


def _public_judge(judge: Judge | None) -> Judge | None:
    """The judge without the address of its server, and what requests to it have besides."""
    if judge is None or judge.endpoint is None:
        return judge
    return replace(judge, endpoint=NOWHERE, body=default_body())


def _show(files: Files, card: str) -> None:
    """What would be published."""
    rows = []
    for name, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        rows.append([name, f"{size:,}"])
    console.show_table("Would be published", ["file", "bytes"], rows)
    console.show(card)


def _weights(recipe: Recipe, run_dir: RunDir, base: Base) -> Files:
    """Weights, their configs, the tokenizer and the curves; nothing else of the run's folders."""
    trained = run_dir.weights("align")
    is_merged = recipe.push.merge and recipe.model.lora is not None
    folder = _merged(recipe, run_dir, base) if is_merged else trained
    patterns = WEIGHT_FILES if is_whole(recipe) else ("adapter_model.safetensors",)
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    paths += [path for pattern in TOKENIZER_FILES for path in trained.glob(pattern)]
    files: Files = {path.name: path for path in [*paths, run_dir.stage("align") / "curves.svg"]}
    if is_whole(recipe):
        return files | {path.name: path for path in base.licence_files}
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base.id}
    if not Path(base.id).is_absolute():
        config["revision"] = base.revision
    return files | {"adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode()}


def _merged(recipe: Recipe, run_dir: RunDir, base: Base) -> Path:
    """The merged weights' folder, made unless it is there, sealed, from the same weights."""
    from tbpo_cli.model.merge import merge_adapter

    model = recipe.model
    name = f"merged-{run_dir.outputs_hash('align')[:12]}-{base.revision[:12]}"
    folder = run_dir.stage("push") / name
    if not is_sealed(folder):
        console.say("merging the adapter into the base …")
        if not Path(model.base).is_absolute():
            model = replace(model, revision=base.revision)
        partial = folder.with_name(f".{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        merge_adapter(model, run_dir.weights("align"), partial, SHARD_SIZE)
        seal_folder(partial, folder)
    return folder
