"""nsa: train, sample, time and look into Native Sparse Attention (arXiv 2502.11089).

The public names load on first use, so that `import nsa_cli` (and `nsa --help`) does not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_cli.checkpoint import load_checkpoint, save_checkpoint
    from nsa_cli.config import ModelConfig, NSAConfig
    from nsa_cli.errors import NsaError
    from nsa_cli.model import build_model
    from nsa_cli.ops import compressed_attention, nsa_attention, selected_attention, window_attention

__version__ = "0.1.0"

_HOME = {
    "ModelConfig": "config",
    "NSAConfig": "config",
    "NsaError": "errors",
    "build_model": "model",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "compressed_attention": "ops",
    "nsa_attention": "ops",
    "selected_attention": "ops",
    "window_attention": "ops",
}

__all__ = [
    "ModelConfig",
    "NSAConfig",
    "NsaError",
    "__version__",
    "build_model",
    "compressed_attention",
    "load_checkpoint",
    "nsa_attention",
    "save_checkpoint",
    "selected_attention",
    "window_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))
