"""The tables of a recipe that make a policy: [run], [model], [data], [sft] and [align].

The text under a field says what its key means; docs/recipe.md is made of these texts.
"""

from __future__ import annotations

from dataclasses import field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, PlainSerializer, PlainValidator

from tbpo_cli.config.loss import loss_of_table, loss_table
from tbpo_cli.config.validate import table
from tbpo_cli.config.values import Count, Fraction, Name, NotNegative, Positive

if TYPE_CHECKING:
    from tbpo_cli.core.losses import Loss
else:
    Loss = Any  # for pydantic, which reads the annotations; the class itself would load torch


@table
class Run:
    """[run] The run's name, folder and seed."""

    name: Name
    """The run's name. Default: the name of the recipe's file."""
    dir: str = "runs"
    """The folder of all runs, relative to the folder that the command is started in."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed of everything that is random: the order of the pairs, dropout, samples."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Programs that show the metrics of a training while it runs."""


@table
class Lora:
    """[model.lora] The adapter that is trained. Without this table, all weights are trained."""

    r: Count = 32
    """The rank of the adapter's matrices."""
    alpha: Positive = 64.0
    """The adapter's output is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of the adapter's inputs that a training step sets to zero."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """The layers that get an adapter: their names, or "all-linear": all linear layers of the
    language part but its output head, routers, and experts that are kept in one tensor."""


@table
class Model:
    """[model] The base that is aligned, and how it is loaded."""

    base: str
    """A folder with config, tokenizer and safetensors, or the id of a Hub repository."""
    revision: str | None = None
    """The branch, tag or commit of a Hub repository. Default: its main branch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The type of the frozen weights. "auto": bfloat16 on a GPU that has it, else float32,
    whose matrix products a GPU computes in TF32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The implementation of attention."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template."""
    trust_remote_code: bool = False
    """Whether code from the model's repository may run."""
    initial_weights: Literal["pretrained", "random"] = "pretrained"
    """"random" starts from new weights of the base's shape."""
    quantization: Literal["nf4"] | None = None
    """"nf4" keeps the frozen base in 4 bits (QLoRA); it needs a GPU and [model.lora]."""
    adapter: str | None = None
    """A LoRA adapter to start from, and the reference: a folder or "user/repo@revision"."""
    lora: Lora | None = None
    """The adapter that is trained."""

    def __post_init__(self) -> None:
        if self.adapter is not None and self.lora is None:
            raise ValueError("adapter needs a table [model.lora], since it is trained further")
        if self.quantization is not None and self.lora is None:
            raise ValueError("quantization needs a table [model.lora]: 4-bit weights stay frozen")
        if self.quantization is not None and self.initial_weights == "random":
            raise ValueError("quantization needs pretrained weights")
        if self.revision is not None and Path(self.base).is_absolute():
            raise ValueError("revision is of a Hub repository, and base is a folder")


@table
class Source:
    """[[data.train]] One place that rows are read from. A text stands for a table with `path`."""

    path: str
    """A file (.jsonl, .json, .parquet, .csv), a folder, or the id of a Hub data set."""
    config: str | None = None
    """The configuration of a Hub data set."""
    split: str | None = None
    """The split of a Hub data set. Default: data.train_split or data.eval_split."""
    revision: str | None = None
    """The branch, tag or commit of a Hub data set."""
    weight: Positive = 1.0
    """How often an epoch shows each pair; 0.5 takes a half of the pairs, always the same."""

    @property
    def is_file(self) -> bool:
        """Whether it is a local file: it has no splits, as Hub data sets and saved folders have."""
        return Path(self.path).is_absolute() and bool(Path(self.path).suffix)

    def __post_init__(self) -> None:
        is_local = Path(self.path).is_absolute()
        for key in ("config", "revision"):
            if is_local and getattr(self, key) is not None:
                raise ValueError(f"{key} is of a Hub data set, and path is local")
        if self.is_file and self.split is not None:
            raise ValueError("split is of a data set, and path is a file")


Sources = Annotated[tuple[Source, ...], Field(min_length=1)]  # read one after the other


@table
class Data:
    """[data] The rows, and which of them are used."""

    train: Sources
    """The rows to train on: a path, a table, or a list of both."""
    eval: Sources | None = None
    """The rows to measure on. Default: `eval_fraction` of the prompts of `train`."""
    train_split: str = "train"
    """The split of a Hub data set in `train`."""
    eval_split: str = "test"
    """The split of a Hub data set in `eval`."""
    format: str = "auto"
    """The format of the rows of train and eval. "auto": recognised by their columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column = the name that it has in the rows."""
    max_length: Count = 2048
    """The most tokens of a prompt and its longer response together."""
    overlong: Literal["drop", "truncate"] = "drop"
    """What happens to longer pairs: they are left out, or their responses are cut at the end."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The share of the prompts that is held out; at least 20 prompts, or 5 % where that is fewer.
    Default: 0.05, unless `eval` is given."""
    max_eval_overlap: Fraction | None = None
    """Held-out prompts are left out if this share of their 8-grams is in training pairs. Default:
    none is left out."""
    dedup: bool = True
    """Whether a comparison that came before is left out."""
    max_reject_fraction: Fraction = 0.1
    """The share of unusable rows above which `tbpo prepare` stops."""
    template_date: str = "2026-01-01"
    """The date, YYYY-MM-DD, for chat templates that print today's date."""
    workers: Count = 1
    """Processes that tokenize. With 1, the tokenizer's own threads use the other cores."""

    def __post_init__(self) -> None:
        try:
            date.fromisoformat(self.template_date)
        except ValueError:
            raise ValueError("template_date must be a day, YYYY-MM-DD") from None
        if self.eval is not None and self.eval_fraction is not None:
            raise ValueError("eval_fraction must be left out where eval is given")
        for key, sources, usual in (("train", self.train, "train"), ("eval", self.eval, "test")):
            is_read = any(not each.is_file and each.split is None for each in sources or ())
            if getattr(self, f"{key}_split") != usual and not is_read:
                raise ValueError(f"{key}_split is not read: data.{key} names no data set for it")
        if self.eval is None and self.eval_fraction is None:
            object.__setattr__(self, "eval_fraction", 0.05)


@table
class Training:
    """Keys that [sft] and [align] share."""

    max_tokens_per_device: Count | Literal["auto"] = "auto"
    """Tokens of a micro-batch on a device. It changes speed, and the result by rounding alone."""
    layout: Literal["auto", "shared_prompt", "packed", "padded"] = "auto"
    """How pairs are put into rows. It changes the speed, and the result by rounding alone."""
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"
    """Whether each process holds all weights ("ddp") or a part of them ("fsdp")."""
    shard_over: Literal["auto", "machine", "all"] = "auto"
    """Of several machines with sharded weights: whether the processes of each machine hold a copy
    of them, or all processes together hold one. "auto": each machine, if that leaves half of a
    device's memory free."""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """How often the training reads all pairs. Default: 1, unless max_steps is given."""
    max_steps: Count | None = None
    """The number of optimizer steps, instead of epochs."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """The optimizer."""
    learning_rate: Positive = cast(float, None)  # `Recipe` fills it in: it knows of an adapter
    """The highest rate. Default: 1e-5 with [model.lora], else 1e-6; for [sft] 2e-4, else 2e-5."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup: Fraction = 0.05
    """The share of the steps in which the rate rises from 0."""
    weight_decay: NotNegative = 0.0
    """The share of each weight that a step takes away, times the rate (adamw); with rmsprop, this
    times the weight is added to its gradient."""
    max_grad_norm: Positive = 10.0
    """A gradient with a larger norm is scaled down to it."""
    checkpoint_every: Count = 100
    """Steps between two checkpoints."""
    eval_every: Count = 100
    """Steps between two measurements on the held-out pairs."""
    eval_pairs: Count | Literal["auto", "all"] = "auto"
    """Held-out pairs of a measurement between the first and the last, which read all. "auto": as
    many as take about 5 % of the time, a tenth of the pairs that are trained on in between, but
    no fewer than 64 (or all, if there are fewer)."""
    log_every: Count = 10
    """Steps between two lines of metrics that have KL and entropy."""
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Whether activations are computed again in the backward pass: less memory, more time. "auto":
    only where the longest pair does not fit otherwise."""

    def __post_init__(self) -> None:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs must be left out where max_steps is given")
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "epochs", 1.0)


@table
class Sft(Training):
    """[sft] Supervised fine-tuning before the alignment. Without this table there is none."""

    train: Sources | None = None
    """Rows of demonstrations. Default: the chosen responses of data.train."""
    batch_examples: Count = 32
    """Examples of an optimizer step, over all processes."""

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
    """Pairs of an optimizer step, over all processes."""
    reverse: bool = False
    """Whether chosen and rejected change places, for the negative helper of tis_dpo."""
    start: str | None = None
    """An adapter, or without [model.lora] a model, that the policy starts from in place of the
    reference: a folder, or for an adapter "user/repo@revision". Default: the reference."""
    loss: Annotated[Loss, PlainValidator(loss_of_table), PlainSerializer(loss_table)] = field(
        default_factory=lambda: loss_of_table({"name": "tbpo_a"})
    )
    """The loss: its name and its own keys, listed in docs/losses.md."""

    split: ClassVar[str] = "train"

    @property
    def loss_name(self) -> str:
        """The loss's name in the table of losses."""
        from tbpo_cli.core.losses import name_of

        return name_of(self.loss)

    @property
    def batch_size(self) -> int:
        return self.batch_pairs
