"""Judges of two completions: a function that checks, a reward model, or a language model that is asked."""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbpo_cli import console
from tbpo_cli.data.pairs import Messages
from tbpo_cli.endpoint import Endpoint, Reply
from tbpo_cli.errors import TbpoError
from tbpo_cli.recipe import Recipe

Answer = tuple[Messages, str]  # a prompt and its completion
BATCH_SIZE = 16  # answers that a reward model reads at a time
TEMPLATE = """\
Two assistants, A and B, answered the last message of a user. Which answer is better: which does what the user asks, is
right, helpful and clear? Neither the order in which they stand nor their length matters. Compare them in a few
sentences, then end with your verdict: [[A]] if A is better, [[B]] if B is better, [[C]] if they are equally good.

[Conversation]
{prompt}
[Answer of A]
{a}
[End of the answer of A]
[Answer of B]
{b}
[End of the answer of B]
"""
VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
LAST_LINE = re.compile(r"^\W*(?:final )?(?:verdict|answer|winner)?(?: is)?\W*(A|B|C|tie)\W*\Z", re.I | re.M)


@dataclass(frozen=True)
class Comparison:
    """Two completions of one prompt."""

    prompt_id: str  # comparisons with the same one are samples of one prompt
    prompt: Messages
    model: str  # label of what said `completion_a`
    against: str
    completion_a: str
    completion_b: str
    length_a: int  # tokens
    length_b: int


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a comparison."""

    value: float | None  # 1: `completion_a` is better, 0: `completion_b` is, 0.5: a tie, None: it cannot be read
    reason: str  # for a person
    scores: tuple[float, float] | None = None  # of the completions, from a judge that scores each by itself
    consistent: bool | None = None  # whether both orders gave the same verdict; None if they were not asked
    prompt_tokens: int = 0  # of the requests
    completion_tokens: int = 0


@dataclass(frozen=True)
class ScoreJudge:
    """Scores each completion by itself; the higher of two `score`s wins."""

    name: str
    score: Callable[[Sequence[Answer]], Iterator[float]]
    price_per_million: None = None

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """The verdicts, in order. Raises what `score` raises."""
        answers = [(one.prompt, text) for one in comparisons for text in (one.completion_a, one.completion_b)]
        distinct = {(str(prompt), text): (prompt, text) for prompt, text in answers}
        known: dict[tuple[str, str], float] = {}
        with console.progress(self.name, len(distinct), every=1000) as update:
            for key, value in zip(distinct, self.score([*distinct.values()]), strict=True):
                known[key] = value
                update(len(known), "")
        scores = [known[str(prompt), text] for prompt, text in answers]
        pairs = zip(scores[::2], scores[1::2], strict=True)
        return [Verdict((a > b) + (a == b) / 2, f"{a:.4g} against {b:.4g}", (a, b)) for a, b in pairs]


def scorer_of(source: str, _cache: Path | None = None) -> ScoreJudge:
    """A judge from a user's function NAME(prompt, completion) -> float, of the last user message's text.

    Args:
        source: "python:FILE:NAME".

    Raises:
        TbpoError: if there is no such function; later, if it fails or gives no finite number, with the prompt.
    """
    file, _, name = source.removeprefix("python:").rpartition(":")
    path, where = Path(file), f"eval.scorer = {source!r}"
    if not path.is_file() or path.suffix != ".py":
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], 1)
        fix = f"did you mean {near[0]}?" if near else "change eval.scorer"
        raise TbpoError("the scorer's file is not there", where, '"python:FILE:NAME"', fix)
    spec = importlib.util.spec_from_file_location(f"tbpo_scorer_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # of a .py file
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _told("the scorer's file cannot be imported", error, file) from error
    if not callable(function := getattr(module, name, None)):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], 1)
        fix = f"did you mean {near[0]}?" if near else "write it, or change eval.scorer"
        raise TbpoError(f"the scorer's file has no function {name}", where, "def NAME(prompt, completion)", fix)

    def score(prompt: Messages, completion: str) -> float:
        text = next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")
        try:
            if math.isfinite(value := float(function(text, completion))):
                return value
            raise ValueError(f"it returned {value}")
        except Exception as error:
            raise _told(f"the scorer {name} fails for the prompt {text[:200]!r}", error, file) from error

    return ScoreJudge(f"{path.name}:{name}", lambda answers: (score(*answer) for answer in answers))


def _told(what: str, error: BaseException, file: str) -> TbpoError:
    lines = [f", line {frame.lineno}" for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = file + "".join(lines[-1:])
    return TbpoError(f"{what}: {type(error).__name__}: {error}", where, "a finite number", "mend the function")


def reward_model_of(source: str, _cache: Path | None = None) -> ScoreJudge:
    """A judge from a sequence classification model with one output: a folder or a Hub repository, of safetensors.

    Raises:
        TbpoError: later, if the model cannot be loaded, or is no reward model of chats.
    """

    def score(answers: Sequence[Answer]) -> Iterator[float]:
        model = _reward_model(source)
        chats = [[*prompt, {"role": "assistant", "content": completion}] for prompt, completion in answers]
        texts = model.tokenizer.apply_chat_template(chats, tokenize=False)
        size = BATCH_SIZE if model.tokenizer.pad_token is not None else 1
        for start in range(0, len(texts), 10 * size):
            found = model(texts[start : start + 10 * size], batch_size=size, add_special_tokens=False, truncation=True)
            yield from (one["score"] for one in found)

    return ScoreJudge(source.rstrip("/").rpartition("/")[2], score)


def _reward_model(source: str) -> Any:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="right")
        if (outputs := model.config.num_labels) != 1 or info["missing_keys"] or not tokenizer.chat_template:
            template = "a" if tokenizer.chat_template else "no"
            missing = ", ".join(info["missing_keys"]) or "no weights"
            raise ValueError(f"it has {outputs} outputs and {template} chat template, and lacks {missing}")
    except (OSError, ValueError, ImportError) as error:
        raise TbpoError(
            f"the reward model cannot be used: {str(error).splitlines()[0]}",
            f"eval.reward_model = {source!r}",
            "a sequence classification model with one output and a chat template, in safetensors",
            "change eval.reward_model",
        ) from error
    model.config.pad_token_id = tokenizer.pad_token_id
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    return pipeline("text-classification", model, tokenizer=tokenizer, device=device, function_to_apply="none")


@dataclass(frozen=True)
class LanguageJudge:
    """A language model that is shown both completions, in both orders.

    Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685, section 3.4: the
    labels [[A]], [[B]], [[C]], and a win only if both orders say so, else a tie. The last label of an answer counts, or
    its last line if that is nothing but a letter. Completions that are the same tie without being shown.

    Args:
        price_per_million: of the tokens of prompts, and of completions.
        template: a user message, with {prompt}, {a} and {b}.
        body: what a request says beside the model and the message.
    """

    name: str
    price_per_million: tuple[float, float] | None
    endpoint: Endpoint
    template: str
    body: dict[str, Any]

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """The verdicts, in order. Raises TbpoError if the server does not answer, or refuses every request."""
        both = [(one.prompt, one.completion_a, one.completion_b) for one in comparisons]
        asked = [request for prompt, a, b in both if a != b for request in ((prompt, a, b), (prompt, b, a))]
        replies: dict[int, Reply] = {}
        with console.progress(f"asking {self.name}", len(asked), every=max(1, len(asked) // 10)) as update:
            for place, reply in self.endpoint.ask([self._body(*request) for request in asked]):
                replies[place] = reply
                update(len(replies), "")
        if asked and all(reply.refused for reply in replies.values()):
            raise TbpoError(
                replies[0].refused, self.endpoint.url, "an answer", "change eval.judge.body or the template"
            )
        judged = (_verdict(replies[place], replies[place + 1]) for place in range(0, len(asked), 2))
        return [next(judged) if a != b else Verdict(0.5, "the completions are the same") for _, a, b in both]

    def _body(self, prompt: Messages, a: str, b: str) -> dict[str, Any]:
        turns = [f"{message['role']}: {message['content']}" for message in prompt]
        texts = {"prompt": "\n\n".join(turns) if len(turns) > 1 else prompt[0]["content"], "a": a, "b": b}
        content = re.sub(r"\{(prompt|a|b)\}", lambda place: texts[place[1]], self.template)
        return {"model": self.name, "messages": [{"role": "user", "content": content}], **self.body}


def _verdict(forward: Reply, backward: Reply) -> Verdict:
    """Of the answers to (a, b) and to (b, a)."""
    value, reverse = _value(forward.text), _value(backward.text)
    reason = f"{forward.refused or forward.text}\n\nThe other way round: {backward.refused or backward.text}"
    tokens = (forward.prompt_tokens + backward.prompt_tokens, forward.completion_tokens + backward.completion_tokens)
    if value is None or reverse is None:
        return Verdict(None, f"no verdict can be read: {reason}", None, None, *tokens)
    consistent = value == 1 - reverse
    return Verdict(value if consistent else 0.5, reason, None, consistent, *tokens)


def _value(answer: str) -> float | None:
    """1 if the completion shown first is better, 0 if the other one is, 0.5 if none, None if it does not say."""
    labels = VERDICT.findall(answer) or LAST_LINE.findall(answer)
    return {"A": 1.0, "B": 0.0}.get(labels[-1].upper(), 0.5) if labels else None


def language_judge_of(settings: Any, cache: Path | None = None) -> LanguageJudge:
    """A judge from [eval.judge]. Raises TbpoError if its template cannot be read, or has not all the places."""
    template = TEMPLATE
    if settings.template is not None:
        try:
            template = Path(settings.template).read_text(encoding="utf-8")
            if missing := [name for name in ("{prompt}", "{a}", "{b}") if name not in template]:
                raise ValueError(f"it has no place {' or '.join(missing)}")
        except (OSError, ValueError) as error:
            expected = "a text file with {prompt}, {a} and {b} that asks for [[A]], [[B]] or [[C]]"
            raise TbpoError(f"the judge's template cannot be used: {error}", settings.template, expected) from None
    endpoint = Endpoint(settings.endpoint, settings.concurrency, settings.timeout, cache)
    return LanguageJudge(settings.model, settings.price_per_million, endpoint, template, settings.body)


Judge = ScoreJudge | LanguageJudge
# key of [eval]: the judge that its value makes, with a file that keeps the answers of a language model
JUDGES: dict[str, Callable[[Any, Path | None], Judge]] = {
    "scorer": scorer_of,
    "reward_model": reward_model_of,
    "judge": language_judge_of,
}


def judges_of(recipe: Recipe, cache: Path | None = None) -> list[Judge]:
    """Every judge that [eval] names."""
    return [make(given, cache) for key, make in JUDGES.items() if (given := getattr(recipe.eval, key)) is not None]
