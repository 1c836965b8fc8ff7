"""[align.loss]: from a table of the recipe to the loss's dataclass of `core`, and back.

`core` is imported inside the functions: it loads torch, which the other tables do not need.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from tbpo_cli.config.validate import Hint, did_you_mean, fault, unknown_key, validate
from tbpo_cli.errors import TbpoError

if TYPE_CHECKING:
    from tbpo_cli.core.losses import Loss

Keys = tuple[str, ...]
DEFAULT_GENERATOR = "sba"
# How alike a name must be to be suggested: a loss that is only somewhat alike is another method.
ALIKE = 0.8


def complete_loss(
    given: Any, path: str, hint: Hint = did_you_mean
) -> tuple[dict[str, Any], list[TbpoError]]:
    """Checks [align.loss] against the fields of the named loss and generator.

    Args:
        given: the value of `align.loss` in the recipe: a table, or the loss's name alone.
        path: of the recipe, for messages.
        hint: what to write in place of an unknown key.

    Returns:
        The table with every default, and its faults. One of the two is empty.
    """
    from tbpo_cli.core.generators import GENERATORS
    from tbpo_cli.core.losses import LOSSES

    keys = ("align", "loss")
    if not isinstance(given, dict | str):
        expected = 'name = "…" and that loss\'s own keys'
        return {}, [fault("align.loss is not a table", path, keys, expected)]
    given = {"name": "tbpo_a", **given} if isinstance(given, dict) else {"name": given}
    named = LOSSES.get(str(given["name"]))
    takes_generator = named is None or "generator" in {f.name for f in dataclasses.fields(named)}
    # Where the loss has no generator, the key stays in `given` and is reported as unknown.
    generator_table = given.pop("generator", None) if takes_generator else None
    loss, faults = _build(LOSSES, given, path, keys, hint)
    if generator_table is not None:
        if isinstance(generator_table, dict):
            generator_table = {"name": DEFAULT_GENERATOR, **generator_table}
        generator_keys = (*keys, "generator")
        generator, generator_faults = _build(
            GENERATORS, generator_table, path, generator_keys, hint
        )
        faults += generator_faults
    if faults:
        return {}, faults
    if generator_table is not None:
        loss = dataclasses.replace(loss, generator=generator)
    return loss_table(loss), []


def _build(
    classes: dict[str, type], given: Any, path: str, keys: Keys, hint: Hint
) -> tuple[Any, list[TbpoError]]:
    """An instance of the class that `given` names, with its other keys as fields.

    Args:
        classes: by name.
        given: a table with the key `name`, or the name alone.
    """
    options = dict(given) if isinstance(given, dict) else {"name": given}
    name = options.pop("name", None)
    if not (isinstance(name, str) and name in classes):
        what = f"{'.'.join(keys)}.name = {name!r} is unknown"
        near, why = instead_of(str(name), list(classes))
        fix = why or (f'name = "{near}"' if near else "")
        return None, [fault(what, path, (*keys, "name"), f"one of {', '.join(classes)}", fix)]
    names = ["name", *(each.name for each in dataclasses.fields(classes[name]))]
    unknown = [key for key in options if key not in names]
    faults = []
    for key in unknown:
        owner = _owner(key, keys, name, classes)
        found = unknown_key((*keys, key), names, path, options.pop(key), hint)
        faults.append(dataclasses.replace(found, fix=owner or found.fix))
    loss, other_faults = validate(classes[name], options, path, keys)
    return loss, faults + other_faults


def instead_of(name: str, names: list[str]) -> tuple[str, str]:
    """What stands for the name of a loss or generator that is not here.

    Args:
        name: as it was given.
        names: of those that can be taken.

    Returns:
        The name that was meant, or "", and why there is no such method, or "".
    """
    from tbpo_cli.config.keys import nearest
    from tbpo_cli.config.other_tools import LOSS_NAMES, NOT_OFFERED

    small = name.lower().replace("-", "_")
    if small in NOT_OFFERED:
        return "", NOT_OFFERED[small]
    near = LOSS_NAMES.get(small, "") or nearest(small, names, ALIKE)
    return (near if near in names else ""), ""


def _owner(key: str, keys: Keys, name: str, classes: dict[str, type]) -> str:
    """Which loss or generator has a key that the one of that name has not; "" if none has."""
    from tbpo_cli.core.generators import GENERATORS
    from tbpo_cli.core.losses import LOSSES

    own = _fields(classes[name])
    if "generator" in own and any(key in _fields(cls) for cls in GENERATORS.values()):
        return f"it is a key of the generator: {'.'.join(keys)}.generator.{key}"
    if (
        classes is not LOSSES
        and any(key in _fields(cls) for cls in LOSSES.values())
        and (not any(key in _fields(cls) for cls in classes.values()))
    ):
        return f"it is a key of the loss: {'.'.join(keys[:-1])}.{key}"
    owners = [other for other, cls in classes.items() if key in _fields(cls)]
    return f"it is a key of {' and '.join(owners)}, not of {name}" if owners else ""


def _fields(cls: type) -> set[str]:
    return {each.name for each in dataclasses.fields(cls)}


def loss_of_table(table: Any) -> Loss:
    """The loss that a completed [align.loss] table describes; a loss is returned as it is."""
    from tbpo_cli.core.generators import build_generator
    from tbpo_cli.core.losses import build_loss

    if not isinstance(table, dict):
        loss: Loss = table
        return loss
    fields = dict(table)
    if isinstance(fields.get("generator"), dict):
        fields["generator"] = build_generator(**fields["generator"])
    return build_loss(**fields)


def loss_table(loss: Loss) -> dict[str, Any]:
    """The [align.loss] table of a loss, with every field."""
    from tbpo_cli.core.generators import GENERATORS
    from tbpo_cli.core.losses import name_of

    table = {"name": name_of(loss), **dataclasses.asdict(loss)}
    if "generator" in table:
        generator = vars(loss)["generator"]
        names = {cls: name for name, cls in GENERATORS.items()}
        table["generator"] = {"name": names[type(generator)], **table["generator"]}
    return table
