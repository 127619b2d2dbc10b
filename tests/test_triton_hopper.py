"""Kernels that Hopper GPUs have for themselves (Gluon), where there is no GPU: that they compile, and what they take."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nsa_cli.config import NSAConfig
from nsa_cli.ops.triton import attend_tiles, dkv_tiles, gradient_tiles, parts_tiles
from nsa_cli.ops.triton.device import GLUON
from nsa_cli.ops.triton.launch import Selection
from nsa_cli.ops.triton.problem import Problem, make_documents
from tests.command_line import ROOT, environment

CHIP = 227 * 1024
"""Bytes of shared memory that a program may have on Hopper."""
PAPER = Problem(
    config=NSAConfig(), b=1, h=16, g=1, n=200, d=128, e=128, dtype=torch.bfloat16, device=torch.device("cpu"), scale=0.1
)
TWO = make_documents(torch.tensor([0, 90, 200]), 200, 10, PAPER.config)


@pytest.mark.skipif(not GLUON, reason="needs Triton 3.6 or later")
def test_they_compile_for_hopper_on_a_machine_without_a_gpu_and_fit_on_its_chip(tmp_path: Path) -> None:
    env = environment(TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    done = subprocess.run([sys.executable, "-m", "tests.compiling"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made: dict[str, list[int]] = {}
    for line in map(json.loads, done.stdout.splitlines()):
        made.setdefault(line["kernel"], []).append(line["shared"])
    tiles = {"forward_tiles", "select_from_sums", "dq_tiles", "dkv_tiles", "parts_tiles", "gradient_tiles"}
    assert tiles | {"linear_tiles_kernel", "attend_group_tiles"} <= made.keys()
    assert max(map(max, made.values())) <= CHIP
    for shared in (max(made["gradient_tiles"]), sorted(made["dkv_tiles"])[-3]):  # the two largest have a multiprocessor each
        assert 2 * (shared + 1024) <= CHIP + 1024, "a multiprocessor no longer has room for two programs"


@pytest.mark.parametrize(
    ("problem", "attend", "sums", "dkv", "parts", "gradient"),
    [
        (PAPER, True, True, True, True, True),
        (replace(PAPER, dtype=torch.float16, h=64, g=2), True, True, True, True, True),
        (replace(PAPER, dtype=torch.float32), False, False, False, False, False),
        (replace(PAPER, d=64, e=64), False, True, True, False, True),
        (replace(PAPER, d=96, e=128), True, True, False, False, False),  # zeros beside the channels cost products alone
        (replace(PAPER, d=48, e=48), False, True, False, False, False),
        (replace(PAPER, d=64), False, False, False, False, False),
        (replace(PAPER, d=192), False, False, False, False, False),
        (replace(PAPER, h=4), True, True, True, False, False),  # a query's box of fewer than 8 heads is no whole pattern
        (replace(PAPER, h=12), True, True, False, False, False),
        (replace(PAPER, config=NSAConfig(num_local=0)), True, True, True, False, False),  # a query's own block is free
        (replace(PAPER, config=NSAConfig(select_block=128)), True, False, True, False, False),  # eight compressed blocks each
        (replace(PAPER, config=NSAConfig(compress_block=16)), True, False, True, True, True),  # blocks share none
        (replace(PAPER, documents=TWO), True, False, True, True, True),
        (replace(PAPER, config=NSAConfig(num_selected=3)), True, True, True, False, False),  # nothing to choose
    ],
)
def test_what_they_cannot_do_is_left_to_the_portable_kernels(
    problem: Problem, attend: bool, sums: bool, dkv: bool, parts: bool, gradient: bool
) -> None:
    indices = torch.zeros(1, problem.g, problem.n, problem.config.num_selected, dtype=torch.int32)
    ways = [Selection(indices, problem, forced=True, way=way) for way in ("forward", "backward")]
    assert [attend_tiles.fits(problem), attend_tiles.sums_fit(problem), dkv_tiles.fits(problem)] == [attend, sums, dkv]
    assert [parts_tiles.fits(problem, ways[0]), gradient_tiles.fits(problem, ways[1])] == [parts, gradient]


def test_lists_of_any_blocks_are_left_to_the_portable_kernels() -> None:
    """They may name a query's own block, of which the future is not seen."""
    s = Selection(torch.zeros(1, 1, 200, 16, dtype=torch.int32), PAPER, forced=False, way="forward")
    assert not parts_tiles.fits(PAPER, s)
    assert not gradient_tiles.fits(PAPER, s)
