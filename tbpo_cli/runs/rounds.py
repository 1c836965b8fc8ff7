"""The rounds of a run: with which recipe, and in which folder, the stages of each are run.

RUN/rounds/prompts has the prompts of each round; RUN/rounds/N the answers of the policy of the
round before, their marks, the pairs and the training; RUN/rounds/0 and RUN/rounds/N/after what the
first policy, and that of round N, answer to held-out prompts. RUN/prepare and RUN/align are links
to the last round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tbpo_cli.config.recipe import Data, Recipe, Sample, Source
from tbpo_cli.config.rounds import Rounds
from tbpo_cli.runs.files import sync
from tbpo_cli.runs.inputs import NO_FILES
from tbpo_cli.runs.run_dir import RunDir

FOLDER = "rounds"
PROMPTS = "prompts"  # the stage that deals them out, and its folder
HELD_OUT = "held_out"  # the prompts that no round trains on
MARKED = "mark/answers.jsonl"  # the answers of a round with their marks
# Keys in the recipe of a round's stages: what a message calls them.
NAMES = {
    "align.start": "the policy of the round before",
    "sample.adapter": "the policy that answers",
    "sample.endpoint_model": "rounds.endpoint_model",
    "sample.max_new_tokens": "rounds.max_new_tokens",
    "sample.num_samples": "rounds.answers",
    "sample.prompts": "the prompts",
    "sample.temperature": "rounds.temperature",
    "sample.top_p": "rounds.top_p",
}
LINKED = ("prepare", "align")  # of the last round; they are where a run without rounds has them


@dataclass(frozen=True)
class Place:
    """What some stages of a round are run with.

    Args:
        recipe: without [rounds]: a recipe like any other.
        run_dir: the folder that they are in.
    """

    recipe: Recipe
    run_dir: RunDir


def root_of(run_dir: RunDir) -> Path:
    """The folder of the run that a round's folder belongs to."""
    path = run_dir.path
    return next((each.parent for each in (path, *path.parents) if each.name == FOLDER), path)


def all_rounds(run_dir: RunDir) -> RunDir:
    """The folder of the rounds of a run."""
    return RunDir(run_dir.path / FOLDER, run_dir.path)


def place_of_round(recipe: Recipe, run_dir: RunDir, number: int) -> Place:
    """What `sample`, `mark` and `prepare` of a round are run with.

    The answers are those of the policy of the round before, whatever that is compared with next:
    nothing here depends on `rounds.reference`, so that another one keeps answers, marks and pairs.

    Args:
        recipe: with [rounds].
        number: from 1.
    """
    changed = replace(
        recipe,
        data=_data_of(recipe, run_dir, number),
        sample=_sample_of(recipe, run_dir, str(number), number - 1),
        rounds=None,
    )
    return Place(changed, RunDir(_folder(run_dir, number), run_dir.path))


def place_of_training(recipe: Recipe, run_dir: RunDir, number: int) -> Place:
    """What `align` of a round is run with: its reference, and the policy that it starts from.

    The first round starts from the first reference, as a run without rounds does.
    """
    place = place_of_round(recipe, run_dir, number)
    if number == 1:
        return place
    before = str(policy_after(recipe, run_dir, number - 1))
    model = recipe.model
    align = recipe.align
    if _settings(recipe).reference == "first":
        align = replace(align, start=before)
    elif model.lora is not None:
        model = replace(model, adapter=before)
    else:
        model = replace(model, base=before, revision=None)
    return replace(place, recipe=replace(place.recipe, model=model, align=align))


def place_of_policy(recipe: Recipe, run_dir: RunDir, number: int) -> Place:
    """What the held-out prompts are answered with by the policy of a round; of 0, by the first."""
    folder = _folder(run_dir, number)
    changed = replace(recipe, sample=_sample_of(recipe, run_dir, HELD_OUT, number), rounds=None)
    return Place(changed, RunDir(folder / "after" if number else folder, run_dir.path))


def with_pairs(recipe: Recipe, run_dir: RunDir) -> Recipe:
    """The recipe, with the rows that RUN/prepare was made of as its data."""
    if recipe.rounds is None:
        return recipe
    return replace(recipe, data=_data_of(recipe, run_dir, recipe.rounds.number))


def in_words(changes: list[str]) -> list[str]:
    """What differs in the inputs of a round's stage, by the keys that the run's recipe has.

    Args:
        changes: lines of `differences`, "KEY: BEFORE → NOW" each.
    """
    start = next((line for line in changes if line.startswith("align.start: ")), "")
    if NO_FILES in start:
        now = "previous" if start.endswith(NO_FILES) else "first"
        keys = ("align.start: ", "model.adapter: ", "model.base: ")
        others = [line for line in changes if not line.startswith(keys)]
        changes = [f'rounds.reference: now "{now}"', *others]
    parts = (line.partition(": ") for line in changes)
    return [f"{NAMES.get(key, key)}{colon}{rest}" for key, colon, rest in parts]


def policy_after(recipe: Recipe, run_dir: RunDir, number: int) -> Path | None:
    """The weights that a round ends with; None before the first one, if that starts from a base."""
    if number == 0:
        return None if recipe.model.adapter is None else Path(recipe.model.adapter)
    kind = "adapter" if recipe.model.lora is not None else "model"
    return _folder(run_dir, number) / "align" / kind


def has_policy(recipe: Recipe, run_dir: RunDir) -> bool:
    """Whether the run has the policy that its recipe asks for."""
    if recipe.rounds is None:
        return bool(run_dir.manifest("align"))
    return bool(RunDir(_folder(run_dir, recipe.rounds.number)).manifest("align"))


def is_linked(recipe: Recipe, run_dir: RunDir) -> bool:
    """Whether RUN/prepare and RUN/align are the links that `link_last` would make."""
    return all(
        run_dir.stage(name).is_symlink() and run_dir.stage(name).readlink() == target
        for name, target in _links(recipe, run_dir).items()
    )


def link_last(recipe: Recipe, run_dir: RunDir) -> None:
    """Makes the results of the last round those of the run, once it is complete; before that, where
    there is no policy yet, the pairs of the first round.
    """
    if recipe.rounds is None or is_linked(recipe, run_dir):
        return
    for name, target in _links(recipe, run_dir).items():
        path = run_dir.stage(name)
        if path.exists() and not path.is_symlink():
            run_dir.set_aside(name)  # of a recipe without rounds
        new = path.with_name(f".{name}.link")
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        new.replace(path)
    sync(run_dir.path)


def _links(recipe: Recipe, run_dir: RunDir) -> dict[str, Path]:
    """The links in the run's folder: name of a stage, and where its results are."""
    number = _settings(recipe).number
    if has_policy(recipe, run_dir):
        return {name: Path(FOLDER) / str(number) / name for name in LINKED}
    first = RunDir(_folder(run_dir, 1))
    if first.manifest("prepare") and not run_dir.manifest("align"):
        return {"prepare": Path(FOLDER) / "1" / "prepare"}
    return {}


def _settings(recipe: Recipe) -> Rounds:
    assert recipe.rounds is not None
    return recipe.rounds


def _folder(run_dir: RunDir, number: int) -> Path:
    return run_dir.path / FOLDER / str(number)


def _sample_of(recipe: Recipe, run_dir: RunDir, prompts: str, policy: int) -> Sample:
    """How the policy of a round answers a file of prompts."""
    settings = _settings(recipe)
    weights = policy_after(recipe, run_dir, policy)
    is_base = weights is None and settings.endpoint is None
    return Sample(
        prompts=str(run_dir.path / FOLDER / PROMPTS / f"{prompts}.jsonl"),
        num_samples=settings.answers,
        adapter=None if weights is None else str(weights),
        models=("reference",) if is_base else ("policy",),
        batch_size=settings.batch_size,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        endpoint=settings.endpoint,
        endpoint_model=settings.endpoint_model,
        endpoint_adapter=_as_served(recipe, run_dir, weights),
    )


def _as_served(recipe: Recipe, run_dir: RunDir, weights: Path | None) -> str | None:
    """The folder of an adapter as the server sees it; None without a server or an adapter."""
    settings = _settings(recipe)
    if settings.endpoint is None or weights is None:
        return None
    if settings.endpoint_folder is None or not weights.is_relative_to(run_dir.path):
        return str(weights)
    return str(Path(settings.endpoint_folder) / weights.relative_to(run_dir.path))


def _data_of(recipe: Recipe, run_dir: RunDir, number: int) -> Data:
    """The rows of a round: its marked answers, and a share of the earlier ones'.

    The held-out pairs are those of `data.eval`, or made of the first policy's answers, where that
    names prompts alone or nothing.
    """
    data = recipe.data
    settings = _settings(recipe)

    def marked(of_round: int, weight: float = 1.0) -> Source:
        return Source(str(_folder(run_dir, of_round) / MARKED), weight=weight)

    earlier = range(1, number) if settings.replay else ()
    train = (marked(number), *(marked(each, settings.replay) for each in earlier))
    has_pairs = bool(all_rounds(run_dir).manifest(PROMPTS).get("eval_has_pairs"))
    return replace(
        data,
        train=train,
        eval=data.eval if has_pairs else (marked(0),),
        eval_split=data.eval_split if has_pairs else "test",
        train_split="train",
        eval_fraction=None,
        format="auto",
        columns=data.columns if has_pairs else {},
        max_reject_fraction=1.0,  # a prompt whose answers are all alike is no fault of the rows
    )
