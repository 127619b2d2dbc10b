"""The command line as a user meets it: in a process of its own, through real pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from nsa_cli.checkpoint import save_checkpoint
from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.data import ByteTokenizer
from nsa_cli.model import build_model

ROOT = Path(__file__).parent.parent
NSA = (sys.executable, "-m", "nsa_cli")
TINY_NSA = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=3, num_local=1, window=8)
TINY = ModelConfig(dim=16, depth=2, heads=4, kv_heads=2, dim_head=8, context=64, nsa=TINY_NSA)


def environment(**changes: str) -> dict[str, str]:
    """This process's, without what would change a command's meaning, and with the package importable from anywhere."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("NSA_") and key != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **changes}


def nsa(*arguments: str, cwd: Path, stdin: bytes = b"", **changes: str) -> subprocess.CompletedProcess[bytes]:
    """One command, run to its end."""
    return subprocess.run([*NSA, *arguments], cwd=cwd, input=stdin, capture_output=True, env=environment(**changes))


def shell(line: str, *, cwd: Path, **changes: str) -> subprocess.CompletedProcess[bytes]:
    """One bash line, in which `nsa` is the command line."""
    function = f'nsa() {{ "{sys.executable}" -m nsa_cli "$@"; }}\n'
    command = ["bash", "-c", function + line]
    return subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, env=environment(**changes))


def write_checkpoint(path: Path, config: ModelConfig = TINY, **extra: Any) -> Path:
    """A checkpoint with random weights."""
    torch.manual_seed(0)
    save_checkpoint(path, build_model(config), config=config, tokenizer=ByteTokenizer(), extra=extra)
    return path


def text(size: int = 6000) -> str:
    """Words that a model can learn something from."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "far"]
    return " ".join(words[(i * i + i // 7) % len(words)] for i in range(size // 4))[:size]
