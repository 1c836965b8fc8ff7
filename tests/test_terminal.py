"""At a terminal and without one: progress, tables, colours, interrupts."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
import tomllib

import pytest
from conftest import preference_rows, write_jsonl

from tbpo_cli import console

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7](;|m)")


def at_a_terminal(tmp_path, *arguments, **environment):
    """(exit code, output) of the real command whose output is a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tbpo_cli.cli.main", *map(str, arguments)],
        cwd=tmp_path, stdout=theirs, stderr=theirs, stdin=theirs,
        env={**os.environ, "NO_COLOR": "", "TERM": "xterm", "COLUMNS": "80", **environment},
    )  # fmt: skip
    os.close(theirs)
    printed = b""
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                printed += os.read(ours, 65536)
            except OSError:
                break
    os.close(ours)
    return process.wait(), printed.decode(errors="replace")


def test_results_go_to_stdout_within_80_columns_and_to_stderr_goes_only_what_we_say(
    executable, recipe_file, tmp_path
):
    """Of three stages in one command: nothing of the libraries, no colour, no warning."""
    rows = write_jsonl(
        tmp_path / f"{'a-file-with-quite-a-long-name-' * 3}.jsonl", preference_rows(40)
    )
    settings = (
        "--set",
        f"data.train={rows}",
        "--set",
        "sample.max_new_tokens=4",
        "--set",
        "sample.max_prompts=2",
    )
    done = executable("sample", recipe_file, *settings, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    ours = (
        "(align|evaluating|sampling|preparing|rows are|the reference is|more about|all of them"
        "|adapter:|every|next|settings:|load it:|attention:|WARNING"
    )
    assert not [
        line for line in done.stderr.splitlines() if not re.match(rf"{ours}|\s+the same)", line)
    ]
    assert "align 6/6" in done.stderr and "\x1b" not in done.stdout + done.stderr
    for part in ("Prepared pairs", "reward accuracy", "KL(ref ‖ model)", "policy: "):
        assert part in done.stdout, part
    assert all(len(line) <= 80 for line in done.stdout.splitlines()), done.stdout


def test_quiet_leaves_the_results(tbpo, recipe_file, finished):
    done = tbpo("align", recipe_file, "--run-dir", finished, "--quiet")
    assert (done.returncode, done.stderr) == (0, "") and "reward accuracy" in done.stdout


def test_a_run_that_lost_its_recipe_gets_it_again(tbpo, recipe_file, finished):
    (finished / "recipe.toml").unlink()
    done = tbpo("align", recipe_file, "--run-dir", finished)
    assert "is up to date" in done.stderr
    assert tomllib.loads((finished / "recipe.toml").read_text())["align"]["loss"]["name"]


def test_plain_lines_have_a_rate_and_the_time_that_is_left(capsys):
    with console.progress("counting", 10, every=5) as update:
        for done in range(1, 11):
            time.sleep(0.01)
            update(done, "note")
    with console.progress("reading", None, every=2) as update:
        update(2, "rows")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"counting 5/10  note  \([0-9.]+/s, 0 s left\)", lines[0]), lines
    assert len(lines) == 3 and re.fullmatch(r"reading 2  rows  \([0-9,]+/s\)", lines[2])


def test_no_color_and_quiet_are_obeyed_at_a_terminal(recipe_file, tmp_path):
    code, coloured = at_a_terminal(tmp_path, "align", "--help")
    assert code == 0 and COLOUR.search(coloured)
    code, plain = at_a_terminal(tmp_path, "align", "--help", NO_COLOR="1")
    assert code == 0 and not COLOUR.search(plain) and "Example:" in plain
    code, printed = at_a_terminal(tmp_path, "align", recipe_file, "--quiet", NO_COLOR="1")
    assert code == 0 and not COLOUR.search(printed) and "accuracy" in printed
    assert "loading" not in printed.lower() and "evaluating" not in printed


@pytest.mark.parametrize("command", ["prepare", "sft", "align", "sample", "show", "init"])
def test_every_command_has_an_example(tbpo, command):
    done = tbpo(command, "--help")
    assert done.returncode == 0 and "Example: tbpo " in done.stdout


@pytest.mark.parametrize("command", ["prepare", "align", "eval", "push", "init", "losses", "show"])
def test_help_names_no_types(tbpo, command):
    done = tbpo(command, "-h")
    assert done.returncode == 0 and not re.search(r"<[\w\[\]]+>|\[\[", done.stdout), done.stdout


@pytest.mark.parametrize("command", ["losses", "show", "a mistake"])
def test_at_60_columns_prose_is_in_lines_of_60(executable, recipe_file, command):
    """Only a word that is longer, such as a path, is over them."""
    arguments = {
        "losses": ("losses",),
        "show": ("show", recipe_file),
        "a mistake": ("show", recipe_file, "--set", "align.loss=kto", "--set", "data.format=x"),
    }[command]
    done = executable(*arguments, COLUMNS="60")
    assert done.returncode == (2 if command == "a mistake" else 0), done.stderr
    printed = done.stdout + done.stderr
    long = [line for line in printed.splitlines() if len(line) > 60]
    assert not [line for line in long if max(map(len, line.split())) < 40], long
    assert len(printed.splitlines()) > 6


@pytest.mark.parametrize("wait_for", ["", "prepare/inputs.json", "align/inputs.json"])
def test_ctrl_c_is_answered_soon_wherever_it_comes(recipe_file, tmp_path, wait_for):
    """While libraries are imported, rows are prepared, or the model is loaded."""
    rows = write_jsonl(
        tmp_path / "many.jsonl", preference_rows(3000 if wait_for.startswith("prepare") else 40)
    )
    command = [
        sys.executable,
        "-m",
        "tbpo_cli.cli.main",
        "align",
        str(recipe_file),
        "--set",
        f"data.train={rows}",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        # A suite in the background ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    started = time.monotonic()
    while (
        not (tmp_path / "runs/tiny" / wait_for).exists()
        and time.monotonic() - started < 60
        and wait_for
    ):
        time.sleep(0.01)
    time.sleep(0 if wait_for else 1)
    interrupted = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    by_python = (
        () if wait_for else (-signal.SIGINT,)
    )  # before it has begun with us; a shell calls it 130 as well
    assert process.returncode in (130, *by_python) and "Traceback" not in said, said
    assert time.monotonic() - interrupted < 10


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_training_is_a_line_and_one_that_is_ignored_stays_so(
    recipe_file, tmp_path, ignored, number
):
    """Ignored as by `trap "" TERM` or nohup: the signal comes at the beginning and in training."""
    given = signal.SIG_IGN if ignored else signal.SIG_DFL
    process = subprocess.Popen(
        [sys.executable, "-m", "tbpo_cli.cli.main", "align", str(recipe_file)],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(number, given),
    )  # fmt: skip
    for name in ("prepare/inputs.json", *(["align/metrics.jsonl"] if ignored else [])):
        while not (tmp_path / "runs/tiny" / name).exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
    _, said = process.communicate(timeout=100)
    assert (tmp_path / "runs/tiny/align/manifest.json").exists() == ignored
    assert process.returncode == (0 if ignored else 128 + number), said
    assert ignored or said.count("interrupted: nothing is lost") == 1
    assert "Traceback" not in said and "stopping" not in said


def test_a_terminal_that_is_closed_leaves_a_checkpoint(recipe_file, tmp_path):
    """The kernel sends SIGHUP, and a shell once more; by then nothing can be written any more."""

    def take_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tbpo_cli.cli.main", "align", str(recipe_file)]
    process = subprocess.Popen(
        [*command, "--set", "align.max_steps=2000", "--set", "align.checkpoint_every=2000"],
        cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=take_terminal, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    log = tmp_path / "runs/tiny/align/metrics.jsonl"
    while not log.exists() or log.read_text().count('"train"') < 3:
        assert process.poll() is None, "it ended before"
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 65536)
    os.close(ours)
    time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    assert [*(tmp_path / "runs/tiny/align/checkpoints").glob("step-*")]


CLIPBOARD = "\x1b]52;c;ZXZpbA==\x1b\\"  # what it asks a terminal for: to change the clipboard


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\r\nthree ←é🙂", "one\nthree ←é🙂"),
        (CLIPBOARD, "\\x1b]52;c;ZXZpbA==\\x1b\\"),
        ("a\x9b2Jb\x07\x00\x7f\r", "a\\x9b2Jb\\x07\\x00\\x7f\\x0d"),
        ("safe\u202egpj.exe\u2066\u200f", "safe\\u202egpj.exe\\u2066\\u200f"),
        ("half \ud83d", "half \\ud83d"),
        ("[bold]no markup[/x]", "[bold]no markup[/x]"),
    ],
)
def test_no_text_commands_the_terminal_or_the_reader(text, shown, capsys):
    assert console.plain(f"{text}\t") == f"{shown}\t"
    console.say(text)
    console.show(text)
    with console.progress(text, 1) as update:
        update(1, text)
    console.show_table(text, ["", text], [[text, "1"]])
    printed = capsys.readouterr()
    assert shown in printed.err and f"{shown} 1/1  {shown}" in printed.err
    assert shown.partition("\n")[0] in printed.out
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066\ud83d]", printed.out + printed.err
    )


def test_a_judge_or_a_row_cannot_command_the_terminal(tmp_path):
    """An error that repeats a name from a file, at a real terminal."""
    rows = [{f"question{CLIPBOARD}[/x]": 1}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\nbase = "."\n[data]\ntrain = "rows.jsonl"\n')
    code, printed = at_a_terminal(tmp_path, "prepare", recipe)
    assert code == 2 and "\x1b]" not in printed, printed


NOTE = "loss 0.2372  accuracy 69%  KL 0.1099  12,345 tokens/s"


@pytest.mark.parametrize(
    ("width", "kept", "left_out"),
    [
        (120, ("loss 0.2372", "accuracy 69%", "KL 0.1099", "12,345 tokens/s", "3.2/s"), ()),
        (80, ("loss 0.2372", "accuracy 69%", "KL 0.1099"), ("tokens/s",)),
        (60, ("loss 0.2372",), ("KL", "tokens/s")),
    ],
)
def test_a_bar_keeps_step_total_and_time_left_and_drops_the_least_important_first(
    width, kept, left_out
):
    """Beside a bar of 16 columns."""
    columns = width - console.BAR - 1
    line = console.one_line("align", 67, 121, "58 s left", NOTE, "3.2/s", columns)
    assert line.startswith("align 67/121  58 s left") and len(line) <= columns
    assert all(part in line for part in kept) and not any(part in line for part in left_out)


def test_times_are_said_in_their_units():
    assert [console.duration(seconds) for seconds in (7.4, 119, 148, 7199, 7500)] == [
        "7 s",
        "119 s",
        "2 min 28 s",
        "119 min 59 s",
        "2 h 5 min",
    ]


def test_help_has_a_short_name_and_flags_show_no_type(tbpo):
    done = tbpo("align", "-h")
    assert done.returncode == 0 and "--restart" in done.stdout and "bool" not in done.stdout
    assert "bool" not in tbpo("-h").stdout and "tbpo init quickstart" in tbpo("-h").stdout


def test_a_stage_ends_with_the_next_command_for_this_run(tbpo, recipe_file, finished):
    sets = ("--set", "align.max_steps=6", "--run-dir", finished)
    done = tbpo("align", recipe_file, *sets)
    assert done.returncode == 0, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    expected = f"tbpo eval {recipe_file} --set align.max_steps=6 --run-dir {finished}"
    assert last == f"next: {expected}"
