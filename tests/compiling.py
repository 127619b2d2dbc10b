"""Compiles kernels for a Hopper GPU on a machine without one: `python -m tests.compiling` prints a line of JSON a kernel.

Launches go the whole way, from tensors on the CPU to a binary for sm_90, but for the launch itself. It shows that kernels in
Gluon, which Triton's interpreter cannot run, are whole with the Triton that is installed, and how much of the chip they take;
not that they are right. A process of its own, since Triton must not be in its interpreter, and takes another driver.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nsa_cli.config import NSAConfig
from nsa_cli.ops.triton import attend_tiles, group_tiles, launch, linear_tiles, parts_tiles
from nsa_cli.ops.triton.problem import Problem, make_documents

CPU = torch.device("cpu")


class Hopper:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return CPU


def compile_only() -> None:
    """From here on launches compile, and print what they made."""
    driver.set_active(Hopper())
    run = JITFunction.run
    seen: set[str] = set()

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **named)
        if kernel is not None and kernel.hash not in seen:
            seen.add(kernel.hash)
            print(json.dumps({"kernel": self.__name__, "shared": kernel.metadata.shared}), flush=True)

    JITFunction.run = compiled
    setattr(launch, "has_tiles", lambda device: True)  # noqa: B010


def draw(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def train(heads: int, lengths: list[int], dim: int = 128) -> None:
    """The kernels of training that Hopper has for itself: one group of so many heads."""
    config, n = NSAConfig(), sum(lengths)
    blocks = sum(config.num_compressed(length) for length in lengths)
    documents = None
    if len(lengths) > 1:
        ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        documents = make_documents(ends, n, blocks, config)
    p = Problem(
        config=config, b=1, h=heads, g=1, n=n, d=dim, e=dim, dtype=torch.bfloat16, device=CPU, scale=0.1, documents=documents
    )
    q, do, dq = (draw(1, heads, n, dim) for _ in range(3))
    k, v, k_cmp, v_cmp = (draw(1, 1, places, dim) for places in (n, n, blocks, blocks))
    lse, delta, gate = (torch.zeros(1, n, heads) for _ in range(3))
    if attend_tiles.fits(p):
        launch.attend_forward("cmp", q, k_cmp, v_cmp, dq, lse, p)
        launch.attend_dq("cmp", q, k_cmp, v_cmp, do, lse, delta, gate, dq, p, add=False)
    for branch in ("cmp", "win", "local", "init"):
        keys, values = (k_cmp, v_cmp) if branch == "cmp" else (k, v)
        launch.attend_dkv(branch, q, keys, values, do, lse, delta, gate, p)
    indices = torch.zeros(1, 1, n, config.num_selected, dtype=torch.int32)
    s = launch.Selection(indices, p, forced=True, way="forward")
    if parts_tiles.fits(p, s):
        part_o, part_lse = draw(1, s.free, s.part_rows() * heads, dim), torch.zeros(s.free, s.part_rows() * heads)
        launch.selected_parts(q, k, v, part_o, part_lse, (0, 1), 0, s, p)
    s = launch.Selection(indices, p, forced=True, way="backward")
    part_dq, part_dk = draw(s.part_entries(), heads, dim), torch.zeros(s.part_entries(), 64, dim)
    launch.selected_gradient_parts(q, k, v, do, lse, delta, gate, part_dq, part_dk, part_dk, (0, 1), 0, s, p)


def choose(dim: int) -> None:
    """Compressed attention that leaves block sums, and the choice from them."""
    config, n = NSAConfig(), 300
    p = Problem(config=config, b=1, h=8, g=2, n=n, d=dim, e=dim, dtype=torch.bfloat16, device=CPU, scale=0.1)
    k_cmp = draw(1, 2, config.num_compressed(n), dim)
    assert attend_tiles.sums_fit(p)
    launch.attend_and_select(draw(1, 8, n, dim), k_cmp, k_cmp, draw(1, 8, n, dim), torch.zeros(1, n, 8), p)


def decode() -> None:
    """A product of a batch, and attention of one launch."""
    x, weight, counters = draw(64, 256), draw(512, 256), torch.zeros(64, dtype=torch.int32)
    tile = linear_tiles.choose_tile(64, 256, 512, False, 132)
    assert tile is not None
    linear_tiles.linear_tiles(x, weight, tile, counters=counters, act="gelu")
    config, b = NSAConfig(), 2
    p = Problem(config=config, b=b, h=16, g=2, n=1, d=64, e=64, dtype=torch.bfloat16, device=CPU, scale=0.1)
    q, k, window, k_cmp = draw(b, 16, 1, 64), draw(b, 2, 1024, 64), draw(b, 2, 512, 64), draw(b, 2, 63, 64)
    group_tiles.attend_in_one(
        q, k, k, k_cmp, k_cmp, draw(b, 16, 1, 3), p, positions=torch.zeros(b, dtype=torch.int64), q_cmp=q, k_win=window,
        v_win=window, ring=True, blocks=16, early=True,
    )  # fmt: skip


if __name__ == "__main__":
    compile_only()
    train(8, [100, 200])
    train(32, [200], dim=64)
    choose(64)
    choose(128)
    decode()
