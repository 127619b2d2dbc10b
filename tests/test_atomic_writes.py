"""`write_atomic`: a file is the old one or the new one, whatever happens to the process, the disk or the link."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_cli.checkpoint import save_state, write_atomic
from nsa_cli.errors import ExitCode, NsaError


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def failed_write(path: Path, write: Callable[[Path], Any]) -> str:
    with pytest.raises(NsaError) as caught:
        write_atomic(path, write)
    assert caught.value.exit_code == ExitCode.FAILURE
    assert str(path) in caught.value.message
    return f"{caught.value.message} | {caught.value.hint}"


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(3), OSError(28, "No space")])
def test_a_writer_that_fails_midway_leaves_the_old_file_whole_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half of the n")
        raise error

    with pytest.raises(NsaError if isinstance(error, OSError) else type(error)):
        write_atomic(target, write)
    assert target.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_a_writer_killed_midway_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path, before = tmp_path / "ckpt.safetensors", b"old" * 1000
    path.write_bytes(before)
    script = f"""
        import os, signal
        from pathlib import Path
        from nsa_cli.checkpoint import write_atomic
        def write(temporary):
            temporary.write_bytes(b"half")
            print(temporary.name, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        write_atomic({str(path)!r}, write)
    """
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=root, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == before
    name = done.stdout.strip()
    assert name.startswith(".ckpt.safetensors.")
    assert names_in(path.parent) == sorted([name, path.name])


def test_the_file_and_then_its_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name.split('.')[1:2]}")
        fsync(descriptor)

    def replaced(self: Path, target: Path) -> Path:
        events.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_atomic(tmp_path / "file", lambda temporary: temporary.touch())
    assert events == ["sync ['file']", "replace", "sync []"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_comes_from_the_umask(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        save_state(tmp_path / "state", {"x": torch.zeros(1)}, {})
        write_atomic(tmp_path / "plain", lambda temporary: temporary.write_bytes(b"x"))
    finally:
        os.umask(previous)
    for name in ("state", "plain"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_symbolic_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real, link, dangling = tmp_path / "disk" / "real", tmp_path / "link", tmp_path / "dangling"
    real.write_bytes(b"old")
    link.symlink_to(real)
    dangling.symlink_to(tmp_path / "disk" / "new")
    for name in (link, dangling):
        write_atomic(name, lambda temporary: temporary.write_bytes(b"new"))
        assert name.is_symlink()
        assert name.read_bytes() == b"new"
    assert real.read_bytes() == b"new"
    assert names_in(tmp_path / "disk") == ["new", "real"]


def test_a_temporary_file_left_by_an_earlier_crash_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / f".file.{os.getpid()}.tmp").write_bytes(b"left over")
    write_atomic(tmp_path / "file", lambda temporary: temporary.write_bytes(b"new"))
    assert names_in(tmp_path) == ["file"]


def test_temporary_files_of_killed_writers_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    others = [f".file.{os.getppid()}.tmp", f".file.more.{ended.pid}.tmp", ".file.notes.tmp", ".file.99999999999.tmp"]
    for name in [f".file.{ended.pid}.tmp", *others]:
        (tmp_path / name).write_bytes(b"half")
    write_atomic(tmp_path / "file", lambda temporary: temporary.write_bytes(b"new"))
    assert names_in(tmp_path) == sorted([*others, "file"])


def test_what_safetensors_had_half_written_when_it_was_killed_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    script = f"""
        import os, signal, torch, safetensors.torch
        from nsa_cli import checkpoint
        def save_file(tensors, path, metadata):
            (path.parent / ".tmpAbCdEf").write_bytes(b"half")  # what its own temporary file looks like
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.save_file = save_file
        checkpoint.save_state({str(path)!r}, {{"x": torch.ones(2)}}, {{}})
    """
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=root, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(names_in(tmp_path)) == 2, "the temporary file, and the folder in which safetensors works"
    save_state(path, {"x": torch.ones(2)}, {})
    assert names_in(tmp_path) == ["state"]


def test_a_long_name_has_room_for_its_temporary_name(tmp_path: Path) -> None:
    name = "x" * 250
    write_atomic(tmp_path / name, lambda temporary: temporary.write_bytes(b"new"))
    assert names_in(tmp_path) == [name]


def test_a_folder_that_is_not_there_is_named_with_mkdir(tmp_path: Path) -> None:
    path = tmp_path / "no" / "file"
    message = failed_write(path, lambda temporary: temporary.touch())
    assert message == f"cannot write {path}: No such file or directory | mkdir -p {path.parent}"


def test_devices_and_folders_are_not_replaced(tmp_path: Path) -> None:
    assert "not a regular file" in failed_write(tmp_path, lambda temporary: temporary.touch())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "not a regular file" in failed_write(pipe, lambda temporary: temporary.touch())
    assert pipe.is_fifo()


def test_a_full_disk_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = failed_write(tmp_path / "file", write)
    assert "No space left on device | free some space" in message
    assert not list(tmp_path.iterdir())


def test_an_error_that_safetensors_wraps_is_reported_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_state(path, {"x": torch.ones(2)}, {})
    before = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(NsaError, match=r"cannot write .*state: File too large") as caught:
            save_state(path, {"x": torch.ones(5000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.exit_code == ExitCode.FAILURE
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["state"]
