"""The builder: sizes of the presets, initial state, dtypes, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nsa_cli.config import PRESETS, ModelConfig, NSAConfig
from nsa_cli.errors import ExitCode, NsaError
from nsa_cli.model import build_model
from nsa_cli.model.accounting import parameters_by_part
from tests.inputs import assert_close
from tests.models import DENSE, SPARSE, random_ids, random_model

MILLION = 10**6


def preset(name: str, *, sparse: bool) -> ModelConfig:
    nsa = NSAConfig(**PRESETS[name]["nsa"]) if sparse else None
    return ModelConfig(**PRESETS[name]["model"], nsa=nsa)


def parameters(config: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in build_model(config, device="meta").parameters())


def test_the_small_preset_is_nanogpts_character_model() -> None:
    config = preset("small", sparse=False)
    assert (config.depth, config.dim, config.context, config.dropout) == (6, 384, 256, 0.2)
    assert parameters(config) == pytest.approx(10.7 * MILLION, rel=0.015)
    assert PRESETS["small"]["train"]["batch_tokens"] == 64 * 256


@pytest.mark.parametrize("sparse", [False, True])
def test_the_base_preset_has_120_to_160_million_parameters(sparse: bool) -> None:
    config = preset("base", sparse=sparse)
    assert 120 * MILLION <= parameters(config) <= 160 * MILLION
    assert (config.group, config.context) == (8, 8192)
    geometry = NSAConfig(**PRESETS["base"]["nsa"])
    assert geometry == NSAConfig(
        compress_block=32, compress_stride=16, select_block=64, num_selected=16, num_init=1, num_local=2, window=512
    )


@pytest.mark.parametrize("name", PRESETS)
def test_compression_networks_stay_under_a_tenth_of_the_parameters(name: str) -> None:
    parts = parameters_by_part(preset(name, sparse=True))
    assert 0 < parts["compression"] < 0.1 * parts["total"]
    assert parts["total"] == parameters(preset(name, sparse=True))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("sparse", [False, True])
def test_every_preset_builds_without_memory_on_the_meta_device(name: str, sparse: bool) -> None:
    model = build_model(preset(name, sparse=sparse), device="meta")
    assert model.config == preset(name, sparse=sparse)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_a_fresh_model_predicts_every_token_alike(config: ModelConfig) -> None:
    loss = build_model(config).eval()(random_ids(4), random_ids(4))
    assert loss.item() == pytest.approx(math.log(config.vocab_size), abs=0.05)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_a_seed_gives_one_model(config: ModelConfig) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(build_model(config))
    one, two = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert models[0].training


def test_names_are_those_that_convert_between_dense_and_sparse() -> None:
    dense, sparse = build_model(DENSE).state_dict(), build_model(SPARSE).state_dict()
    layer = ["attn_norm.weight", "attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight", "attn.to_out.weight"]
    assert {"token_emb.weight", "norm.weight", *(f"layers.1.{name}" for name in layer)} <= dense.keys() <= sparse.keys()
    extra = {name.split(".")[3] for name in sparse.keys() - dense.keys()}
    assert extra == {"compress_k", "compress_v", "to_gates"}
    assert dense["layers.0.attn.to_k.weight"].shape == (16, 16)
    assert sparse["layers.0.attn.to_k.weight"].shape == (48, 16)
    assert not any("to_logits" in name for name in dense)
    assert "to_logits.weight" in build_model(replace(DENSE, tie_embeddings=False)).state_dict()


def test_there_are_no_biases_but_the_gates() -> None:
    names = {name for name in build_model(SPARSE).state_dict() if "bias" in name}
    assert names == {"layers.0.attn.to_gates.bias", "layers.1.attn.to_gates.bias"}


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_are_float32_whatever_the_weights(config: ModelConfig, dtype: torch.dtype) -> None:
    model = build_model(config, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    ids = random_ids(2, 50)
    assert model(ids).dtype == torch.float32
    assert model(ids).shape == (2, 50, 31)
    loss = model(ids, ids)
    assert (loss.dtype, loss.shape) == (torch.float32, ())


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_the_loss_is_the_mean_cross_entropy_of_the_targets_that_are_not_minus_one(config: ModelConfig) -> None:
    model, ids, targets = random_model(config), random_ids(3), random_ids(3)
    targets[0, :60] = -1
    targets[1] = -1
    logits = model(ids).double()
    kept = targets >= 0
    want = -F.log_softmax(logits, -1)[kept].gather(-1, targets[kept][:, None]).mean()
    assert_close(model(ids, targets), want, 1e-6)
    other = targets.clone()
    assert model(ids, other).item() == model(ids, targets).item()
    model.zero_grad()
    model(ids, targets).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_dropout_acts_in_training_only() -> None:
    for config in (DENSE, SPARSE):
        model, ids = random_model(replace(config, dropout=0.5)), random_ids()
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (6, 2), (4, 1), (6, 1), (8, 1), (16, 1)])
@pytest.mark.parametrize("nsa", [None, SPARSE.nsa], ids=["dense", "sparse"])
def test_any_group_size_builds_and_runs(heads: int, kv_heads: int, nsa: NSAConfig | None) -> None:
    model = random_model(replace(SPARSE, heads=heads, kv_heads=kv_heads, nsa=nsa))
    assert model(random_ids(1, 30)).isfinite().all()


def test_swiglu_and_its_width() -> None:
    model = build_model(replace(DENSE, ff="swiglu", ff_mult=2.5))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name.startswith("layers.0.ff.")}
    assert sorted(shapes.values()) == [(16, 40), (40, 16), (40, 16)]
    assert model(random_ids()).isfinite().all()


@pytest.mark.usefixtures("no_interpreter")
def test_unknown_and_unavailable_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel = 'fast'"):
        build_model(SPARSE, kernel="fast")
    for kernel in ("flex", "triton"):
        with pytest.raises(NsaError, match=kernel) as error:
            build_model(SPARSE, kernel=kernel)
        assert error.value.exit_code == ExitCode.UNAVAILABLE
    assert build_model(SPARSE).kernel == "torch"
    assert build_model(SPARSE, kernel="torch").kernel == "torch"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 5, dtype=torch.int32), "ids"),
        (torch.zeros(5, dtype=torch.int64), "ids"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one token"),
        (torch.tensor([[0, 31]]), "31"),
        (torch.tensor([[0, -1]]), "-1"),
    ],
)
def test_wrong_ids_are_refused(ids: torch.Tensor, message: str) -> None:
    for config in (DENSE, SPARSE):
        with pytest.raises(ValueError, match=message):
            build_model(config)(ids)


@pytest.mark.parametrize(
    "targets",
    [torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 5), 31), torch.full((1, 5), -2), torch.zeros(1, 5)],
    ids=["shape", "beyond", "negative", "float"],
)
def test_wrong_targets_are_refused(targets: torch.Tensor) -> None:
    with pytest.raises((ValueError, IndexError, RuntimeError), match=r"arget|out of bounds|expected"):
        build_model(DENSE)(random_ids(1, 5), targets)


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([0, 49], dtype=torch.int32),
        torch.tensor([1, 50], dtype=torch.int32),
        torch.tensor([0, 60, 50], dtype=torch.int32),
        torch.tensor([0], dtype=torch.int32),
    ],
    ids=["short", "late", "descending", "one"],
)
@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_wrong_cu_seqlens_are_refused(bad: torch.Tensor, config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        build_model(config)(random_ids(1, 50), cu_seqlens=bad)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_a_few_steps_learn_a_pattern(config: ModelConfig) -> None:
    model = build_model(config)
    ids = (torch.arange(65) * 7 % 31).repeat(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = last = math.inf
    for step in range(40):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < 0.5 < first
