"""The one reader and writer of checkpoints: safetensors files, never pickle, each replaced in one step.

A checkpoint holds the weights under the model's own names (tied weights once) and, as metadata, `format`
("nsa-checkpoint") and JSON strings: format_version, config, tokenizer, step, versions, and what the caller adds
(fingerprint, val_loss). A resume state ("nsa-state") holds any tensors and one JSON string, meta. Everything that the
header says is checked against the model that its config describes before any tensor is read.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nsa_cli import __version__
from nsa_cli.config import ModelConfig
from nsa_cli.data.tokenizer import ByteTokenizer, Tokenizer, tokenizer_from_dict
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import Transformer, build_model

FORMAT_VERSION = 1
CHECKPOINT, STATE = "nsa-checkpoint", "nsa-state"

_KIND = {CHECKPOINT: "a checkpoint", STATE: "a resume state"}
_FLOATS = ("F32", "BF16", "F16", "F64")
_RESERVED = ("format", "format_version", "config", "tokenizer", "step", "versions")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    step: optimizer steps behind these weights. metadata: everything in the file's metadata, parsed.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    step: int
    metadata: dict[str, Any]


def save_checkpoint(
    path: str | os.PathLike[str],
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    *,
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    step: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write weights and all that is needed to use them to `path`, atomically (see `write_atomic`).

    Tensors keep their dtype; names lose what torch.compile (`_orig_mod.`) and DistributedDataParallel (`module.`) put
    before them. tokenizer None is the byte tokenizer. extra: JSON values, each under a metadata key of its own.
    ValueError when a key of `extra` is taken or the vocabularies of config and tokenizer differ.
    """
    tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
    extra = {} if extra is None else extra
    _check_vocabulary(config, tokenizer)
    if taken := sorted(set(extra) & set(_RESERVED)):
        raise ValueError(f"extra = {taken}: these names belong to the format")
    state = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    tensors = {_plain_name(name): tensor for name, tensor in state.items()}
    if config.tie_embeddings:
        tensors.pop("to_logits.weight", None)
    values = {"config": config.to_dict(), "tokenizer": tokenizer.to_dict(), "step": step, **extra}
    _save(Path(path), tensors, CHECKPOINT, values)


def read_info(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Metadata of a checkpoint, its header checked from end to end, no tensor read.

    NsaError (exit 3) for a file that is missing, a folder, not safetensors, truncated, not ours, of a newer format, a
    resume state, or whose config, tokenizer, names, shapes or dtypes do not fit together.
    """
    with _opened(Path(path), CHECKPOINT) as (handle, metadata):
        return _checked(Path(path), handle, metadata)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    kernel: str = "auto",
) -> tuple[Transformer, CheckpointInfo]:
    """The model of a checkpoint, in eval mode, and what the file says. Errors as in `read_info`.

    dtype None keeps the file's: bfloat16 when every tensor has it, else float32.
    """
    with _opened(Path(path), CHECKPOINT) as (handle, metadata):
        info = _checked(Path(path), handle, metadata)
        if dtype is None:
            dtypes = {handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            dtype = torch.bfloat16 if dtypes == {"BF16"} else torch.float32
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten: the caller's numbers stay
            model = build_model(info.config, device=device, dtype=dtype, kernel=kernel)
        model.load_state_dict({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return model.eval(), info


def save_state(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a resume state, atomically: tensors of any dtype, and `meta` of JSON values."""
    _save(Path(path), tensors, STATE, {"meta": dict(meta)})


def load_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and meta of a resume state. Errors as in `read_info`."""
    with _opened(Path(path), STATE) as (handle, metadata):
        meta = _meta(Path(path), metadata)
        return {name: handle.get_tensor(name) for name in handle.keys()}, meta  # noqa: SIM118


def read_state_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The meta of a resume state, no tensor read. Errors as in `read_info`."""
    with _opened(Path(path), STATE) as (_, metadata):
        return _meta(Path(path), metadata)


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Replace `path` by what `write` puts into the file it is given: after a crash it is the old file or the new one.

    The temporary file lies beside the target, hidden, with the process id in its name and the mode that the umask
    gives; it is synced before it takes the target's name, and the folder after. A symbolic link stays; what it points
    to is replaced. Whatever `write` raises, the temporary file is removed and the target untouched. Temporary files of
    the same target that killed processes left are removed first.
    OSError (and safetensors' own) becomes NsaError (exit 1) that names the path and the reason.
    """
    shown, target = Path(path), Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_file():
            # Renaming over a device such as /dev/null would replace it for everybody.
            raise IsADirectoryError(errno.EISDIR, "it is a folder or a device, not a regular file")
        temporary.unlink(missing_ok=True)
        remove_leftovers(target)
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            mode = os.fstat(descriptor).st_mode & 0o777
        finally:
            os.close(descriptor)
        try:
            write(temporary)
            # safetensors replaces the file by one of mode 600.
            temporary.chmod(mode)
            _sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise _not_written(shown, error) from error


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Temporary files of `path` whose process is gone; those of a living one may be at work."""
    target = Path(os.path.realpath(path))
    begin = f".{target.name[:100]}."
    for left in target.parent.glob(f"{glob.escape(begin)}*"):
        number = re.fullmatch(r"([1-9]\d{0,8})\.(tmp|part)", left.name.removeprefix(begin))
        if number is None:
            continue
        try:
            os.kill(int(number[1]), 0)
        except ProcessLookupError:
            _remove(left)
        except PermissionError:  # another user's, and alive
            continue


def _remove(left: Path) -> None:
    if left.is_dir() and not left.is_symlink():
        shutil.rmtree(left, ignore_errors=True)
        return
    with suppress(OSError):
        left.unlink()


def _save(path: Path, tensors: Mapping[str, Tensor], kind: str, values: Mapping[str, Any]) -> None:
    versions = {
        "nsa": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }
    parts = {"format_version": FORMAT_VERSION, "versions": versions, **values}
    metadata = {"format": kind} | {key: json.dumps(value) for key, value in parts.items()}
    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses two names for one storage.
        ready[name] = plain.clone() if plain.untyped_storage().data_ptr() in seen else plain
        seen.add(ready[name].untyped_storage().data_ptr())
    write_atomic(path, lambda temporary: _write_tensors(temporary, ready, metadata))


def _write_tensors(target: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """safetensors writes to a temporary file of its own, beside the one it is given and with a random name, and renames
    it: a killed process would leave that for ever. In a folder of ours, `remove_leftovers` finds it."""
    folder = target.with_suffix(".part")
    _remove(folder)
    folder.mkdir()
    try:
        save_file(dict(tensors), folder / "tensors", metadata)
        (folder / "tensors").replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _plain_name(name: str) -> str:
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file and its parsed metadata, once it is known to be whole, ours, of this kind and not too new."""
    hint = "nsa train writes one" if kind == CHECKPOINT else "nsa train writes it beside the checkpoint"
    try:
        with path.open("rb") as file:
            start = file.read(9)
        handle = safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise _bad(f"no such file: {path}", hint) from error
    except IsADirectoryError as error:
        raise _bad(f"{path} is a folder, not {_KIND[kind]}", "name the .safetensors file in it") from error
    except OSError as error:
        raise _bad(f"cannot read {path}: {_reason(error)}", "check that it is a readable regular file") from error
    except SafetensorError as error:
        # A header begins with its length in 8 bytes, then its JSON.
        if start[8:] != b"{" or int.from_bytes(start[:8], "little") > 100_000_000:
            size = "is empty" if not start else "is not a safetensors file"
            raise _bad(f"{path} {size}", f"{_KIND[kind]} is a .safetensors file; {hint}") from error
        raise _damaged(path, str(error).removeprefix("Error while deserializing header: ")) from error
    with handle as opened:
        metadata = opened.metadata() or {}
        found = metadata.get("format")
        if found not in _KIND:
            raise _bad(f"{path} is a safetensors file, but not one of nsa's", hint)
        if found != kind:
            raise _bad(f"{path} is {_KIND[found]}, not {_KIND[kind]}", _other_file(path, found))
        yield opened, _parsed(path, metadata)


def _parsed(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        values = {key: value if key == "format" else json.loads(value) for key, value in metadata.items()}
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its metadata is not JSON") from error
    version = values.get("format_version")
    if type(version) is not int or version < 1:
        raise _damaged(path, f"format_version is {version!r}")
    if version > FORMAT_VERSION:
        message = f"{path} has format_version {version}, and this nsa ({__version__}) reads up to {FORMAT_VERSION}"
        raise _bad(message, "pip install -U nsa-cli")
    return values


def _meta(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    meta = metadata.get("meta")
    if not isinstance(meta, dict):
        raise _damaged(path, "its metadata has no 'meta'")
    return meta


def _checked(path: Path, handle: Any, metadata: dict[str, Any]) -> CheckpointInfo:
    missing = [key for key in ("config", "tokenizer", "step") if key not in metadata]
    if missing:
        raise _damaged(path, f"its metadata has no {', '.join(missing)}")
    tensors = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
    step = metadata["step"]
    try:
        if type(step) is not int or step < 0:
            raise ValueError(f"step = {step!r}: must be an integer of at least 0")
        for key in ("config", "tokenizer"):
            if not isinstance(metadata[key], dict):
                raise ValueError(f"{key} = {metadata[key]!r}: must be a table")
        config = ModelConfig.from_dict(metadata["config"])
        tokenizer = tokenizer_from_dict(metadata["tokenizer"])
        _check_vocabulary(config, tokenizer)
        # Without this bound a wrong depth could keep the next line busy for ever.
        if config.depth > len(tensors):
            raise ValueError(f"depth = {config.depth}: the file has only {len(tensors)} tensors")
        expected = _shapes(config)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if name not in expected:
            problems.append(f"{name} has no place in its config")
        elif shape != expected[name]:
            problems.append(f"{name} has shape {list(shape)}, its config wants {list(expected[name])}")
        elif dtype not in _FLOATS:
            problems.append(f"{name} has dtype {dtype}, not a floating-point one")
    if problems:
        more = f" (and {len(problems) - 1} more like this)" if len(problems) > 1 else ""
        raise _damaged(path, problems[0] + more)
    return CheckpointInfo(config=config, tokenizer=tokenizer, step=step, metadata=metadata)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model, without its memory."""
    model = build_model(config, device="meta", kernel="torch")
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> None:
    if config.vocab_size != tokenizer.vocab_size:
        rule = f"must be the {tokenizer.name} tokenizer's {tokenizer.vocab_size}"
        raise ValueError(f"vocab_size = {config.vocab_size}: {rule}")


def _other_file(path: Path, found: str) -> str:
    stem = str(path).removesuffix(".safetensors").removesuffix(".state").removesuffix(".best")
    wanted = f"{stem}.safetensors" if found == STATE else f"{stem}.state.safetensors"
    return f"give {wanted}, which nsa train writes beside it"


def _bad(message: str, hint: str) -> NsaError:
    return NsaError(message, hint, ExitCode.BAD_INPUT)


def _damaged(path: Path, reason: str) -> NsaError:
    return _bad(f"{path} is damaged: {reason}", "copy it again, or use another checkpoint of the run")


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _not_written(path: Path, error: Exception) -> NsaError:
    """An OSError, or the one that safetensors wraps in a message of its own."""
    wrapped = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(wrapped.group(1)) if wrapped else None
    reason = _reason(error) if isinstance(error, OSError) else os.strerror(number) if number else str(error)
    hints = {
        errno.ENOENT: f"mkdir -p {path.parent}",
        errno.ENOSPC: "free some space on that disk, or choose another --out",
        errno.EACCES: f"chmod u+wx {path.parent}, or choose another --out",
        errno.EDQUOT: "free some of your quota, or choose another --out",
    }
    return NsaError(f"cannot write {path}: {reason}", hints.get(number or 0, "choose another --out"), ExitCode.FAILURE)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    # Some filesystems cannot sync a folder and say so; the rename has happened all the same.
    with suppress(OSError):
        _sync(folder)
