"""A message for exceptions of the system and of libraries that nobody foresaw."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

from tbpo_cli.errors import TbpoError

PACKAGE = Path(__file__).parent.parent
# Where an input of the recipe is read by a library, by the folder of ours that calls it: the keys.
READ_IN = {
    "model": ("model.base, model.adapter", "a model and an adapter that the libraries can load"),
    "data": ("data.train, data.eval, model.base", "rows and a tokenizer that can be read"),
    "evaluation": ("[eval]", "judges, models and suites that the libraries can use"),
    "hub": ("[push]", "a Hub that answers as the Hub does"),
}
WITHOUT_FRAMES = {"safetensors", "pyarrow"}  # libraries in Rust and C++ with errors of their own


def message_for(error: Exception) -> TbpoError | None:
    """The message for an error of the system, or of a library with an input; None for a bug.

    An error is a library's if it was raised in one, below a call in a folder of READ_IN, or is of
    a kind that only a library in another language raises, which leaves no frame of its own.
    """
    if isinstance(error, MemoryError):
        fix = "a smaller max_tokens_per_device or batch_size, or a machine with more memory"
        return TbpoError("the memory is used up", str(error), "enough memory", fix)
    if isinstance(error, OSError) and error.strerror:
        where = str(error.filename or "the system")
        if not Path(where).is_relative_to(PACKAGE):
            return TbpoError(
                f"the system refuses: {error.strerror}",
                where,
                "a file or folder that can be used",
                "mend that, and give the same command again, which goes on from there",
            )
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # of libraries written in Rust
        return TbpoError(
            f"the system refuses: {os.strerror(int(number[1]))}",
            "a file that a library reads or writes",
            "a disk with space that works",
            "mend that, and give the same command again, which goes on from there",
        )
    if isinstance(error, RuntimeError):
        from tbpo_cli.core.memory import first_line, is_out_of_memory  # torch: seconds to import

        if is_out_of_memory(error):
            return TbpoError(
                f"out of memory: {first_line(error)}",
                "work that cannot be done in smaller parts",
                "memory for the weights, and for a short text or an exchange between processes",
                'more --gpus with sharding = "fsdp", model.quantization, or a device where nothing '
                "else runs; the same command goes on from what is kept",
            )
    frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    kind = type(error).__module__.partition(".")[0]
    if not frames or (frames[-1].is_relative_to(PACKAGE) and kind not in WITHOUT_FRAMES):
        return None
    ours = [path.relative_to(PACKAGE) for path in frames if path.is_relative_to(PACKAGE)]
    if not ours or ours[-1].parts[0] not in READ_IN:
        return None
    library = kind if kind in WITHOUT_FRAMES else [*_modules(frames[-1]), frames[-1].stem][0]
    key, expected = READ_IN[ours[-1].parts[0]]
    said = " ".join(str(error).split())[:500]
    return TbpoError(
        f"{library} cannot use an input: {type(error).__name__}: {said}",
        f"{key} (it was read in tbpo_cli/{ours[-1]})",
        expected,
        "look at that input; TBPO_TRACEBACK=1 shows where the library failed",
    )


def _modules(path: Path) -> list[str]:
    """The name of the library that a file belongs to."""
    parts = path.parts
    return [parts[parts.index("site-packages") + 1]] if "site-packages" in parts else []
