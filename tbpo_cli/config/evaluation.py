"""The tables of a recipe that use a policy: [sample], [eval] and [push].

The text under a field says what its key means; docs/recipe.md is made of these texts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tbpo_cli.config.judging import Judge
from tbpo_cli.config.validate import table
from tbpo_cli.config.values import Address, Count, HubId, NotNegative, Repository


@table
class Sample:
    """[sample] Completions. temperature and top_p are those of the paper's win rates."""

    prompts: str = "eval"
    """A file of prompts, such as AlpacaEval's or Arena-Hard's, or "eval": the held-out prompts."""
    max_prompts: Count | None = None
    """How many prompts are answered, from the first one on. Default: all."""
    num_samples: Count = 1
    """Completions of each prompt by each model."""
    adapter: str | None = None
    """An adapter in place of the run's policy: a folder or "user/repo@revision"."""
    models: Annotated[tuple[Literal["policy", "reference"], ...], Field(min_length=1)] = (
        "policy",
        "reference",
    )
    """The models that answer."""
    batch_size: Count = 32
    """Completions at a time. It changes the speed, and logits by rounding alone."""
    temperature: NotNegative = 0.7
    """The temperature of sampling; 0 always takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Only the likeliest tokens that together have this probability are drawn."""
    max_new_tokens: Count = 512
    """The most tokens of a completion."""
    endpoint: Address | None = None
    """A server with OpenAI's API that answers for the policy; the reference is run here."""
    endpoint_model: str | None = None
    """The policy's name on that server; with `endpoint_adapter`, the base's."""
    endpoint_adapter: str | None = None
    """The folder of `adapter` as a vLLM server sees it, which then loads it while it runs."""

    def __post_init__(self) -> None:
        if (self.endpoint is None) != (self.endpoint_model is None):
            raise ValueError("endpoint and endpoint_model must be given together")
        if self.endpoint_adapter is not None and not (self.endpoint and self.adapter):
            raise ValueError("endpoint_adapter needs endpoint and adapter")


@table
class Eval:
    """[eval] What `tbpo eval` measures beside the metrics of the held-out pairs."""

    against: tuple[str, ...] = ()
    """Run directories, adapters or models that the same report compares, by tests with Holm's
    correction. Runs beside each other share their prepared pairs."""
    opponents: tuple[Literal["reference", "chosen"], ...] = ("reference",)
    """Whom the win rate is measured against, beside the models of `against`."""
    answers: tuple[str, ...] = ()
    """Files of answers to the same prompts, such as AlpacaEval's, as further opponents."""
    diversity_prompts: Annotated[int, Field(ge=0)] = 100
    """Prompts of the diversity metrics, 5 samples each; 0 leaves them out."""
    judge: Judge | None = None
    """A table with the keys of [judge], in its place for `tbpo eval` alone."""
    thinking: tuple[str, str] = ("<think>", "</think>")
    """The marks around thinking, which no judge is shown; ["", ""] shows everything."""
    suites: tuple[str, ...] = ()
    """"open-llm-v1", "ifeval", "gsm8k-chat", other lm-eval tasks, or paths of their YAML files."""
    gate: str = ""
    """A condition such as "win_rate > 0.5"; the exit code says whether it holds."""


@table
class Push:
    """[push] Where the adapter (or the merged model) is published."""

    repo: Repository | None = None
    """The repository, "user/name"."""
    private: bool = False
    """Whether a new repository is private."""
    merge: bool = False
    """Whether the base with the adapter's weights added is published, instead of the adapter."""
    base_model: HubId | None = None
    """Where a base that is a folder here is published."""
    license: str | None = None
    """The licence on the model card. Default: that of the base's card."""
    card: str | None = None
    """A Jinja file that replaces the text of the model card."""
