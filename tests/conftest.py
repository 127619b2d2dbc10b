"""What every test gets: one thread, a printed seed, and a skip for `gpu` tests where there is no CUDA device.

Tests marked `slow` run only when asked for with `-m slow`.
"""

from __future__ import annotations

import os
import random
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Where there is no GPU, Triton's kernels run in its interpreter; it has to know before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Two cores are shared by the whole suite; small tensors are slower on many threads than on one.
torch.set_num_threads(int(os.environ.get("NSA_TEST_THREADS", "1")))

settings.register_profile(
    "nsa",
    deadline=None,
    max_examples=40,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("nsa")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed of this test: its name's checksum, or NSA_TEST_SEED; printed, so that a failure shows it."""
    value = int(os.environ.get("NSA_TEST_SEED", zlib.crc32(request.node.nodeid.encode())))
    print(f"seed {value} (NSA_TEST_SEED={value} repeats it)")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
    return value


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: without a GPU, kernel 'triton' is not there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA GPU"
    if "slow" not in config.getoption("-m"):
        reasons["slow"] = "takes minutes: run with -m slow"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
