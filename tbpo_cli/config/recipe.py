"""A recipe: frozen dataclasses whose fields are the TOML keys, loaded with all faults reported together."""

from __future__ import annotations

from dataclasses import field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, PlainSerializer, PlainValidator, TypeAdapter

from tbpo_cli.config.loss import complete_loss, loss_of_table, loss_table, name_of
from tbpo_cli.config.toml import apply_overrides, read_toml, resolve_paths
from tbpo_cli.config.validate import table, validate
from tbpo_cli.errors import gather
from tbpo_cli.evaluation.measures import JUDGES, check_gate

if TYPE_CHECKING:
    from tbpo_cli.core.losses import Loss
else:
    Loss = Any  # for pydantic, which reads the annotations; the class itself would load torch

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
HubId = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+(@.+)?$")]  # user/repo[@revision]
Address = Annotated[str, Field(pattern=r"^https?://\S+$")]


@table
class Run:
    """[run] Where a run lives. `dir` is relative to the folder the command is started in."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    dir: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()


@table
class Lora:
    """[model.lora] The adapter that is trained; without this table, all weights are."""

    r: Count = 32
    alpha: Positive = 64.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: str | tuple[str, ...] = "all-linear"


@table
class Model:
    """[model] The base: a folder or a Hub repository with config, tokenizer and safetensors."""

    base: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    chat_template: str | None = None  # a Jinja file that replaces the tokenizer's own template
    trust_remote_code: bool = False
    initial_weights: Literal["pretrained", "random"] = "pretrained"
    quantization: Literal["nf4"] | None = None  # of the frozen base's weights, in 4 bits: QLoRA
    adapter: str | None = (
        None  # a LoRA adapter to start from, and the reference: a folder or "user/repo[@revision]"
    )
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if self.adapter is not None and self.lora is None:
            raise ValueError("adapter is to be trained further, under [model.lora]")
        if self.quantization is not None and (
            self.lora is None or self.initial_weights == "random"
        ):
            raise ValueError("quantization is for a pretrained base under [model.lora]")


@table
class Source:
    """An entry of data.train, data.eval or sft.train: a path, or a table, as in [[data.train]]. Several are a list."""

    path: str  # a file, a folder, or the id of a Hub data set
    config: str | None = None
    split: str | None = None  # absent: data.train_split or data.eval_split
    revision: str | None = None
    weight: Positive = (
        1.0  # how often an epoch shows each pair; 0.5: a half of the pairs, always the same
    )


Sources = Annotated[tuple[Source, ...], Field(min_length=1)]  # read one after the other


@table
class Data:
    """[data] Rows, and which of them are used."""

    train: Sources
    eval: Sources | None = None  # absent: `eval_fraction` of the prompts of `train`
    train_split: str = "train"
    eval_split: str = "test"
    format: str = "auto"  # of the rows of train and eval; those of sft.train are recognised
    columns: dict[str, str] = field(default_factory=dict)  # our name = the row's name
    max_length: Count = 2048  # tokens of prompt + the longer response
    overlong: Literal["drop", "truncate"] = "drop"
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] | None = (
        None  # 0.05, unless `eval` names rows
    )
    dedup: bool = True
    max_reject_fraction: Fraction = 0.1
    template_date: str = "2026-01-01"  # what chat templates that print today's date print
    workers: Count = 1  # processes; with 1, the tokenizer's own threads use the other cores

    def __post_init__(self) -> None:
        try:
            date.fromisoformat(self.template_date)
        except ValueError:
            raise ValueError("template_date must be a day, YYYY-MM-DD") from None
        if self.eval is not None and self.eval_fraction is not None:
            raise ValueError("eval_fraction must be left out where eval is given")
        if self.eval is None and self.eval_fraction is None:
            object.__setattr__(self, "eval_fraction", 0.05)


@table
class Training:
    """Keys that [sft] and [align] share."""

    max_tokens_per_device: Count | Literal["auto"] = (
        "auto"  # of a micro-batch; never changes the result
    )
    layout: Literal["auto", "shared_prompt", "packed", "padded"] = (
        "auto"  # of rows; never changes the result
    )
    sharding: Literal["auto", "ddp", "fsdp"] = (
        "auto"  # of weights, over processes; never changes the result
    )
    epochs: Positive | None = None
    max_steps: Count | None = None
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    learning_rate: Positive = 5e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.05  # share of the steps
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 10.0
    checkpoint_every: Count = 100
    eval_every: Count = 100
    log_every: Count = 10
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs must be left out where max_steps is given")
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "epochs", 1.0)


@table
class Sft(Training):
    """[sft] Supervised fine-tuning, on the chosen responses or on the rows of `train`."""

    train: Sources | None = None
    batch_examples: Count = 32
    learning_rate: Positive = 2e-5
    reverse: ClassVar[bool] = False

    @property
    def batch_size(self) -> int:
        return self.batch_examples

    @property
    def split(self) -> str:
        """The prepared pairs that are trained on, by the name of their folder."""
        return "train" if self.train is None else "sft"


@table
class Align(Training):
    """[align] Preference optimisation. `loss` may be given as a table or as a loss of `core`."""

    batch_pairs: Count = 32
    reverse: bool = False  # chosen and rejected change places: for the negative helper of tis_dpo
    loss: Annotated[Loss, PlainValidator(loss_of_table), PlainSerializer(loss_table)] = field(
        default_factory=lambda: loss_of_table({"name": "tbpo_a"})
    )
    split: ClassVar[str] = "train"

    @property
    def loss_name(self) -> str:
        return name_of(self.loss)

    @property
    def batch_size(self) -> int:
        return self.batch_pairs


@table
class Sample:
    """[sample] Completions; temperature and top_p default to the paper's setting for win rates."""

    prompts: str = (
        "eval"  # the held-out pairs' prompts, or a .jsonl (prompt: text or messages) or .txt file
    )
    max_prompts: Count | None = None
    num_samples: Count = 1  # completions a prompt and model
    adapter: str | None = None  # in place of the run's policy: a folder or "user/repo[@revision]"
    models: Annotated[tuple[Literal["policy", "reference"], ...], Field(min_length=1)] = (
        "policy",
        "reference",
    )
    batch_size: Count = 32  # completions at a time; never changes the result
    temperature: NotNegative = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_new_tokens: Count = 512
    endpoint: Address | None = (
        None  # a server with OpenAI's API that serves the policy; the reference is run here
    )
    endpoint_model: str | None = None  # the policy's name there

    def __post_init__(self) -> None:
        if (self.endpoint is None) != (self.endpoint_model is None):
            raise ValueError("endpoint and endpoint_model must be given together")


@table
class Judge:
    """[eval.judge] A language model that compares two completions, on a server with OpenAI's API."""

    endpoint: Address
    model: str
    template: str | None = (
        None  # a text file with {prompt}, {a} and {b} that asks for [[A]], [[B]] or [[C]]
    )
    body: dict[str, Any] = field(
        default_factory=lambda: {"temperature": 0.0, "max_tokens": 1024}
    )  # of each request
    concurrency: Count = 8  # requests at a time
    timeout: Positive = 120.0  # seconds
    price_per_million: tuple[NotNegative, NotNegative] | None = (
        None  # tokens of prompts, of completions
    )


@table
class Eval:
    """[eval] What `tbpo eval` measures beside the held-out preference metrics."""

    against: tuple[str, ...] = ()  # run directories, adapters or models, for the same report
    opponents: tuple[Literal["reference", "chosen"], ...] = (
        "reference",
    )  # of the win rate, beside those of `against`
    diversity_prompts: Annotated[int, Field(ge=0)] = 100  # 5 samples each; 0 leaves diversity out
    scorer: str | None = (
        None  # "python:FILE:NAME", a function of the prompt's and the completion's text
    )
    reward_model: str | None = None  # a sequence classification model: a folder or a Hub repository
    judge: Judge | None = None
    suites: tuple[
        str, ...
    ] = ()  # "open-llm-v1", names of lm-eval tasks, or paths of task YAML files
    gate: str = ""  # e.g. "win_rate > 0.5": the exit code says whether it holds

    @property
    def judged(self) -> bool:
        """Whether something says which of two completions is better."""
        return any(getattr(self, key) is not None for key in JUDGES)

    def __post_init__(self) -> None:
        if self.gate:
            check_gate(self)


@table
class Push:
    """[push] Where the adapter (or the merged model) is published."""

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    private: bool = False
    merge: bool = False  # the base with the adapter's weights added, instead of the adapter
    base_model: HubId | None = None  # where a local base is published
    license: str | None = None  # absent: that of the base's card
    card: str | None = None  # a Jinja file that replaces the text of the model card


@table
class Recipe:
    """A whole recipe. `sft = None` means that there is no SFT stage."""

    run: Run
    model: Model
    data: Data
    sft: Sft | None = None
    align: Align = field(default_factory=Align)
    sample: Sample = field(default_factory=Sample)
    eval: Eval = field(default_factory=Eval)
    push: Push = field(default_factory=Push)

    def __post_init__(self) -> None:
        if self.eval.judged and "chosen" in self.eval.opponents and self.sample.prompts != "eval":
            raise ValueError(
                'eval.opponents cannot have "chosen" where sample.prompts is not "eval"'
            )
        for name, stage in (("sft", self.sft), ("align", self.align)):
            if (
                self.model.quantization is not None
                and stage is not None
                and stage.sharding == "fsdp"
            ):
                raise ValueError(
                    f"{name}.sharding cannot be fsdp where model.quantization is given"
                )

    @property
    def training_stages(self) -> tuple[str, ...]:
        """The names of the training stages that the recipe has, in order."""
        return ("align",) if self.sft is None else ("sft", "align")

    def settings(self) -> dict[str, Any]:
        """The recipe as {"table.key": value}, every default included, keys without a value left out."""
        return _flatten(_plain(self))

    def to_toml(self) -> str:
        """The resolved recipe as TOML; loading it gives this recipe again."""
        import tomli_w

        return tomli_w.dumps(_plain(self))


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads, completes and checks a recipe. Raises TbpoError with every fault that it has.

    Args:
        path: the TOML file; relative paths in it are relative to it.
        overrides: "table.key=value" each, TOML or else text; relative paths are seen from the current folder.
    """
    raw = read_toml(path)
    resolve_paths(raw, path.parent)
    faults = apply_overrides(raw, overrides)
    if isinstance(raw.setdefault("run", {}), dict):
        raw["run"].setdefault("name", path.stem)
    if isinstance(align := raw.setdefault("align", {}), dict):
        align["loss"], loss_faults = complete_loss(align.get("loss", {}), str(path))
        if loss_faults:
            del align["loss"]  # the other keys are checked all the same
        faults += loss_faults
    recipe, recipe_faults = validate(Recipe, raw, str(path), ())
    gather(faults + recipe_faults)
    return cast(Recipe, recipe)


def sources(path: Path, overrides: tuple[str, ...] = ()) -> dict[str, str]:
    """{"table.key": "file" or "--set"} of the keys of a recipe that do not have their default."""
    raw, overriding = read_toml(path), dict[str, Any]()
    resolve_paths(raw, path.parent)
    apply_overrides(overriding, overrides)
    return dict.fromkeys(_flatten(raw), "file") | dict.fromkeys(_flatten(overriding), "--set")


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Nested dicts and lists of what TOML has: keys without a value are left out."""
    return cast(
        dict[str, Any], TypeAdapter(Recipe).dump_python(recipe, mode="json", exclude_none=True)
    )


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"table.key": value}; the n-th table of a list is "table.key.n", from 1."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value, 1)}
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
