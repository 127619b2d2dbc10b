"""Configurations refuse wrong values with the field, the value and the rule."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_cli.config import COMPRESSIONS, PRESETS, ModelConfig, NSAConfig, TrainConfig
from tests import oracle


def test_the_defaults_are_the_papers() -> None:
    c = NSAConfig()
    assert (c.compress_block, c.compress_stride, c.select_block, c.num_selected, c.window) == (32, 16, 64, 16, 512)
    assert (c.num_init, c.num_local, c.compress) == (1, 2, "mlp")
    assert (c.branch_kv, c.compress_rope) == ("independent", "none")


@pytest.mark.parametrize(
    ("field", "value", "changes"),
    [
        ("compress_block", 0, {}),
        ("compress_block", -4, {}),
        ("compress_block", 4.0, {}),
        ("compress_block", True, {}),
        ("compress_block", "32", {}),
        ("compress_block", None, {}),
        ("compress_stride", 0, {}),
        ("compress_stride", 5, {}),
        ("compress_stride", 32, {"select_block": 48}),
        ("compress_block", 128, {}),
        ("select_block", 0, {}),
        ("select_block", 16, {"compress_stride": 16}),
        ("num_selected", 0, {"num_init": 0, "num_local": 0}),
        ("num_selected", 2, {}),
        ("num_init", -1, {}),
        ("num_local", -1, {}),
        ("num_local", 1.5, {}),
        ("window", 0, {}),
        ("compress", "max", {}),
        ("compress", None, {}),
        ("branch_kv", "both", {}),
        ("compress_rope", "all", {}),
    ],
)
def test_a_wrong_geometry_is_refused_with_field_and_value(field: str, value: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must") as error:
        NSAConfig(**{field: value, **changes})
    named = field if field != "select_block" or value == 0 else "compress_block"
    assert named in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("dim", 0),
        ("depth", 0),
        ("heads", 0),
        ("heads", 2.0),
        ("kv_heads", 0),
        ("kv_heads", 3),
        ("kv_heads", 8),
        ("dim_head", 0),
        ("dim_head", 7),
        ("dim_head", 258),
        ("context", 0),
        ("ff", "relu"),
        ("ff_mult", 0.0),
        ("ff_mult", float("nan")),
        ("ff_mult", float("inf")),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", "0.1"),
        ("tie_embeddings", 1),
        ("rope_theta", 0.0),
        ("rope_theta", float("nan")),
        ("nsa", {"window": 3}),
    ],
)
def test_a_wrong_model_is_refused_with_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="must") as error:
        ModelConfig(**{field: value})
    assert field in str(error.value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_tokens", 0),
        ("micro_batch_tokens", 0),
        ("lr", -1.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("min_lr_ratio", 1.5),
        ("schedule", "step"),
        ("warmup", -1),
        ("decay_ratio", 2.0),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("grad_clip", -1.0),
        ("seed", -1),
        ("seed", 1.5),
        ("log_every", 0),
        ("eval_every", -1),
        ("eval_tokens", 0),
        ("val_fraction", 1.0),
        ("save_every", -1),
        ("compile", "yes"),
    ],
)
def test_a_wrong_training_run_is_refused_with_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="must") as error:
        TrainConfig(**{field: value})
    assert field in str(error.value)
    assert repr(value) in str(error.value)


def test_each_forced_block_may_be_left_out() -> None:
    NSAConfig(num_init=0, num_local=0, num_selected=1)
    NSAConfig(num_init=3, num_local=0, num_selected=3)
    NSAConfig(num_init=0, num_local=3, num_selected=3)


def test_configurations_are_frozen_and_take_keywords_only() -> None:
    for config in (NSAConfig(), ModelConfig(), TrainConfig()):
        name = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, 1)
        with pytest.raises(TypeError):
            type(config)(1)  # type: ignore[call-arg]


@given(tokens=st.integers(1, 300), d=st.integers(1, 8), length=st.integers(1, 5), block=st.integers(5, 9))
def test_block_counts_are_those_of_the_definition(tokens: int, d: int, length: int, block: int) -> None:
    config = NSAConfig(compress_block=d * length, compress_stride=d, select_block=d * block)
    assert config.num_compressed(tokens) == oracle.num_compressed(tokens, config)
    assert config.num_select_blocks(tokens) == len({t // config.select_block for t in range(tokens)})


@pytest.mark.parametrize("nsa", [None, *(NSAConfig(compress=name) for name in COMPRESSIONS)])  # type: ignore[arg-type]
def test_a_model_survives_json(nsa: NSAConfig | None) -> None:
    config = ModelConfig(dim=64, nsa=nsa)
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


@pytest.mark.parametrize(
    ("values", "name"),
    [({"dims": 3}, "dims"), ({"nsa": {"windows": 3}}, "windows"), ({"nsa": 3}, "nsa"), ({"dim": "64"}, "dim")],
)
def test_reading_back_refuses_what_is_unknown_or_wrong(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ModelConfig.from_dict(values)


def test_every_preset_is_valid_in_full() -> None:
    for name, preset in PRESETS.items():
        nsa = NSAConfig(**preset["nsa"])
        model, train = ModelConfig(**preset["model"], nsa=nsa), TrainConfig(**preset["train"])
        assert train.batch_tokens % model.context == 0, name
        assert nsa.window <= model.context


def test_tiny_and_small_have_their_documented_geometry() -> None:
    nsa = NSAConfig(**PRESETS["tiny"]["nsa"])
    assert PRESETS["tiny"]["model"]["context"] == 128
    assert (nsa.compress_block, nsa.compress_stride, nsa.select_block) == (8, 4, 16)
    assert (nsa.num_selected, nsa.window) == (4, 32)
    small = NSAConfig(**PRESETS["small"]["nsa"])
    assert (small.compress_block, small.compress_stride, small.select_block) == (16, 8, 16)
    assert (small.num_selected, small.window) == (6, 64)
