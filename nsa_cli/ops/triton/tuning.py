"""Launch configurations: tile sizes, warps, stages and registers of every kernel, from a table. Nothing is tuned at run time.

A kernel's entry is looked up by the bytes of a row on chip (head dim rounded up, times the element's size), then by the group's
size; what the table does not hold comes from `default`, which is safe on any device. TABLE holds what was measured on an H200
(EXPERIMENTS.md beside this file), for all GPUs with its multiprocessors; the file that NSA_KERNEL_TABLE names, which
`nsa bench --tune` writes by the devices' names, is laid over it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from triton.errors import TritonError

from nsa_cli.errors import ExitCode, NsaError

TABLE_VARIABLE = "NSA_KERNEL_TABLE"
LAUNCH_ERRORS = (TritonError, RuntimeError)
"""What a configuration that a device cannot run raises: out of resources, not to be compiled, no memory."""


@dataclass(frozen=True)
class Tile:
    """rows: query rows of a tile (tokens times heads). keys: keys of a tile. registers: a cap a thread, 0 for none.

    key_stages: of the loops over keys in the finishing kernels, whose `stages` are those of the loop over partials.
    """

    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2
    registers: int = 0
    key_stages: int = 2

    def __str__(self) -> str:
        registers = f", {self.registers} registers" if self.registers else ""
        keys = f", {self.key_stages} of keys" if self.key_stages != 2 else ""
        return f"{self.rows} x {self.keys}, {self.warps} warps, {self.stages} stage{'s' * (self.stages != 1)}{keys}{registers}"

    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | {"maxnreg": self.registers} if self.registers else options


KERNELS = (
    "compressed", "compressed_dq", "compressed_dkv", "importance", "window", "window_dq", "window_dkv",
    "selected_parts", "selected_finish", "selected_gradient_parts", "selected_gradient_finish", "forced_dkv",
)  # fmt: skip

TABLE: dict[str, dict[str, Tile]] = {
    "sm_90": {
        "compressed/256": Tile(128, 64, 4, 2),
        "compressed/128": Tile(128, 64, 4, 3),
        "compressed_dq/256": Tile(128, 64, 8, 3),
        "compressed_dq/128": Tile(128, 64, 8, 3),
        "compressed_dkv/256": Tile(64, 64, 4, 2),
        "importance/256": Tile(64, 128, 4, 2, 168),
        "importance/128": Tile(64, 128, 4, 2, 168),
        "window/256": Tile(64, 64, 4, 2, 168),
        "window_dq/256": Tile(64, 64, 4, 3),
        "window_dkv/256": Tile(64, 64, 4, 2),
        "forced_dkv/256": Tile(64, 64, 4, 2),
        "selected_parts/256": Tile(64, 64, 4, 1, 128),
        "selected_finish/256/16": Tile(64, 32, 4, 4, 168, 3),
        "selected_finish/256": Tile(64, 64, 4, 4),
        "selected_gradient_parts/256": Tile(64, 64, 4, 2),
        "selected_gradient_finish/256": Tile(64, 64, 4, 5),
    },
}
"""architecture -> "kernel/bytes of a row" or "kernel/bytes of a row/heads of a group" -> Tile; float32 "kernel/float32/bytes"."""


def default(kernel: str, row_bytes: int, dtype: torch.dtype) -> Tile:
    """A configuration that fits: small tiles for wide rows, and for float32, whose exact products run on the plain units."""
    if dtype == torch.float32:
        # Larger tiles spill registers by the ten thousand, and compile for minutes.
        tile = Tile(32, 32, 8, 1) if row_bytes <= 256 else Tile(16, 16, 8, 1)
        if kernel == "importance":
            return replace(tile, keys=64)
        return tile
    if row_bytes > 256:
        tile = Tile(64, 32, 8, 2)
        if kernel == "importance":
            return replace(tile, keys=64)
        if kernel.startswith("selected"):
            return replace(tile, stages=1)
        return tile
    if kernel == "importance":
        return Tile(64, 128, 4, 2)
    return Tile(64, 64, 4, 2)


def device_name(device: torch.device) -> str:
    """The name that a file's table knows a device by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@cache
def _device_table(device: torch.device) -> dict[str, Tile]:
    table: dict[str, Tile] = {}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        table |= TABLE.get(f"sm_{major}{minor}", {})
    path = os.environ.get(TABLE_VARIABLE)
    if path:
        table |= read_table(Path(path)).get(device_name(device), {})
    return table


_overlay: Mapping[str, Tile] = {}
"""Of the whole process, not of a thread: autograd runs a backward in threads of its own."""


@contextmanager
def overridden(table: Mapping[str, Tile]) -> Iterator[None]:
    """Inside, `table` (key -> Tile) is laid over the device's: for measuring."""
    global _overlay
    before, _overlay = _overlay, table
    try:
        yield
    finally:
        _overlay = before


_asked: set[str] = set()


@contextmanager
def recorded() -> Iterator[set[str]]:
    """Inside, the kernels whose configuration is asked for come into the set: those that run, and have one."""
    global _asked
    before, _asked = _asked, set()
    try:
        yield _asked
    finally:
        _asked = before


def table_key(kernel: str, *, width: int, dtype: torch.dtype) -> str:
    """A kernel's key for groups of any size. float32 has keys of its own: its products run on other units."""
    return f"{kernel}/{'float32/' if dtype == torch.float32 else ''}{width * dtype.itemsize}"


def tile(kernel: str, *, width: int, group: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The configuration of a kernel. width: head dim rounded up to a power of two. group: heads of a group."""
    _asked.add(kernel)
    key = table_key(kernel, width=width, dtype=dtype)
    for table in (_overlay, _device_table(device)):
        found = table.get(f"{key}/{group}") or table.get(key)
        if found is not None:
            return found
    return default(kernel, width * dtype.itemsize, dtype)


def read_table(path: Path) -> dict[str, dict[str, Tile]]:
    """A table that `table_to_json` wrote. NsaError (exit 3) for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {device: {key: Tile(**value) for key, value in rows.items()} for device, rows in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        hint = f"nsa bench --tune writes one, to a new file; {TABLE_VARIABLE} names one, or nothing"
        raise NsaError(f"{path} is not a table of kernel configurations: {error}", hint, ExitCode.BAD_INPUT) from error


def table_to_json(table: dict[str, dict[str, Tile]]) -> str:
    """The text that `read_table` reads."""
    content = {device: {key: asdict(value) for key, value in sorted(rows.items())} for device, rows in table.items()}
    return json.dumps(content, indent=1) + "\n"
