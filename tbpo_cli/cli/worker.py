"""One of several processes of a stage, started by the launcher.

python -m tbpo_cli.cli.worker RUN_DIR/STAGE
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

from tbpo_cli import console
from tbpo_cli.cli.last_resort import message_for
from tbpo_cli.errors import TbpoError, is_echo
from tbpo_cli.runs.children import PARENT, die_with_parent
from tbpo_cli.runs.launch import REPORTED


def main() -> None:
    """Runs the stage of the run's resolved recipe. Of several that fail, the first one says why."""
    if parent := os.environ.get(PARENT):
        die_with_parent(int(parent))
    code = _run(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by sys.exit: torch's communication threads sometimes abort a process that shuts down.
    os._exit(code)


def _run(folder: Path) -> int:
    """Returns the exit code."""
    console.quiet_libraries()
    from tbpo_cli.config.recipe import load_recipe
    from tbpo_cli.runs.files import explaining_disk_errors
    from tbpo_cli.runs.run_dir import RunDir
    from tbpo_cli.stages.chain import STAGES
    from tbpo_cli.train.group import Group

    try:
        group = Group.of_environment()
        console.err.quiet = not group.is_main
        work = STAGES[folder.name].work
        assert work is not None
        with explaining_disk_errors(folder.parent):
            work(load_recipe(folder.parent / "recipe.toml"), RunDir(folder.parent))
        group.gather(None)  # nobody closes its connections while others still talk
    except TbpoError as error:
        if _is_first(folder):
            sys.stderr.write(console.plain(f"{error}\n") if str(error) else "")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        # A process that ends closes its connections; what the others then raise is only an echo.
        message = None if os.environ.get("TBPO_TRACEBACK") else message_for(error)
        if not is_echo(error) and _is_first(folder):
            if message is None:
                traceback.print_exc()
            else:
                sys.stderr.write(console.plain(f"{message}\n"))
        return 1 if message is None else message.exit_code
    return 0


def _is_first(folder: Path) -> bool:
    if os.environ.get("RANK", "0") != "0":
        time.sleep(1)  # what all have met is reported by the first one
    try:
        (folder / REPORTED).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    main()
