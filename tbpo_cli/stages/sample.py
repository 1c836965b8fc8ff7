"""`tbpo sample`: completions from the policy and from the reference, side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from tbpo_cli import console
from tbpo_cli.endpoint import Endpoint, Reply
from tbpo_cli.errors import TbpoError
from tbpo_cli.files import write_whole
from tbpo_cli.launch import ALONE, Processes, run_or_launch
from tbpo_cli.recipe import Recipe
from tbpo_cli.run import RunDir

if TYPE_CHECKING:
    from tbpo_cli.data.prompts import Prompt
    from tbpo_cli.model.generate import Completion
    from tbpo_cli.model.load import Policy

    Key = tuple[str, Prompt, int, int]  # model, prompt, number of the sample, place of the prompt

SHOWN_PROMPTS = 3
SETTINGS = ("temperature", "top_p", "max_new_tokens")
SERVER_TIMEOUT = 600.0  # seconds for a completion


def run(recipe: Recipe, run_dir: RunDir, processes: Processes = ALONE) -> None:
    """Writes sample/samples.jsonl: for each prompt, sample and model its completion."""
    run_or_launch(work, "sample", recipe, run_dir, processes)
    folder = run_dir.stage("sample")
    samples = sorted(_written(folder), key=lambda sample: (sample["row"], sample["sample"], sample["model"]))
    write_whole(folder / "samples.jsonl", "".join(_line(sample) for sample in samples))
    for part in folder.glob("part-*.jsonl"):
        part.unlink()
    run_dir.finish("sample", [folder / "samples.jsonl"], {"num_samples": len(samples)})
    report(recipe, run_dir)


def report(recipe: Recipe, run_dir: RunDir) -> None:
    """Shows the completions of the first prompts, and how many there are."""
    path = run_dir.stage("sample") / "samples.jsonl"
    with path.open(encoding="utf-8") as lines:
        samples = [json.loads(line) for line in lines]
    rows = []
    for model in recipe.sample.models:
        of_model = [sample for sample in samples if sample["model"] == model]
        stopped = sum(sample["finish_reason"] == "stop" for sample in of_model)
        tokens = sum(sample["num_tokens"] for sample in of_model)
        share, mean = f"{stopped / len(of_model):.0%}", f"{tokens / len(of_model):.1f}"
        rows.append([model, f"{len(of_model):,}", mean, share])
    console.show_table("Completions", ["model", "completions", "mean tokens", "ended by themselves"], rows)
    _show([sample for sample in samples if sample["row"] < SHOWN_PROMPTS])
    console.say(f"all of them: {path}")


def answer(recipe: Recipe, run_dir: RunDir, texts: list[str]) -> None:
    """Prints the completions of some prompts by the aligned policy and its reference; keeps nothing.

    Args:
        texts: user messages, or conversations as JSON: {"messages": [...]} or {"prompt": [...]}.

    Raises:
        TbpoError: if the run has no aligned policy yet.
    """
    from tbpo_cli.data.prompts import prompt_of
    from tbpo_cli.data.sources import Row

    if not recipe.sample.adapter and run_dir.manifest("align") is None:
        raise TbpoError(
            "the run has no aligned policy", str(run_dir.path), "a complete align stage", "tbpo align RECIPE first"
        )
    sampler = _Sampler(recipe, run_dir)
    rows = [Row("the command line", number, _content(text)) for number, text in enumerate(texts, 1)]
    prompts = [prompt_of(row, sampler.chat) for row in rows]
    _show([sample for batch in sampler.sample(_keys(recipe, prompts)) for sample in batch])


def work(recipe: Recipe, run_dir: RunDir) -> None:
    """Samples in this process, which may be one of several; each writes its own part."""
    from tbpo_cli.data.prompts import prompts_of
    from tbpo_cli.train.group import Group

    group = Group.of_environment()
    folder = run_dir.begin("sample", recipe) if group.is_main else run_dir.stage("sample")
    sampler = _Sampler(recipe, run_dir)
    prompts = prompts_of(recipe, run_dir.stage("prepare") / "eval", sampler.chat)
    keys = _keys(recipe, prompts)
    done = {(sample["model"], sample["prompt_id"], sample["sample"]) for sample in _written(folder)}
    group.gather(None)  # nobody writes before all have read what is there
    left = group.share([key for key in keys if (key[0], key[1].prompt_id, key[2]) not in done])
    path = folder / f"part-{group.rank}.jsonl"
    if path.exists():  # what a crash left of a last line goes
        whole, newline, _ = path.read_text(encoding="utf-8").rpartition("\n")
        write_whole(path, whole + newline)
    with (
        path.open("a", encoding="utf-8") as part,
        console.progress("sampling", len(left), every=max(1, len(left) // 10)) as update,
    ):
        written = 0
        for batch in sampler.sample(left):
            part.write("".join(map(_line, batch)))
            part.flush()
            written += len(batch)
            update(written, "")
    group.gather(None)


def _content(text: str) -> Any:
    with suppress(ValueError):
        content = json.loads(text)
        if isinstance(content, dict) and content.keys() & {"messages", "prompt"}:
            return content
    return text


def _keys(recipe: Recipe, prompts: list[Prompt]) -> list[Key]:
    """Everything that is to be sampled."""
    return [
        (model, prompt, number, row)
        for model in recipe.sample.models
        for row, prompt in enumerate(prompts)
        for number in range(recipe.sample.num_samples)
    ]


class _Sampler:
    """The aligned policy, its reference and its tokenizer; models are loaded when they are first needed here."""

    def __init__(self, recipe: Recipe, run_dir: RunDir) -> None:
        from tbpo_cli.data.template import Chat
        from tbpo_cli.data.tokens import end_of_turn, load_tokenizer

        self.recipe, self.run_dir = recipe, run_dir
        self.chat = Chat(load_tokenizer(recipe.model), recipe.data.template_date)
        self.stop_ids = [end_of_turn(self.chat)]

    @cached_property
    def policy(self) -> Policy:
        from tbpo_cli.model.load import load_trained
        from tbpo_cli.model.lora import local_adapter
        from tbpo_cli.train.group import device_of_environment

        if self.recipe.sample.adapter:
            return load_trained(self.recipe, device_of_environment(), local_adapter(self.recipe.sample.adapter), None)
        sft_output = self.run_dir.weights("sft") if self.recipe.sft is not None else None
        return load_trained(self.recipe, device_of_environment(), self.run_dir.weights("align"), sft_output)

    def sample(self, keys: Sequence[Key]) -> Iterator[list[dict[str, Any]]]:
        """Yields lists of samples, a batch at a time; prompts of like length share a batch."""
        for model in self.recipe.sample.models:
            of_model = sorted((key for key in keys if key[0] == model), key=lambda key: len(key[1].token_ids))
            if model == "policy" and self.recipe.sample.endpoint is not None:
                yield from self._served(of_model, {"logprobs": True})
                continue
            for start in range(0, len(of_model), self.recipe.sample.batch_size):
                yield self._batch(model, of_model[start : start + self.recipe.sample.batch_size])

    def _batch(self, model: str, keys: list[Key]) -> list[dict[str, Any]]:
        from tbpo_cli.model.generate import generate
        from tbpo_cli.model.load import REFERENCE

        prompts, seeds = [prompt.token_ids for _, prompt, _, _ in keys], [self._seed(key) for key in keys]
        policy, decode = self.policy, self.chat.tokenizer.decode
        with nullcontext(policy.model) if model == "policy" else policy.view(REFERENCE) as viewed:
            completions = generate(viewed, prompts, seeds, self.recipe.sample, self.stop_ids)
        return [
            self._record(key, str(decode(list(one.token_ids), skip_special_tokens=True)), one.token_ids, one)
            for key, one in zip(keys, completions, strict=True)
        ]

    def _served(self, keys: list[Key], asks: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
        """Samples from the server, one at a time. What it refuses is asked for once more, without what is in `asks`."""
        settings, refused = self.recipe.sample, []
        assert settings.endpoint is not None
        same = {"model": settings.endpoint_model, "max_tokens": settings.max_new_tokens, **asks}
        same |= {"temperature": settings.temperature, "top_p": settings.top_p}
        bodies = [{**same, "messages": key[1].messages, "seed": self._seed(key) % 2**31} for key in keys]
        for place, reply in Endpoint(settings.endpoint, settings.batch_size, SERVER_TIMEOUT).ask(bodies):
            if not reply.refused:
                ids = self.chat.encode([reply.text], controls_as_text=True)[0]
                ids += self.stop_ids if reply.finish_reason == "stop" else []
                yield [self._record(keys[place], reply.text, ids, reply)]
            elif asks:
                refused.append(keys[place])
            else:
                where = f"prompt {keys[place][1].prompt_id}"
                raise TbpoError(reply.refused, where, "a completion", "leave the prompt out, or change [sample]")
        if refused:
            yield from self._served(refused, {})

    def _seed(self, key: Key) -> int:
        from tbpo_cli.model.generate import seed_of

        return seed_of(self.recipe.run.seed, key[1].prompt_id, key[2])

    def _record(self, key: Key, text: str, ids: Sequence[int], said: Completion | Reply) -> dict[str, Any]:
        model, prompt, number, row = key
        return {
            "row": row,
            "prompt_id": prompt.prompt_id,
            "sample": number,
            "model": model,
            "prompt": self.chat.tokenizer.decode(list(prompt.token_ids)),
            "messages": prompt.messages,
            "completion": text,
            "token_ids": ids,
            "num_tokens": len(ids),
            "logp": said.logp,
            "finish_reason": said.finish_reason,
            "settings": {name: getattr(self.recipe.sample, name) for name in SETTINGS},
        }


def _written(folder: Path) -> list[dict[str, Any]]:
    """What is in the parts; a last line that was cut short is left out."""
    lines = [line for part in sorted(folder.glob("part-*.jsonl")) for line in part.read_bytes().splitlines(True)]
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _line(sample: dict[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"


def _show(samples: list[dict[str, Any]]) -> None:
    for (_, prompt), group in itertools.groupby(
        sorted(samples, key=lambda s: (s["row"], s["sample"], s["model"])), key=lambda s: (s["row"], s["prompt"])
    ):
        console.out.print(Text(f"\n{prompt}", style="dim"))
        for sample in group:
            console.out.print(Text.assemble((f"{sample['model']}: ", "bold"), sample["completion"]))
