"""What a command runs on: device, number format and kernel, from the flags that every command has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nsa_cli.cli.resolve import Resolved
from nsa_cli.errors import ExitCode, NsaError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Machine:
    """dtype is None for --dtype auto; kernel is a resolved name; notice says that it is not the one asked for."""

    device: torch.device
    dtype: torch.dtype | None
    kernel: str
    notice: str | None

    @property
    def weights_dtype(self) -> torch.dtype:
        """The number format of a model that is only run: float32 for auto, also on a GPU. In bfloat16 a batch's rounding
        flips near ties, and what a prompt gets would depend on its neighbours."""
        import torch

        return torch.float32 if self.dtype is None else self.dtype


def find_machine(settings: Resolved, *, allow_fallback: bool) -> Machine:
    """The machine that --device, --dtype and --kernel ask for. NsaError with exit code 5 for one that is not there."""
    import torch

    from nsa_cli.ops.dispatch import resolve_kernel

    device = find_device(settings["device"])
    dtype = None if settings["dtype"] == "auto" else getattr(torch, settings["dtype"])
    kernel, notice = resolve_kernel(settings["kernel"], device, allow_fallback=allow_fallback)
    # "auto" stays: the model's geometry may decide it.
    return Machine(device, dtype, "auto" if settings["kernel"] == "auto" else kernel, notice)


def find_device(name: str) -> torch.device:
    """--device's value as a device that exists: exit 2 for a name that means nothing, 5 for a GPU that is not there."""
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise NsaError(f"--device {name}: no such device", "use auto, cpu, cuda, or cuda:1", ExitCode.USAGE)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if name == "cpu":
        return torch.device(name)
    if not count:
        raise NsaError(f"--device {name}: no CUDA GPU here", "use --device cpu, or auto", ExitCode.UNAVAILABLE)
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        there = "cuda:0 is the only one" if count == 1 else f"there are cuda:0 to cuda:{count - 1}"
        raise NsaError(f"--device {name}: no such GPU", there, ExitCode.UNAVAILABLE)
    torch.cuda.set_device(index)  # Triton launches on the current device, whatever the tensors'
    return torch.device(name)
