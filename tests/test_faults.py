"""A part of the faults that tests/benchmarks/faults.py has for every operation on files."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from disk_faults.power import Disk

EVERY = 60  # of about 1,500 cases


def test_after_a_fault_at_an_operation_the_same_command_leaves_the_same_bytes():
    """Kills, full disks, I/O errors, power cuts and damaged files, chosen by a fixed seed."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("the shim needs Linux and a C compiler")
    program = Path(__file__).parent / "benchmarks/faults.py"
    command = [sys.executable, str(program), "--every", str(EVERY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and " 0 wrong" in done.stdout, done.stdout + done.stderr


def test_what_no_fsync_has_reached_is_lost_by_the_model_of_a_power_cut(tmp_path):
    """A file that was written beside and renamed, before and after it and its folder are synced."""
    (tmp_path / "kept").write_bytes(b"old")
    journal = tmp_path / "journal"
    journal.mkdir()
    (journal / "2").write_bytes(b"new!")
    disk = Disk.of(tmp_path)
    new, kept = str(tmp_path / "new"), str(tmp_path / "kept")
    disk.apply(f"0\topen\t7\t0\t{new}\t", journal)
    disk.apply(f"1\twrite\t7\t4\t{new}\t", journal)
    zeros, cut, old = disk.states()
    assert (zeros[new], cut[new], new in old) == (bytes(4), b"", False)
    disk.apply(f"2\tsync\t7\t4\t{new}\t", journal)
    disk.apply(f"3\trename\t0\t0\t{new}\t{kept}", journal)
    zeros, cut, old = disk.states()
    assert zeros[kept] == cut[kept] == b"new!" and old[kept] == b"old" and old[new] == b"new!"
    disk.apply(f"4\tsync\t9\t0\t{tmp_path}\t", journal)
    assert all(state[kept] == b"new!" and new not in state for state in disk.states())
