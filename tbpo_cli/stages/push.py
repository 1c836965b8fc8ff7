"""`tbpo push`: the adapter (or the merged model) and its card → the Hub."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.config.toml import TOKENIZER_FILES, WEIGHT_FILES
from tbpo_cli.errors import TbpoError
from tbpo_cli.hub import publish as hub
from tbpo_cli.runs.files import read_sealed, told_as_unwritable, write_sealed
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.stages.chain import require_complete

SHARD_SIZE = "5GB"  # of a file of merged weights


def run(
    recipe: Recipe, run_dir: RunDir, dry_run: bool = False, allow_unevaluated: bool = False
) -> None:
    """Publishes a complete run, and writes push/receipt.json; a dry run shows files and card instead, all offline.

    Raises TbpoError if the run is not complete or not evaluated, or cannot be published.
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
    with run_dir.lock(), told_as_unwritable(run_dir.path):
        base = hub.published_base(recipe, manifests["align"], online=not dry_run)
        if not (base.licence or dry_run):
            raise TbpoError(
                "the base's licence is not known",
                base.id,
                "e.g. apache-2.0",
                "--set push.license=…",
            )
        card = hub.render_card(recipe, base, results, manifests)
        shared = replace(
            recipe, model=replace(recipe.model, base=base.id, revision=base.revision)
        ).to_toml()
        texts = {"README.md": card, "recipe.toml": _without_folders(shared)}
        if results is not None:
            texts["results.json"] = _without_folders(
                json.dumps(results, indent=1, ensure_ascii=False)
            )
        hub.check_no_secret(texts)
        head = "" if dry_run else hub.open_repository(repo, recipe, card)
        files = {name: text.encode() for name, text in texts.items()} | _weights(
            recipe, run_dir, base
        )
        if dry_run:
            sizes = [
                [name, f"{len(f) if isinstance(f, bytes) else f.stat().st_size:,}"]
                for name, f in files.items()
            ]
            console.show_table("Would be published", ["file", "bytes"], sizes)
            console.out.print(card, markup=False)
            return
        path = run_dir.stage("push") / "receipt.json"
        before = read_sealed(path)
        old = before["sha256"] if before.get("repo") == repo else ()
        receipt = hub.publish(repo, f"{recipe.run.name}, by tbpo", files, old)
        path.parent.mkdir(exist_ok=True)
        write_sealed(path, receipt)
    told = (
        "unchanged, the Hub has all of it"
        if receipt["commit"] == head
        else "published, and read back"
    )
    console.say(f"{told}: {len(files)} files, commit {receipt['commit']}; receipt: {path}")
    console.out.print(receipt["url"], markup=False)


def _results(run_dir: RunDir, allow_unevaluated: bool) -> dict[str, Any] | None:
    """The evaluation of these weights. Raises TbpoError if there is none, unless that is allowed."""
    manifest, path = run_dir.manifest("eval"), run_dir.stage("eval") / "results.json"
    if manifest and manifest["inputs"]["outputs"]["align"] == run_dir.outputs_hash("align"):
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return results
    if not allow_unevaluated:
        what = (
            "the evaluation is older than the weights" if manifest else "the run is not evaluated"
        )
        fix = "tbpo eval RECIPE first, or --allow-unevaluated"
        raise TbpoError(what, str(path), "results of what is published", fix)
    return None


def _without_folders(text: str) -> str:
    """Of the files and folders of this machine only their names: where they lie is nobody's business."""
    return re.sub(r'"(python:)?/(?:[^"\n]*/)?([^"/\n]+)"', r'"\1\2"', text)


def _weights(recipe: Recipe, run_dir: RunDir, base: hub.Base) -> hub.Files:
    """Weights, their configs, the tokenizer and the curves: what else is in the run's folders is never published."""
    trained, merges = run_dir.weights("align"), recipe.push.merge and recipe.model.lora is not None
    folder = _merged(recipe, run_dir, base) if merges else trained
    patterns = WEIGHT_FILES if hub.is_whole(recipe) else ("adapter_model.safetensors",)
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    paths += [path for pattern in TOKENIZER_FILES for path in trained.glob(pattern)]
    files: hub.Files = {path.name: path for path in [*paths, run_dir.stage("align") / "curves.svg"]}
    if hub.is_whole(recipe):
        return files | {path.name: path for path in base.licence_files}
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base.id, "revision": base.revision}
    return files | {"adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode()}


def _merged(recipe: Recipe, run_dir: RunDir, base: hub.Base) -> Path:
    """The merged weights' folder, made unless it is there already, from the same weights."""
    from tbpo_cli.model.merge import merge_adapter

    model = recipe.model
    folder = (
        run_dir.stage("push") / f"merged-{run_dir.outputs_hash('align')[:12]}-{base.revision[:12]}"
    )
    if not folder.exists():
        console.say("merging the adapter into the base …")
        model = model if Path(model.base).is_absolute() else replace(model, revision=base.revision)
        merge_adapter(
            model, run_dir.weights("align"), part := folder.with_name(f".{folder.name}"), SHARD_SIZE
        )
        part.rename(folder)
    return folder
