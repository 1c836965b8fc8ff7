"""Who is compared with whom, on which texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tbpo_cli.config.recipe import Recipe
from tbpo_cli.data.pairs import Message, Messages
from tbpo_cli.data.prompts import held_out_texts, prompt_rows
from tbpo_cli.data.store import PairStore
from tbpo_cli.evaluation.answer_files import Question, answers_to, read_answers
from tbpo_cli.evaluation.answers import names_of_answers, question_id
from tbpo_cli.evaluation.judges.judge import Comparison, text_of
from tbpo_cli.evaluation.judges.own_words import without_thinking
from tbpo_cli.runs.run_dir import RunDir

Rows = list[dict[str, Any]]
# From a message and the number of its tokens, None if it is not known.
Read = Callable[[Message, int | None], "Completion"]
Key = tuple[str, str, int]  # name of a model, id of a prompt, number of a sample


@dataclass(frozen=True)
class Completion:
    """What a judge reads of a completion.

    Args:
        text: without the thinking part.
        num_tokens: of that, with the end of the turn.
    """

    text: str
    num_tokens: int


def comparisons_of(
    recipe: Recipe, run_dir: RunDir, samples: Rows, others: list[str]
) -> list[Comparison]:
    """The comparisons that the judges are asked for.

    1. The completions of all models, by model, prompt and number of the sample.
    2. With "chosen" among the opponents, the preferred answers of the data, for every sample.
    3. The answers of files, to those of the prompts that they have.
    4. Who is compared: the policy with each opponent and each other model; then each other model
       with each opponent.
    5. For each of these, every prompt and sample of the sample stage.

    Args:
        samples: of all models, with their name as `model`; those of the sample stage have
            `messages`.
        others: the names of the models of `eval.against`.
    """
    read = _reader(recipe)
    opponents: tuple[str, ...] = recipe.eval.opponents
    completions: dict[Key, Completion] = {
        (one["model"], one["prompt_id"], one["sample"]): read(
            {"content": one["completion"]}, len(one["token_ids"])
        )
        for one in samples
    }
    prompts = {
        (one["prompt_id"], one["sample"]): one["messages"] for one in samples if "messages" in one
    }
    tools = {one["prompt_id"]: tuple(one.get("tools", ())) for one in samples if "messages" in one}
    if "chosen" in opponents:
        chosen = _chosen(recipe, run_dir, {prompt_id for prompt_id, _ in prompts}, read)
        completions |= {("chosen", *key): chosen[key[0]] for key in prompts}
    asked = {prompt_id: messages for (prompt_id, _), messages in prompts.items()}
    questions = questions_of(asked, prompt_rows(recipe) if recipe.eval.answers else {})
    files = tuple(dict.fromkeys(recipe.eval.answers))
    for name, file in zip(names_of_answers(files, others), files, strict=True):
        found, _ = answers_to(read_answers(file), questions)
        said = {prompt_id: read({"content": text}, None) for prompt_id, text in found.items()}
        completions |= {(name, *key): said[key[0]] for key in prompts if key[0] in said}
        opponents = (*opponents, name)
    pairings = [("policy", other) for other in (*opponents, *others)]
    pairings += [(model, opponent) for model in others for opponent in opponents]
    comparisons = []
    for model, against in pairings:
        for (prompt_id, number), messages in prompts.items():
            if (against, prompt_id, number) not in completions:
                continue  # a file of answers may have fewer
            one = completions[model, prompt_id, number]
            other = completions[against, prompt_id, number]
            texts = (one.text, other.text)
            lengths = (one.num_tokens, other.num_tokens)
            comparisons.append(
                Comparison(
                    prompt_id, messages, model, against, *texts, *lengths, number, tools[prompt_id]
                )
            )
    return comparisons


def _reader(recipe: Recipe) -> Read:
    """Makes what a judge reads of a message and the number of all its tokens."""

    @cache
    def chat() -> Any:
        from tbpo_cli.data.tokenizer import load_chat

        return load_chat(recipe.model, recipe.data.template_date)

    def read(message: Message, num_tokens: int | None) -> Completion:
        whole = text_of(message)
        text = without_thinking(whole, recipe.eval.thinking)
        is_shorter = text != whole
        if (
            num_tokens is None
            or is_shorter
            or message.get("reasoning_content")
            or message.get("thinking")
        ):
            num_tokens = len(chat().encoder.encode_plain([text])[0]) + 1
        return Completion(text, num_tokens)

    return read


def _chosen(
    recipe: Recipe, run_dir: RunDir, prompt_ids: set[str], read: Read
) -> dict[str, Completion]:
    """The preferred answers of the data to some prompts, by their ids."""
    store = PairStore(run_dir.stage("prepare") / "eval")
    texts = held_out_texts(recipe.data, prompt_ids)
    found = {}
    for index in range(len(store)):
        pair = store[index]
        if pair.pair_id in texts:
            found[pair.pair_id] = read(texts[pair.pair_id].chosen, len(pair.chosen_ids))
    return found


def questions_of(prompts: Mapping[str, Messages], rows: Mapping[str, Any]) -> dict[str, Question]:
    """The prompts as a file of answers is searched for them, by their ids.

    Args:
        rows: of the file of the prompts, if they are of one, by the ids of the prompts.
    """
    return {
        prompt_id: Question(messages, question_id(rows.get(prompt_id)))
        for prompt_id, messages in prompts.items()
    }
