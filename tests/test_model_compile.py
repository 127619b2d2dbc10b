"""torch.compile: the same loss and gradients as eager."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from nsa_cli.config import ModelConfig
from tests.inputs import assert_close
from tests.models import DENSE, SPARSE, random_ids, random_model

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="torch.compile needs a C++ compiler"
)
both_models = pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])


def compare(config: ModelConfig, backend: str) -> None:
    torch.compiler.reset()
    model = random_model(replace(config, depth=1), dtype=torch.float32)
    ids, targets = random_ids(2), random_ids(2)
    want = model(ids, targets)
    want.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    got = torch.compile(model, backend=backend)(ids, targets)
    got.backward()
    assert_close(got, want, 1e-5)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, grads[name], 1e-3)


@both_models
def test_a_traced_model_gives_the_loss_and_gradients_of_eager(config: ModelConfig) -> None:
    """Tracing and the split of forward and backward, without the minutes of a cold compilation."""
    compare(config, "aot_eager")


@pytest.mark.slow
@needs_compiler
@both_models
def test_a_compiled_model_gives_the_loss_and_gradients_of_eager(config: ModelConfig) -> None:
    compare(config, "inductor")
