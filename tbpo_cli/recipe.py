"""A recipe: frozen dataclasses whose fields are the TOML keys, loaded with all faults reported together."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tbpo_cli.checks import complete_loss, table, validate
from tbpo_cli.errors import TbpoError, gather

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


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
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if self.quantization is not None and (self.lora is None or self.initial_weights == "random"):
            raise ValueError("quantization is for a pretrained base under [model.lora]")


@table
class Source:
    """An entry of data.train, data.eval or sft.train: a path, or a table, as in [[data.train]]. Several are a list."""

    path: str  # a file, a folder, or the id of a Hub data set
    config: str | None = None
    split: str | None = None  # absent: data.train_split or data.eval_split
    revision: str | None = None
    weight: Positive = 1.0  # how often an epoch shows each pair; 0.5: a half of the pairs, always the same


Sources = Annotated[tuple[Source, ...], Field(min_length=1)]  # read one after the other


@table
class Data:
    """[data] Rows, and which of them are used."""

    train: Sources
    eval: Sources | None = None  # absent: `eval_fraction` of the training rows
    train_split: str = "train"
    eval_split: str = "test"
    format: Literal["auto", "prompt", "messages", "hh", "sft_prompt", "sft_messages"] = "auto"
    columns: dict[str, str] = field(default_factory=dict)  # our name = the row's name
    max_length: Count = 2048  # tokens of prompt + the longer response
    overlong: Literal["drop", "truncate"] = "drop"
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    dedup: bool = True
    max_reject_fraction: Fraction = 0.1
    template_date: str = "2026-01-01"  # what chat templates that print today's date print
    workers: Count = 1  # processes; with 1, the tokenizer's own threads use the other cores

    def __post_init__(self) -> None:
        try:
            date.fromisoformat(self.template_date)
        except ValueError:
            raise ValueError("template_date must be a day, YYYY-MM-DD") from None


@table
class Training:
    """Keys that [sft] and [align] share."""

    max_tokens_per_device: Count | Literal["auto"] = "auto"  # of a micro-batch; never changes the result
    layout: Literal["auto", "shared_prompt", "packed", "padded"] = "auto"  # of rows; never changes the result
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"  # of weights, over processes; never changes the result
    epochs: Positive | None = None
    max_steps: Count | None = None
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    learning_rate: Positive = 5e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.05  # share of the steps
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 10.0
    checkpoint_every: Count = 100
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2  # the newest, and those before it in case it is damaged
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

    @property
    def batch_size(self) -> int:
        return self.batch_examples


@table
class Align(Training):
    """[align] Preference optimisation. `loss` is the checked and completed [align.loss] table."""

    batch_pairs: Count = 32
    reverse: bool = False  # chosen and rejected change places: for the negative helper of tis_dpo
    loss: dict[str, Any] = field(default_factory=lambda: {"name": "tbpo_a"})

    @property
    def batch_size(self) -> int:
        return self.batch_pairs


@table
class Sample:
    """[sample] Completions; the defaults are the paper's setting for win rates."""

    temperature: NotNegative = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_new_tokens: Count = 512


@table
class Eval:
    """[eval] What `tbpo eval` measures beside the held-out preference metrics."""

    suites: tuple[str, ...] = ()


@table
class Push:
    """[push] Where the adapter (or the merged model) is published."""

    repo: str | None = None
    private: bool = False
    merge: bool = False


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
        for name, stage in (("sft", self.sft), ("align", self.align)):
            if self.model.quantization is not None and stage is not None and stage.sharding == "fsdp":
                raise ValueError(f"{name}.sharding cannot be fsdp where model.quantization is given")

    def settings(self) -> dict[str, Any]:
        """The recipe as {"table.key": value}, every default included, keys without a value left out."""
        return _flatten(json.loads(json.dumps(dataclasses.asdict(self))))

    def to_toml(self) -> str:
        """The resolved recipe as TOML; loading it gives this recipe again."""
        import tomli_w

        return tomli_w.dumps(_without_none(json.loads(json.dumps(dataclasses.asdict(self)))))


FILE_SUFFIXES = {".jsonl", ".json", ".gz", ".parquet", ".csv", ".arrow", ".jinja", ".txt"}
SOURCE_KEYS = ("data.train", "data.eval", "sft.train")
PATH_KEYS = ("model.base", "model.chat_template", "align.loss.positive", "align.loss.negative", *SOURCE_KEYS)


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads, completes and checks a recipe.

    Relative paths in the file are relative to the file, those of `overrides` to the current folder.

    Args:
        path: the TOML file.
        overrides: "table.key=value" each; the value is TOML, or, if it is none, text.

    Raises:
        TbpoError: with every fault of the recipe.
    """
    raw = _read_toml(path)
    _resolve_paths(raw, path.parent)
    faults = _apply_overrides(raw, overrides)
    if isinstance(raw.setdefault("run", {}), dict):
        raw["run"].setdefault("name", path.stem)
    if isinstance(align := raw.setdefault("align", {}), dict):
        align["loss"], loss_faults = complete_loss(align.get("loss", {}), str(path))
        faults += loss_faults
    recipe, recipe_faults = validate(Recipe, raw, str(path), ())
    gather(faults + recipe_faults)
    return recipe


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        fix = f"recipes in that folder: {', '.join(near)}" if near else "give the path of a recipe, a TOML file"
        raise TbpoError("there is no such recipe", str(path), "a TOML file", fix) from None
    except IsADirectoryError:
        raise TbpoError("the recipe is a folder", str(path), "a TOML file", "give the file inside it") from None
    except UnicodeDecodeError as error:
        raise TbpoError(
            "the recipe is not UTF-8 text", f"{path}, byte {error.start}", "a TOML file", "save it as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise TbpoError(
            "the recipe is not valid TOML",
            f"{path}: {error}",
            "key = value lines under [table] headings",
            'mend that line; text needs quotes: key = "text"',
        ) from None
    except OSError as error:
        raise TbpoError(f"the recipe cannot be read: {error.strerror}", str(path), "a readable file") from None


def _apply_overrides(raw: dict[str, Any], overrides: tuple[str, ...]) -> list[TbpoError]:
    faults = []
    for override in overrides:
        key, equals, text = override.partition("=")
        names = key.strip().split(".")
        if not equals or len(names) < 2 or not all(names):
            faults.append(
                TbpoError("--set is not understood", f"--set {override}", "table.key=value", "e.g. --set run.seed=1")
            )
            continue
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        one: dict[str, Any] = {names[-1]: value}
        for name in reversed(names[:-1]):
            one = {name: one}
        _resolve_paths(one, Path.cwd())
        _merge(raw, one)
    return faults


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def is_local(source: str) -> bool:
    """Whether a source names a file or folder rather than a Hub repository ("user/name")."""
    return source.startswith((".", "/", "~")) or Path(source).suffix in FILE_SUFFIXES or source.count("/") > 1


def _resolve_paths(raw: dict[str, Any], folder: Path) -> None:
    """Makes the local paths among PATH_KEYS absolute, seen from `folder`, and each of SOURCE_KEYS a list of tables."""

    def resolve(source: Any) -> Any:
        if not isinstance(source, str) or not source:
            return source
        path = folder / Path(source).expanduser()
        return str(path.resolve()) if path.exists() or is_local(source) else source

    def as_table(source: Any) -> Any:
        source = {"path": source} if isinstance(source, str) else source
        return source | {"path": resolve(source["path"])} if isinstance(source, dict) and "path" in source else source

    for key in PATH_KEYS:
        *names, leaf = key.split(".")
        owner: Any = raw
        for name in names:
            owner = owner.get(name) if isinstance(owner, dict) else None
        if not isinstance(owner, dict) or leaf not in owner:
            continue
        if key not in SOURCE_KEYS:
            owner[leaf] = resolve(owner[leaf])
        elif isinstance(owner[leaf], str | dict | list):
            listed = owner[leaf] if isinstance(owner[leaf], list) else [owner[leaf]]
            owner[leaf] = [as_table(source) for source in listed]


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"table.key": value}; the n-th table of a list is "table.key.n", from 1."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value, 1)}
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _without_none(nested: Any) -> Any:
    if isinstance(nested, list):
        return [_without_none(item) for item in nested]
    if isinstance(nested, dict):
        return {key: _without_none(value) for key, value in nested.items() if value is not None}
    return nested
