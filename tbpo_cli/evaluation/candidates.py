"""The models that an evaluation compares: policy, reference, and those of `eval.against`."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.config.toml import is_local
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.measures import labels
from tbpo_cli.runs.run_dir import RunDir


@dataclass(frozen=True)
class Candidate:
    """One of the models."""

    name: str  # what the report calls it
    view: str  # of the loaded policy
    source: str  # where its weights are
    loss: str | None  # of its training; None where it is unknown
    beta: float  # of its training, else the policy's own


def candidates_of(recipe: Recipe, run_dir: RunDir) -> list[Candidate]:
    """The policy, the reference, and the others, as in the recipe. Raises TbpoError for a run from
    another base.
    """
    own = recipe.align.loss_name
    beta = getattr(recipe.align.loss, "beta", 1.0)
    reference = (
        str(run_dir.weights("sft"))
        if recipe.sft is not None
        else recipe.model.adapter or recipe.model.base
    )
    found = [
        Candidate("policy", "default", str(run_dir.weights("align")), own, beta),
        Candidate("reference", "reference", reference, None, beta),
    ]
    for number, (label, source) in enumerate(
        zip(labels(recipe.eval.against), recipe.eval.against, strict=True), 1
    ):
        path = Path(source) / "recipe.toml"
        loss = {}
        if path.exists():
            loss = tomllib.loads(path.read_text(encoding="utf-8"))["align"]["loss"]
            if _base_of(RunDir(Path(source))) not in (None, _base_of(run_dir)):
                what = "it was trained from another base"
                expected = "a run with the same model.base"
                raise TbpoError(
                    what, f"eval.against: {source}", expected, "evaluate that run by its own recipe"
                )
        found.append(
            Candidate(label, f"against-{number}", source, loss.get("name"), loss.get("beta", beta))
        )
    return found


def check_source(source: str) -> None:
    """Raises TbpoError if a source of `eval.against` is nothing that can be loaded."""
    from huggingface_hub import snapshot_download

    folder = Path(source)
    repo, _, revision = source.partition("@")
    if not folder.exists() and not is_local(source) and source.count("/") == 1:
        with suppress(OSError, ValueError):
            wanted = ["adapter_config.json", "config.json"]
            folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
    if not any(
        (folder / name).exists()
        for name in ("align/manifest.json", "adapter_config.json", "config.json")
    ):
        expected = (
            "the folder of an aligned run, an adapter or a model, "
            "or the id of a Hub repository within reach"
        )
        fix = f"tbpo align RECIPE --run-dir {source}, or name another one"
        raise TbpoError(
            "there is nothing to compare with", f"eval.against: {source}", expected, fix
        )
    RunDir(folder).check("align")


def _base_of(run: RunDir) -> list[str | None] | None:
    """Which weights a run was trained from; None for a published adapter, which has a recipe.toml,
    too.
    """
    if not (inputs := run.started_from("align")):
        return None
    hashes = [file["sha256"] for file in inputs["files"].get("model.base", {}).values()]
    return sorted(hashes) or [
        inputs["settings"].get(f"model.{key}") for key in ("base", "revision")
    ]
