"""`tbpo sample`: completions from the policy and from the reference, side by side."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from tbpo_cli import console
from tbpo_cli.config.recipe import Recipe
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.answers import write_answers
from tbpo_cli.evaluation.kept import KEPT, Kept, digest
from tbpo_cli.runs.files import json_lines, read_sealed, write_sealed, write_whole
from tbpo_cli.runs.launch import ALONE, Processes, run_or_launch
from tbpo_cli.runs.rounds import root_of, with_pairs
from tbpo_cli.runs.run_dir import RunDir
from tbpo_cli.runs.stage import Stage

if TYPE_CHECKING:
    from tbpo_cli.data.prompts import Prompt
    from tbpo_cli.data.templates import Chat
    from tbpo_cli.train.placement import Placement

Json = dict[str, Any]
Key = tuple[str, int, int]  # model, place of the prompt, number of the sample

SHOWN_PROMPTS = 3
ANSWERS = "answers"  # the folder of what is written for benchmarks
ORDER = itemgetter("row", "sample", "model")
SETTINGS = ("temperature", "top_p", "max_new_tokens")
# Of a line of samples.jsonl: what is not the answer, but said of it.
ABOUT = {"row", "prompt", "messages", "tools", "model", "num_tokens", "settings"}
STARTED = "started.json"  # in KEPT: what the answers in the parts depend on


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Writes sample/samples.jsonl: for each prompt, sample and model its completion.

    The answers to AlpacaEval's or Arena-Hard's prompts are also written in their formats.
    """
    from tbpo_cli.data.prompts import prompt_rows
    from tbpo_cli.train.placement import placed

    started = time.monotonic()
    run_or_launch(STAGE, recipe, run_dir, processes)
    folder = run_dir.stage("sample")
    samples = sorted(_written(folder), key=ORDER)
    write_whole(
        folder / "samples.jsonl",
        "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples),
    )
    names = {"policy": run_dir.path.name, "reference": f"{run_dir.path.name}-reference"}
    named = [one | {"model": names[one["model"]]} for one in samples]
    shutil.rmtree(folder / ANSWERS, ignore_errors=True)  # of other prompts
    write_answers(folder / ANSWERS, prompt_rows(recipe), named)
    _keep_parts(folder)
    facts = {"num_samples": len(samples), "seconds": round(time.monotonic() - started, 1)}
    run_dir.finish("sample", [folder / "samples.jsonl"], facts | placed(folder))
    report(recipe, run_dir)


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the completions of the first prompts, and how many there are."""
    path = run_dir.stage("sample") / "samples.jsonl"
    samples = json_lines(path)
    rows = []
    for model in recipe.sample.models:
        tokens = [one["num_tokens"] for one in samples if one["model"] == model]
        stopped = [one["finish_reason"] == "stop" for one in samples if one["model"] == model]
        rows.append([model, f"{len(tokens):,}", f"{mean(tokens):.1f}", f"{mean(stopped):.0%}"])
    console.show_table(
        "Completions", ["model", "completions", "mean tokens", "ended by themselves"], rows
    )
    _show([sample for sample in samples if sample["row"] < SHOWN_PROMPTS])
    console.say(f"all of them: {path}")
    for file in sorted(path.parent.glob(f"{ANSWERS}/**/*.json*")):
        console.say(f"for the benchmark's own tools: {file}")


def answer(recipe: Recipe, run_dir: RunDir, texts: list[str]) -> None:
    """Prints the completions of some prompts by the aligned policy and its reference; keeps
    nothing.

    Raises TbpoError if the run has no aligned policy yet.

    Args:
        texts: user messages, or conversations as JSON: {"messages": [...]} or {"prompt": [...]}.
    """
    from tbpo_cli.data.prompts import prompt_of
    from tbpo_cli.data.sources import Row
    from tbpo_cli.evaluation.served import on_server
    from tbpo_cli.train.group import Group

    if not recipe.sample.adapter and not run_dir.manifest("align"):
        what = "the run has no aligned policy"
        expected = "a complete align stage"
        raise TbpoError(what, str(run_dir.path), expected, "tbpo align RECIPE first")
    chat = _chat(recipe)
    rows = [Row("the command line", number, _content(text)) for number, text in enumerate(texts, 1)]
    prompts = [prompt_of(row, chat) for row in rows]
    with on_server(recipe, chat, prompts, Group.of_environment().device):
        _show([*_sample(recipe, run_dir, chat, prompts, _keys(recipe, prompts))])


def work(recipe: Recipe, run_dir: RunDir) -> None:
    """Samples in this process, which may be one of several; each writes its own part."""
    from tbpo_cli.data.prompts import prompts_of
    from tbpo_cli.evaluation.served import on_server
    from tbpo_cli.train.answering import place_sampled
    from tbpo_cli.train.group import Group
    from tbpo_cli.train.placement import Placement

    group = Group.of_environment()
    chat = _chat(recipe)
    folder = run_dir.begin(STAGE, recipe) if group.is_main else run_dir.stage("sample")
    prompts = prompts_of(with_pairs(recipe, run_dir), run_dir.stage("prepare") / "eval", chat)
    keys = _keys(recipe, prompts)
    if group.is_main and run_dir.root is None:
        _take_known(recipe, run_dir, chat, prompts, keys)
    group.gather(None)  # nobody reads the parts before they are those of this sampling
    done = {_key_of(one) for one in _written(folder)}
    group.gather(None)  # nobody writes before all have read what is there
    own = group.share(keys)
    num_left = sum(key not in done for key in own)
    left = {*keys} - done
    placement = place_sampled(recipe, run_dir, group) if left else Placement()
    samples = _sample(recipe, run_dir, chat, prompts, own, done, placement)
    with ExitStack() as stack:
        if group.is_main and any(model == "policy" for model, *_ in left):
            is_base = root_of(run_dir) != run_dir.path and recipe.sample.adapter is None
            compares = placement.mesh is None
            stack.enter_context(on_server(recipe, chat, prompts, group.device, is_base, compares))
        group.gather(None)  # nobody asks before the server has the policy
        _write_part(folder / f"part-{group.rank}.jsonl", samples, num_left)
        group.gather(None)


def _write_part(path: Path, samples: Iterator[Json], num_left: int) -> None:
    """Adds samples to a part as they come."""
    with path.open("a", encoding="utf-8") as part:
        if part.tell():  # its last line may have been cut short
            part.write("\n")
        for sample in console.track(samples, "sampling", num_left, every=num_left // 10 + 1):
            part.write(json.dumps(sample, ensure_ascii=False) + "\n")
            part.flush()


def _take_known(
    recipe: Recipe, run_dir: RunDir, chat: Chat, prompts: Sequence[Prompt], keys: Sequence[Key]
) -> None:
    """Makes the parts those of this sampling, with the answers that are known already.

    1. What the parts have from a sampling with other settings, which was interrupted, is kept.
    2. What depends on the same and was kept, here or by the evaluation, stands in a part again.
    3. What was not asked for, as a second sample where one is wanted now, leaves the parts.
    """
    from tbpo_cli.evaluation.measurements import answers_of_stage

    folder = run_dir.stage("sample")
    (folder / KEPT).mkdir(exist_ok=True)
    kept = answers_of_stage(recipe, run_dir)
    started = {name: one.depends_on for name, one in kept.items()}
    before = read_sealed(folder / KEPT / STARTED)
    if before and digest(before) != digest(started):
        _keep_parts(folder)
    write_sealed(folder / KEPT / STARTED, started)
    places = [folder / KEPT]
    if not run_dir.is_restarted("sample"):
        places.append(run_dir.stage("eval") / KEPT)
    there = {_key_of(one): one for one in _written(folder)}
    rows = {prompt.prompt_id: row for row, prompt in enumerate(prompts)}
    for model, one in kept.items():
        for (prompt_id, number), answer in one.known(*places).items():
            if prompt_id in rows and (key := (model, rows[prompt_id], number)) not in there:
                there[key] = _line(recipe, chat, prompts, key, answer)
    lines = [there[key] for key in keys if key in there]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(folder / "part-0.jsonl", text)
    for part in {*folder.glob("part-*.jsonl")} - {folder / "part-0.jsonl"}:
        part.unlink()


def _keep_parts(folder: Path) -> None:
    """Keeps the answers in the parts under what they depend on, and removes the parts.

    In rounds nothing is kept: what was made from other inputs is set aside there.
    """
    lines = _written(folder)
    for model, depends_on in read_sealed(folder / KEPT / STARTED).items():
        one = Kept("answers", depends_on)
        new = [
            {name: value for name, value in line.items() if name not in ABOUT}
            for line in lines
            if line["model"] == model
        ]
        rows = {(row["prompt_id"], row["sample"]): row for row in (*one.read(folder / KEPT), *new)}
        one.write(folder / KEPT, rows.values())
    for part in folder.glob("part-*.jsonl"):
        part.unlink()


def _content(text: str) -> Any:
    with suppress(ValueError):
        content = json.loads(text)
        if isinstance(content, dict) and content.keys() & {"messages", "prompt"}:
            return content
    return text


def _chat(recipe: Recipe) -> Chat:
    from tbpo_cli.data.tokenizer import load_chat

    return load_chat(recipe.model, recipe.data.template_date)


def _keys(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Key]:
    """Everything that is to be sampled."""
    settings = recipe.sample
    return list(
        itertools.product(settings.models, range(len(prompts)), range(settings.num_samples))
    )


def _sample(
    recipe: Recipe,
    run_dir: RunDir,
    chat: Chat,
    prompts: Sequence[Prompt],
    keys: Sequence[Key],
    done: Collection[Key] = (),
    placement: Placement | None = None,
) -> Iterator[Json]:
    """Yields samples as they come, in batches that do not depend on which keys are `done`.

    The models are loaded when one of them is to answer here, or in another of the processes that
    make the passes together.
    """
    from tbpo_cli.evaluation.served import served
    from tbpo_cli.model.generate import samples_of
    from tbpo_cli.model.policy import POLICY, REFERENCE
    from tbpo_cli.train.answering import load_sampled
    from tbpo_cli.train.placement import Placement

    settings = recipe.sample
    policy = None
    placement = placement or Placement()
    together = placement.together
    rows = {prompt.prompt_id: row for row, prompt in enumerate(prompts)}
    for model in settings.models:
        of_model = [key for key in keys if key[0] == model]
        known = {place for place, key in enumerate(of_model) if key in done}
        if not together.any(len(known) < len(of_model)):
            continue
        asked = [(prompts[row], number) for _, row, number in of_model]
        if model == "policy" and settings.endpoint is not None:
            left = [key for place, key in enumerate(asked) if place not in known]
            samples = served(recipe, chat, left, {"logprobs": True})
        else:
            policy = policy or load_sampled(recipe, run_dir, placement.mesh)
            view = POLICY if model == "policy" else REFERENCE
            seed = recipe.run.seed
            batches = samples_of(policy, view, chat, asked, settings, seed, known, together)
            samples = itertools.chain.from_iterable(batches)
        for sample in samples:
            key = (model, rows[sample["prompt_id"]], sample["sample"])
            if key not in done:
                yield _line(recipe, chat, prompts, key, sample)


def _line(recipe: Recipe, chat: Chat, prompts: Sequence[Prompt], key: Key, answer: Json) -> Json:
    """A line of samples.jsonl: an answer, and what is said of it."""
    model, row, _ = key
    prompt = prompts[row]
    text = chat.tokenizer.decode([*prompt.token_ids])
    about = {"row": row, "prompt": text, "messages": prompt.messages, "model": model}
    about |= {"tools": prompt.tools} if prompt.tools else {}
    settings = {name: getattr(recipe.sample, name) for name in SETTINGS}
    return {**about, **answer, "num_tokens": len(answer["token_ids"]), "settings": settings}


def _key_of(line: Json) -> Key:
    return line["model"], line["row"], line["sample"]


def _written(folder: Path) -> list[Json]:
    """What is in the parts; lines that were cut short are left out."""
    return [
        line
        for part in sorted(folder.glob("part-*.jsonl"))
        for line in json_lines(part, may_be_cut=True)
    ]


def _show(samples: list[Json]) -> None:
    for (_, prompt), group in itertools.groupby(
        sorted(samples, key=ORDER), key=itemgetter("row", "prompt")
    ):
        console.show(f"\n{prompt}", style="dim")
        for sample in group:
            console.show(f"{sample['model']}: {sample['completion']}")


def _needs(recipe: Recipe) -> tuple[str, ...]:
    """The base alone, and an adapter of elsewhere, need no training; a file needs no pairs."""
    settings = recipe.sample
    is_base = settings.models == ("reference",) and recipe.sft is None
    trained = () if settings.adapter or is_base else recipe.training_stages
    return ("prepare", *trained) if trained or settings.prompts == "eval" else ()


STAGE = Stage(
    name="sample",
    needs=_needs,
    keys=("run.seed", "model.", "data.template_date", "sample."),
    run=run,
    report=report,
    work=work,
    renews=lambda run_dir: (run_dir.stage("sample") / KEPT).is_dir(),
)
