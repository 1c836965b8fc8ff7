"""The judge that is a reward model: `judge.reward_model`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from tbpo_cli import console
from tbpo_cli.config.judging import Judge as Settings
from tbpo_cli.data.limits import limited
from tbpo_cli.data.pairs import Messages
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.judge import Answer, Judge, score_judge

BATCH_SIZE = 16  # answers that it reads at a time
SOME_ANSWER = "Yes."  # that templates are tried with


def judge_of(settings: Settings, table: str, cache: Path | None = None) -> Judge:
    """A judge from a sequence classification model with one output: a folder or a Hub repository,
    of safetensors.

    It raises TbpoError, when it is first asked, if the model cannot be loaded or is no reward model
    of chats.
    """
    assert settings.reward_model is not None
    source = settings.reward_model
    key = f"{table}.reward_model"

    def score(answers: Sequence[Answer]) -> Iterator[float | TbpoError]:
        model = _reward_model(source, key)
        rendered = [_rendered(model.tokenizer, answer, source) for answer in answers]
        texts = [text for text in rendered if isinstance(text, str)]
        limit = model.tokenizer.model_max_length
        lengths = [
            len(ids)
            for text in texts
            for ids in [model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        ]
        if cut := sum(length > limit for length in lengths):
            counted = f"{cut:,} of {len(texts):,} chats are over {limit:,} tokens"
            console.say(f"{counted}: {source} reads their ends")
        size = BATCH_SIZE if model.tokenizer.pad_token is not None else 1
        stream = (text for text in texts)  # of which the pipeline gives the scores as they come
        found = iter(model(stream, batch_size=size, add_special_tokens=False, truncation=True))
        for text in rendered:
            yield next(found)["score"] if isinstance(text, str) else text

    return score_judge(source.rstrip("/").rpartition("/")[2], score, cache)


def check_prompts(settings: Settings, table: str, prompts: Sequence[Messages]) -> None:
    """Says how many prompts the template of the reward model refuses, whatever the answer.

    Raises:
        TbpoError: if it refuses all of them, or the model is no reward model of chats.
    """
    assert settings.reward_model is not None
    source = settings.reward_model
    key = f"{table}.reward_model"
    tokenizer = _tokenizer(source, key)
    rendered = [_rendered(tokenizer, (prompt, SOME_ANSWER), source) for prompt in prompts]
    refusals = [each for each in rendered if isinstance(each, TbpoError)]
    if refusals and len(refusals) == len(prompts):
        what = refusals[0].what
        expected = "a template that renders the prompts of [sample]"
        fix = f"change {key}, or the prompts: the template refuses all {len(prompts):,} of them"
        raise TbpoError(what, f"{key} = {source!r}", expected, fix)
    if refusals:
        refused = f"{len(refusals):,} of {console.counted(len(prompts), 'prompt')}"
        what = f"{key} gives no mark to answers to {refused}: {refusals[0].what}"
        console.say(f"WARNING: {what}")


def _rendered(tokenizer: Any, answer: Answer, source: str) -> str | TbpoError:
    """The chat as the reward model reads it, or why its template refuses the chat."""
    prompt, completion = answer
    chat = [*prompt, {"role": "assistant", "content": completion}]
    try:
        render = limited(tokenizer.apply_chat_template, "the template of the reward model", source)
        return str(render(chat, tokenize=False))
    except (TemplateError, ValueError, TypeError) as error:
        what = f"the template of the reward model refuses a chat: {error}"
        return TbpoError(what, source, "a template that renders these messages")


def _tokenizer(source: str, key: str) -> Any:
    """Its tokenizer. Raises TbpoError without a template, or with another number of outputs."""
    from transformers import AutoConfig, AutoTokenizer

    from tbpo_cli.model.loading_errors import refused_with_a_reason

    with refused_with_a_reason(source, key):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(
            source, padding_side="right", truncation_side="left"
        )
    if config.num_labels != 1 or not tokenizer.chat_template:
        template = "a" if tokenizer.chat_template else "no"
        raise TbpoError(
            f"the reward model has {config.num_labels} outputs and {template} chat template",
            f"{key} = {source!r}",
            "a sequence classification model with one output and a chat template, in safetensors",
            f"change {key}",
        )
    return tokenizer


def _reward_model(source: str, key: str) -> Any:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from transformers import AutoModelForSequenceClassification, pipeline

    from tbpo_cli.model.base import load_whole
    from tbpo_cli.model.loading_errors import refused_with_a_reason

    with refused_with_a_reason(source, key):
        kind = AutoModelForSequenceClassification
        model = load_whole(kind, source, key, dtype="auto", trust_remote_code=False)
    tokenizer = _tokenizer(source, key)
    model.config.pad_token_id = tokenizer.pad_token_id
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    return pipeline(
        "text-classification", model, tokenizer=tokenizer, device=device, function_to_apply="none"
    )
