"""The recipes that come with the package, for `tbpo init`."""

from __future__ import annotations

import shutil
from pathlib import Path

from tbpo_cli.errors import TbpoError

# In an installed package; in a checkout they lie beside it.
_PACKAGED = Path(__file__).parent.parent / "recipes"
FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent.parent / "recipes"


def descriptions() -> dict[str, str]:
    """{name: the recipe's first line} of the shipped recipes."""
    files = sorted(FOLDER.glob("*.toml"))
    return {
        path.stem: path.read_text(encoding="utf-8").partition("\n")[0].strip("#: ")
        for path in files
    }


def write(name: str, folder: Path) -> list[Path]:
    """Copies a recipe, and the folders that it names; returns what was written.

    A folder of another recipe's name may be there already, and is left as it is.

    Raises:
        TbpoError: if there is no such recipe, or something of its name is there already.
    """
    if name not in descriptions():
        names = f"one of {', '.join(descriptions())}"
        raise TbpoError(f"there is no recipe {name!r}", expected=names, fix="tbpo init lists them")
    recipe = FOLDER / f"{name}.toml"
    text = recipe.read_text(encoding="utf-8")
    folders = [each for each in sorted(FOLDER.iterdir()) if f'"./{each.name}' in text]
    kept = [each for each in folders if each.name != name and (folder / each.name).is_dir()]
    sources = [recipe, *(each for each in folders if each.is_dir() and each not in kept)]
    targets = [folder / source.name for source in sources]
    if there := next((target.name for target in targets if target.exists()), None):
        fix = "move it away, or go elsewhere"
        raise TbpoError(f"{there} is there already", str(folder), "a folder without it", fix)
    for source, target in zip(sources, targets, strict=True):
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            # Its comments name the file where it is in a checkout.
            target.write_text(text.replace(f"recipes/{name}", name), encoding="utf-8")
    return targets
