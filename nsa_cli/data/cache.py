"""Text too large for memory: tokenized once into a shard that later runs find again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy.typing as npt

from nsa_cli.data.reading import Broken, read_pieces
from nsa_cli.data.shards import SUFFIX, VERSION, read_shard, write_shard
from nsa_cli.data.text import TextFacts, TokenText, tokenize
from nsa_cli.data.tokenizer import Tokenizer
from nsa_cli.errors import ExitCode, NsaError

IN_MEMORY_BYTES = 1 << 29
"""Text up to this size is kept in memory unless a folder for shards is named."""

_UNPACKED = 4
"""Bytes of text that a byte of a packed file is taken for."""

_TOLD_EVERY_S = 10.0

Notify = Callable[[str], None]


def text_size(names: Sequence[str]) -> int:
    """Bytes of text in the files, about; stdin and pipes count nothing."""
    total = 0
    for name in names:
        if name != "-" and Path(name).is_file():
            total += Path(name).stat().st_size * (_UNPACKED if name.lower().endswith(".gz") else 1)
    return total


def default_folder() -> Path:
    """Where shards go when no folder is named: nsa in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) / "nsa" if home else Path.home() / ".cache" / "nsa"


def sharded_text(
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    folder: Path,
    text_key: str,
    stdin: BinaryIO | None,
    broken: Broken,
    notify: Notify,
) -> TokenText:
    """The files' tokens, mapped into memory from a shard in `folder`, which is made if it is not there.

    A shard is found again by tokenizer, text_key and the files' paths, sizes and times of change; what comes through a pipe
    is tokenized every time. NsaError: exit 3 for text that cannot be read, 1 for a folder that cannot be written.
    """
    key = _key(names, tokenizer, text_key)
    stem = "stdin" if names[0] == "-" else re.sub(r"[^\w.-]", "_", Path(names[0]).name)[:40]
    path = folder / f"{stem}-{(key or secrets.token_hex(32))[:16]}{SUFFIX}"
    with _one_at_a_time(path):
        if path.exists():
            try:
                text, _ = read_shard(path)
            except NsaError as error:
                notify(f"{error.message}; making it again")
            else:
                notify(f"using the token shard {path}")
                return text
        notify(f"tokenizing into {path}, which later runs on this text use; --shards FOLDER puts it elsewhere")
        return _make(path, names, tokenizer, text_key, stdin, broken, notify, keyed=key is not None)


def _make(
    path: Path,
    names: Sequence[str],
    tokenizer: Tokenizer,
    text_key: str,
    stdin: BinaryIO | None,
    broken: Broken,
    notify: Notify,
    *,
    keyed: bool,
) -> TokenText:
    """The shard at `path`, or, where the text has no key, at a name made of its fingerprint."""

    def fill(write: Callable[[npt.NDArray[Any]], None]) -> TextFacts:
        done, told = 0, time.monotonic()

        def counted(ids: npt.NDArray[Any]) -> None:
            nonlocal done, told
            write(ids)
            done += len(ids)
            if time.monotonic() - told > _TOLD_EVERY_S:
                told = time.monotonic()
                notify(f"{done:,} tokens so far")

        return tokenize(read_pieces(names, text_key, stdin, broken), tokenizer, counted, broken)

    _write(path, lambda target: write_shard(target, tokenizer, fill))
    text, _ = read_shard(path)
    if not keyed:
        path.replace(path.with_name(f"{path.name.rsplit('-', 1)[0]}-{text.facts.fingerprint_packed[:16]}{SUFFIX}"))
    return text


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Processes that want one shard, as those of a torchrun do, wait for the one that makes it. Where nothing can be locked
    each makes its own, and the last one stays."""
    lock = path.with_name(f".{path.name}.lock")
    with ExitStack() as stack:
        with suppress(OSError, ImportError):
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
            # Who still waits for the file that is removed here finds the shard afterwards.
            stack.callback(lock.unlink, missing_ok=True)
        yield


def _write(path: Path, write: Callable[[Path], None]) -> None:
    from nsa_cli.checkpoint import write_atomic  # loads torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, write)
    except OSError as error:
        raise _unwritable(f"cannot write {path}: {error.strerror or error}") from error
    except NsaError as error:
        if isinstance(error.__cause__, OSError) and error.exit_code == ExitCode.FAILURE:
            raise _unwritable(error.message) from error
        raise


def _unwritable(message: str) -> NsaError:
    return NsaError(message, "name a folder with room in it: --shards FOLDER", ExitCode.FAILURE)


def _key(names: Sequence[str], tokenizer: Tokenizer, text_key: str) -> str | None:
    """A digest of all that the tokens depend on; None where a file can be read only once."""
    files = []
    for name in names:
        if name == "-":
            return None
        try:
            facts = Path(name).stat()
        except OSError:
            return None  # reading it says what is wrong
        if not stat.S_ISREG(facts.st_mode):
            return None
        files.append([os.path.realpath(name), facts.st_size, facts.st_mtime_ns])
    return hashlib.sha256(json.dumps([VERSION, tokenizer.to_dict(), text_key, files], sort_keys=True).encode()).hexdigest()
