"""The torch kernel's memory: 16,384 tokens fit into 2 GiB, where the score matrix of eight heads alone would take 8."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_cli.config import NSAConfig
from nsa_cli.ops import torch_backend, window_attention

GIB = 2**30

MEASURE = """
import resource, sys
from pathlib import Path
import torch
from nsa_cli.config import NSAConfig
from nsa_cli.ops import nsa_attention

torch.manual_seed(0)
config, tokens, heads, kv_heads, dim = NSAConfig(), int(sys.argv[1]), 8, 2, 64
blocks = config.num_compressed(tokens)

def make(*shape):
    x = torch.randn(*shape)
    x.requires_grad_()
    # The gradients belong to the inputs' side of the account: written now, so that they are resident before.
    x.grad = torch.ones_like(x)
    return x

q, q_cmp = make(1, heads, tokens, dim), make(1, heads, tokens, dim)
k, v, k_win, v_win = (make(1, kv_heads, tokens, dim) for _ in range(4))
k_cmp, v_cmp = make(1, kv_heads, blocks, dim), make(1, kv_heads, blocks, dim)
gates = make(1, heads, tokens, 3)
warm = 256
small = [x[:, :, :warm] for x in (q, k, v)]
nsa_attention(*small, k_cmp[:, :, :15], v_cmp[:, :, :15], gates[:, :, :warm], config).sum().backward()

statm = Path("/proc/self/statm")
before = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0
out = nsa_attention(q, k, v, k_cmp, v_cmp, gates, config, q_cmp=q_cmp, k_win=k_win, v_win=v_win)
out.square().mean().backward()
assert all(x.grad.isfinite().all() for x in (q, k, v, k_cmp, v_cmp, gates, q_cmp, k_win, v_win))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
print(peak - before)
"""


def extra_bytes(tokens: int) -> int:
    """Peak resident memory of a forward and backward, above that of a process with the inputs and their gradients."""
    command = [sys.executable, "-c", MEASURE, str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_16384_tokens_forward_and_backward_fit_in_2_gib() -> None:
    extra = extra_bytes(16384)
    print(f"16,384 tokens: {extra / GIB:.2f} GiB above the inputs")
    assert extra <= 2 * GIB
    # Something was measured: the output alone takes 32 MiB.
    assert extra >= 32 * 2**20


@pytest.mark.parametrize("window", [1, 63, 400, 499, 500, 501, 2000, 5000])
@pytest.mark.parametrize("positions", [False, True], ids=["in-order", "behind-a-cache"])
def test_no_window_makes_scores_of_all_queries_at_once(
    window: int, positions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, heads, tokens = NSAConfig(window=window), 4, 2000
    monkeypatch.setattr(torch_backend, "CHUNK_ELEMENTS", {"cpu": 2**16})
    monkeypatch.setattr(torch_backend, "FUSED_MASK_ELEMENTS", 2**16)
    largest = 0
    plain = torch_backend._chunk_scores

    def watched(*arguments: Any) -> Tensor:
        nonlocal largest
        scores = plain(*arguments)
        largest = max(largest, scores.numel())
        return scores

    monkeypatch.setattr(torch_backend, "_chunk_scores", watched)
    q, k = torch.randn(1, heads, 100 if positions else tokens, 8), torch.randn(1, 2, tokens, 8)
    at = torch.arange(tokens - 100, tokens)[None] if positions else None
    window_attention(q, k, k, config, positions=at)
    assert 0 < largest <= max(2**16, heads * 64 * (64 + 2 * window), heads * 16 * tokens)


def test_the_window_reads_only_its_keys_however_long_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = []
    plain = torch_backend.WindowMask.span

    def watched(self: torch_backend.WindowMask, start: int, stop: int) -> tuple[int, int]:
        spans.append(plain(self, start, stop))
        return spans[-1]

    monkeypatch.setattr(torch_backend.WindowMask, "span", watched)
    q, k = torch.randn(2, 2, 60, 8), torch.randn(2, 2, 3000, 8)
    positions = torch.stack([torch.arange(2000, 2060), torch.arange(2010, 2070)])
    window_attention(q, k, k, NSAConfig(window=20), positions=positions)
    assert min(low for low, _ in spans) == 2000 - 19
    assert max(high for _, high in spans) == 2070
