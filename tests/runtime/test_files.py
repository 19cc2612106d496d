"""Atomic writes: the new file or the old one, also when the disk is full or the writer dies."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gearshift.runtime import files
from gearshift.runtime.errors import RunError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", [b"new \xc3\xa9", "new é", lambda handle: handle.write("new é".encode())])
def test_every_kind_of_content_replaces_the_file(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("old")
    files.atomic_write(path, content)
    assert path.read_text(encoding="utf-8") == "new é"
    assert names(tmp_path) == ["file"]


def test_torch_writes_through_the_handle(tmp_path):
    state = {"a": torch.arange(100_000)}
    files.atomic_write(tmp_path / "state.pt", lambda handle: torch.save(state, handle))
    assert torch.equal(torch.load(tmp_path / "state.pt", weights_only=True)["a"], state["a"])


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_one_clear_line(tmp_path, monkeypatch, call, before):
    path = tmp_path / "file"
    if before:
        path.write_text("old")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, call, refuse)
    left = "the previous file is intact" if before else "nothing was left behind"
    with pytest.raises(RunError, match=rf"could not write .*/file \(No space left on device\): .*; {left}"):
        files.atomic_write(path, "new")
    assert names(tmp_path) == (["file"] if before else [])
    assert not before or path.read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_the_reason_survives_a_library_that_hides_it(tmp_path, monkeypatch):
    """torch.save into a device that is really full raises an error of its own, without the system's reason."""
    full = files._Handle

    class Full(full):
        def __init__(self, path, mode):
            Path(path).touch()
            super().__init__("/dev/full", mode)

    monkeypatch.setattr(files, "_Handle", Full)
    (tmp_path / "state.pt").write_text("old")
    with pytest.raises(RunError, match=r"No space left on device.*the previous file is intact"):
        files.atomic_write(tmp_path / "state.pt", lambda handle: torch.save({"a": torch.arange(100_000)}, handle))
    assert names(tmp_path) == ["state.pt"]


def test_a_limit_of_the_system_is_reported_like_a_full_disk(tmp_path):
    """A real refusal in the middle of a write: the process may not make files above 64 KiB."""
    (tmp_path / "state.pt").write_text("old")
    code = (
        "import sys, torch; from gearshift.runtime.files import atomic_write\n"
        "try: atomic_write(sys.argv[1], lambda handle: torch.save({'a': torch.arange(100_000)}, handle))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    command = [sys.executable, "-B", "-c", code, str(tmp_path / "state.pt")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.stdout.startswith("RunError could not write"), done.stderr
    assert "(File too large)" in done.stdout
    assert "the previous file is intact" in done.stdout
    assert names(tmp_path) == ["state.pt"]
    assert (tmp_path / "state.pt").read_text() == "old"


def test_other_errors_pass_through_and_clean_up(tmp_path):
    def broken(handle):
        handle.write(b"half")
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        files.atomic_write(tmp_path / "file", broken)
    assert names(tmp_path) == []


def test_a_missing_folder_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match=r"No such file or directory.*nothing was left behind"):
        files.atomic_write(tmp_path / "absent" / "file", "new")


def test_a_writer_killed_halfway_leaves_the_old_file_and_its_leftovers_can_be_removed(tmp_path):
    (tmp_path / "file").write_text("old")
    code = (
        "import os, signal, sys; from gearshift.runtime.files import atomic_write\n"
        "def die(handle): handle.write(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write(sys.argv[1], die)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old"
    assert len(names(tmp_path)) == 2
    files.remove_partial(tmp_path)
    assert names(tmp_path) == ["file"]
