"""A recipe: frozen dataclasses whose fields are the TOML keys, loaded with all faults reported together."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from tbpo_cli.errors import TbpoError, gather

STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
table = validated(frozen=True, config=STRICT)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Source = str | tuple[str, ...]  # file, folder or Hub data set; several are read one after the other


@table
class Run:
    """[run] Where a run lives. `dir` is relative to the folder the command is started in."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    dir: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


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
    lora: Lora | None = None


@table
class Data:
    """[data] Rows, and which of them are used."""

    train: Source
    eval: Source | None = None  # absent: `eval_fraction` of the training rows
    train_split: str = "train"
    eval_split: str = "test"
    format: Literal["auto", "prompt", "messages", "hh", "sft_prompt", "sft_messages"] = "auto"
    columns: dict[str, str] = field(default_factory=dict)  # our name = the row's name
    max_length: Count = 2048  # tokens of prompt + the longer response
    overlong: Literal["drop", "truncate"] = "drop"
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    dedup: bool = True
    max_reject_fraction: Fraction = 0.1


@table
class Training:
    """Keys that [sft] and [align] share."""

    max_tokens_per_device: Count = 16384  # padded tokens of a micro-batch; never changes the result
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

    train: Source | None = None
    batch_examples: Count = 32
    learning_rate: Positive = 2e-5

    @property
    def batch_size(self) -> int:
        return self.batch_examples


@table
class Align(Training):
    """[align] Preference optimisation. `loss` is the checked and completed [align.loss] table."""

    batch_pairs: Count = 32
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

    def settings(self) -> dict[str, Any]:
        """The recipe as {"table.key": value}, every default included, keys without a value left out."""
        return _flatten(json.loads(json.dumps(dataclasses.asdict(self))))

    def to_toml(self) -> str:
        """The resolved recipe as TOML; loading it gives this recipe again."""
        import tomli_w

        return tomli_w.dumps(_without_none(json.loads(json.dumps(dataclasses.asdict(self)))))


FILE_SUFFIXES = {".jsonl", ".json", ".gz", ".parquet", ".csv", ".arrow", ".jinja", ".txt"}
PATH_KEYS = ("model.base", "model.chat_template", "data.train", "data.eval", "sft.train")


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
        align["loss"], loss_faults = _complete_loss(align.get("loss", {}), str(path))
        faults += loss_faults
    recipe, recipe_faults = _validate(Recipe, raw, str(path), ())
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
    """Makes the local paths among PATH_KEYS absolute, seen from `folder`. A Hub id stays as it is."""

    def resolve(source: Any) -> Any:
        if isinstance(source, list):
            return [resolve(one) for one in source]
        if not isinstance(source, str) or not source:
            return source
        path = folder / Path(source).expanduser()
        return str(path.resolve()) if path.exists() or is_local(source) else source

    for key in PATH_KEYS:
        name, _, leaf = key.partition(".")
        if isinstance(raw.get(name), dict) and leaf in raw[name]:
            raw[name][leaf] = resolve(raw[name][leaf])


def _complete_loss(given: Any, path: str) -> tuple[dict[str, Any], list[TbpoError]]:
    """[align.loss] checked against the fields of the named loss and generator, with their defaults filled in."""
    from tbpo_cli.core.generators import GENERATORS
    from tbpo_cli.core.losses import LOSSES

    where = ("align", "loss")
    if not isinstance(given, dict):
        return {}, [_error("align.loss is no table", path, where, 'name = "…" and that loss\'s own keys')]
    given = {"name": "tbpo_a", **given}
    generator_given = given.pop("generator", None)
    loss, faults = _named(LOSSES, given, path, where)
    generator = None
    if generator_given is not None:
        owner = LOSSES.get(given["name"]) if isinstance(given["name"], str) else None
        if owner is not None and "generator" not in {f.name for f in fields(owner)}:
            faults.append(_unknown_key((*where, "generator"), generator_given, owner, path))
        else:
            generator, generator_faults = _named(GENERATORS, generator_given, path, (*where, "generator"))
            faults += generator_faults
    if faults:
        return {}, faults
    loss = dataclasses.replace(loss, generator=generator) if generator is not None else loss
    completed = {"name": given["name"], **dataclasses.asdict(loss)}
    if "generator" in completed:
        names = {cls: name for name, cls in GENERATORS.items()}
        completed["generator"] = {"name": names[type(loss.generator)], **completed["generator"]}
    return completed, []


def _named(classes: dict[str, type], given: Any, path: str, where: tuple[str, ...]) -> tuple[Any, list[TbpoError]]:
    """An instance of the class that given["name"] names in a table, from the other fields."""
    name = given.get("name") if isinstance(given, dict) else given
    if not isinstance(name, str) or name not in classes:
        near = difflib.get_close_matches(str(name), classes, n=1)
        fix = f'name = "{near[0]}"' if near else ""
        key = (*where, "name")
        return None, [_error(f"{'.'.join(key)} = {name!r} is unknown", path, key, f"one of {', '.join(classes)}", fix)]
    return _validate(classes[name], {k: v for k, v in given.items() if k != "name"}, path, where)


def _validate(cls: type, raw: Any, path: str, where: tuple[str, ...]) -> tuple[Any, list[TbpoError]]:
    """An instance of a dataclass from TOML values, or its faults. `core`'s plain dataclasses are checked alike."""
    checked = cls if hasattr(cls, "__pydantic_config__") else validated(cls, frozen=True, config=STRICT)
    try:
        # By way of JSON, where "strict" takes an array for a tuple and a table for a dataclass, and nothing else.
        value = TypeAdapter(checked).validate_json(json.dumps(raw, default=str))
        return (value if checked is cls else cls(**{f.name: getattr(value, f.name) for f in fields(value)})), []
    except ValidationError as error:
        faults: dict[tuple[str, ...], TbpoError] = {}
        for entry in error.errors():
            keys = tuple(str(part) for part in entry["loc"] if _is_key(part))
            faults.setdefault(keys, _fault(entry, (*where, *keys), cls, path))
        return None, list(faults.values())


def _is_key(part: Any) -> bool:
    """Whether a part of pydantic's location is a key of ours, not the name of one member of a union."""
    return isinstance(part, str) and part.isidentifier() and part not in {"str", "none"}


def _error(what: str, path: str, keys: tuple[str, ...], expected: str, fix: str = "") -> TbpoError:
    where = f"{path}, [{'.'.join(keys[:-1])}] {keys[-1]}" if len(keys) > 1 else f"{path}, [{keys[0]}]"
    return TbpoError(what, where, expected, fix or f"change it there, or give --set {'.'.join(keys)}=…")


def _fault(entry: Any, keys: tuple[str, ...], cls: type, path: str) -> TbpoError:
    """One of pydantic's errors in our words."""
    name, given = ".".join(keys), entry["input"]
    if entry["type"] == "unexpected_keyword_argument":
        owner: Any = cls
        for key in (str(part) for part in entry["loc"][:-1] if _is_key(part)):
            owner = _table_class(owner, key)
        return _unknown_key(keys, given, owner, path)
    if entry["type"] == "missing":
        fix = f"add {keys[-1]} = … under [{'.'.join(keys[:-1])}]" if len(keys) > 1 else f"add a table [{name}]"
        return _error(f"{name} is missing", path, keys, "a value: it has no default", fix)
    expected = entry["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if entry["type"] == "value_error":  # of a __post_init__, whose messages begin with the key
        keys = (*keys, expected.split()[0])
        return _error(f"{'.'.join(keys)} is not possible", path, keys, expected)
    if entry["type"] in {"dataclass_type", "dataclass_exact_type"}:
        expected = f"a table: [{name}]"
    options = str(entry.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ").split(", ")
    near = difflib.get_close_matches(str(given), options, n=1)
    fix = f'{keys[-1]} = "{near[0]}"' if near else ""
    return _error(f"{name} = {json.dumps(given, default=str)} is not possible", path, keys, expected, fix)


def _unknown_key(keys: tuple[str, ...], value: Any, owner: type, path: str) -> TbpoError:
    names = [f.name for f in fields(owner)]
    near = difflib.get_close_matches(keys[-1], names, n=1, cutoff=0.5)
    fix = f"did you mean {'.'.join((*keys[:-1], near[0]))}?" if near else "remove it"
    what = f"{'.'.join(keys)} is an unknown {'table' if isinstance(value, dict) else 'key'}"
    return _error(what, path, keys, f"one of {', '.join(names)}" if names else "no further keys", fix)


def _table_class(owner: type, key: str) -> type:
    """The dataclass of a nested table, which may be optional."""
    import typing

    hint = typing.get_type_hints(owner)[key]
    return next(t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t))


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _without_none(nested: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in nested.items()
        if value is not None
    }
