"""The judge that is a reward model: `eval.reward_model`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.errors import TbpoError
from tbpo_cli.evaluation.judges.judge import Answer, Judge, score_judge

KEY = "eval.reward_model"
BATCH_SIZE = 16  # answers that it reads at a time


def judge_of(source: str, cache: Path | None = None) -> Judge:
    """A judge from a sequence classification model with one output: a folder or a Hub repository,
    of safetensors.

    It raises TbpoError, when it is first asked, if the model cannot be loaded or is no reward model
    of chats.
    """

    def score(answers: Sequence[Answer]) -> Iterator[float]:
        model = _reward_model(source)
        chats = [
            [*prompt, {"role": "assistant", "content": completion}]
            for prompt, completion in answers
        ]
        texts = model.tokenizer.apply_chat_template(chats, tokenize=False)
        limit = model.tokenizer.model_max_length
        lengths = map(
            len, model.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        )
        if cut := sum(length > limit for length in lengths):
            counted = f"{cut:,} of {len(texts):,} chats are over {limit:,} tokens"
            console.say(f"{counted}: {source} reads their ends")
        size = BATCH_SIZE if model.tokenizer.pad_token is not None else 1
        stream = (text for text in texts)  # of which the pipeline gives the scores as they come
        for found in model(stream, batch_size=size, add_special_tokens=False, truncation=True):
            yield found["score"]

    return score_judge(source.rstrip("/").rpartition("/")[2], score, cache)


def _reward_model(source: str) -> Any:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    from tbpo_cli.model.base import load_whole, refused_with_a_reason

    with refused_with_a_reason(source, KEY):
        kind = AutoModelForSequenceClassification
        model = load_whole(kind, source, KEY, dtype="auto", trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(
            source, padding_side="right", truncation_side="left"
        )
    if model.config.num_labels != 1 or not tokenizer.chat_template:
        template = "a" if tokenizer.chat_template else "no"
        raise TbpoError(
            f"the reward model has {model.config.num_labels} outputs and {template} chat template",
            f"{KEY} = {source!r}",
            "a sequence classification model with one output and a chat template, in safetensors",
            f"change {KEY}",
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    return pipeline(
        "text-classification", model, tokenizer=tokenizer, device=device, function_to_apply="none"
    )
