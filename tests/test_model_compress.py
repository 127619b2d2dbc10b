"""Each of the seven compression networks against plain numpy, and what they cost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from nsa_cli.config import COMPRESSIONS, ModelConfig, NSAConfig
from nsa_cli.model import build_model
from nsa_cli.model.accounting import compression_parameters, parameters_by_part
from nsa_cli.model.compress import make_compression, windows
from tests import oracle
from tests.inputs import assert_close
from tests.models import SPARSE, randomise, with_nsa

every_network = pytest.mark.parametrize("name", COMPRESSIONS)


def config_of(name: str, length: int = 6, stride: int = 2) -> NSAConfig:
    return NSAConfig(compress_block=length, compress_stride=stride, select_block=8, compress=name)  # type: ignore[arg-type]


def oracle_weights(name: str, network: torch.nn.Module, group: int) -> dict[str, np.ndarray]:
    """The network's parameters under the names of the definition."""
    values = {key: oracle.f64(value) for key, value in network.state_dict().items() if key != "pos"}
    if name == "grouped-mlp":
        return {"W1": values["w1"][group], "W2": values["w2"][group]}
    names = {"attention-pool": {"a": "a"}, "conv": {"w": "w"}, "mlp": {"w1": "W1", "w2": "W2"}}
    return {names.get(name, {"w": "W"})[key]: value for key, value in values.items()}


@every_network
@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 8, 31])
def test_each_network_is_its_formula(name: str, tokens: int) -> None:
    config, groups, dim = config_of(name), 3, 5
    network = make_compression(config, groups, dim).double()
    randomise(network)
    x = torch.randn(2, groups, tokens, dim, dtype=torch.float64)
    got = network(windows(x, config))
    blocks = oracle.num_compressed(tokens, config)
    assert got.shape == (2, groups, blocks, dim)
    pos = network.state_dict().get("pos", torch.zeros(groups, config.compress_block, dim))
    assert ("pos" in network.state_dict()) == (name != "mean")
    want = np.zeros((2, groups, blocks, dim))
    for b in range(2):
        for g in range(groups):
            for c in range(blocks):
                block = oracle.f64(x)[b, g, list(oracle.compressed_tokens(c, config))] + oracle.f64(pos)[g]
                want[b, g, c] = oracle.compress_block(name, block, oracle_weights(name, network, g))
    assert_close(got, want, 1e-12)


@every_network
def test_a_network_sees_its_own_block_and_nothing_else(name: str) -> None:
    config = config_of(name)
    network = make_compression(config, 2, 4).double()
    randomise(network)
    x = torch.randn(1, 2, 20, 4, dtype=torch.float64, requires_grad=True)
    for c in range(config.num_compressed(20)):
        (grad,) = torch.autograd.grad(network(windows(x, config))[0, 1, c].sum(), x)
        tokens = list(oracle.compressed_tokens(c, config))
        assert grad[0, 1].abs().sum(-1).nonzero().flatten().tolist() == tokens
        assert not grad[0, 0].any()


@pytest.mark.parametrize("name", [name for name in COMPRESSIONS if name != "mean"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    config = config_of(name)
    network = make_compression(config, 2, 4)
    network(windows(torch.randn(1, 2, 20, 4), config)).square().sum().backward()
    for key, value in network.named_parameters():
        assert value.grad is not None
        assert value.grad.abs().sum() > 0, key


@every_network
def test_a_fresh_network_keeps_the_scale_of_its_input(name: str) -> None:
    """Not exploding, not dead: unit tokens in, something between a mean's deviation and a few units out."""
    config = NSAConfig(compress=name)  # type: ignore[arg-type]
    out = make_compression(config, 2, 64)(torch.randn(1, 2, 50, 32, 64))
    assert 0.02 < out.std() < 3


@every_network
@pytest.mark.parametrize(("kv_heads", "dim"), [(2, 8), (1, 64)])
def test_parameter_counts_are_visible_and_right(name: str, kv_heads: int, dim: int) -> None:
    config = config_of(name)
    network = make_compression(config, kv_heads, dim)
    count = sum(parameter.numel() for parameter in network.parameters())
    length, pos = 6, kv_heads * 6 * dim
    by_hand = {
        "mean": 0,
        "attention-pool": dim + pos,
        "conv": length * dim + pos,
        "linear": length * dim * dim + pos,
        "mlp": length * dim * dim + dim * dim + pos,
        "gated": dim * dim + pos,
        "grouped-mlp": kv_heads * (length * dim * dim + dim * dim) + pos,
    }[name]
    assert count == by_hand
    assert compression_parameters(kv_heads, dim, config) == 2 * count


@every_network
@pytest.mark.parametrize("branch_kv", ["independent", "shared"])
@pytest.mark.parametrize("change", [{}, {"tie_embeddings": False}, {"ff": "swiglu", "ff_mult": 2.5}])
def test_parameters_by_part_add_up_to_the_models_own(name: str, branch_kv: str, change: dict[str, object]) -> None:
    nsa = with_nsa(compress=name, branch_kv=branch_kv)
    config = ModelConfig.from_dict({**nsa.to_dict(), **change})
    model = build_model(config, device="meta")
    parts = parameters_by_part(config)
    assert parts == parameters_by_part(model)
    assert parts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert parts["total"] == sum(count for part, count in parts.items() if part != "total")
    counted = {
        "compression": ".compress_",
        "gates": ".to_gates.",
        "feed_forward": ".ff.",
        "norms": "norm.",
    }
    for part, mark in counted.items():
        want = sum(value.numel() for key, value in model.named_parameters() if mark in key)
        assert parts[part] == want, part


def test_keys_and_values_have_networks_of_their_own() -> None:
    model = build_model(SPARSE)
    attention = model.layers[0].attn
    keys, values = (dict(getattr(attention, key).named_parameters()) for key in ("compress_k", "compress_v"))
    assert keys.keys() == values.keys()
    assert all(keys[name].data_ptr() != values[name].data_ptr() for name in keys)
    assert all(not torch.equal(keys[name], values[name]) for name in keys)


def test_windows_of_packed_documents_begin_where_they_are_told() -> None:
    config = config_of("mean")
    x = torch.randn(1, 2, 30, 4)
    starts: Callable[[int, int], list[int]] = lambda first, tokens: [  # noqa: E731
        first + 2 * c for c in range(oracle.num_compressed(tokens, config))
    ]
    got = windows(x, config, torch.tensor(starts(0, 11) + starts(11, 19)))
    want = torch.cat([windows(x[:, :, :11], config), windows(x[:, :, 11:], config)], 2)
    assert torch.equal(got, want)
