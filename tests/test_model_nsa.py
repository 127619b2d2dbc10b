"""One sparse layer against the definition in numpy, from hidden state to output; and where sparse is dense."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nsa_cli.config import COMPRESSIONS, ModelConfig
from nsa_cli.model import build_model
from nsa_cli.model.attention import Geometry
from nsa_cli.model.nsa import SparseAttention
from nsa_cli.model.rotary import Rotary
from nsa_cli.model.trace import record
from tests import oracle
from tests.inputs import assert_close
from tests.models import DENSE, SPARSE, random_ids, random_model, randomise, with_nsa
from tests.test_model_compress import oracle_weights


def by_definition(layer: SparseAttention, config: ModelConfig, x: torch.Tensor, theta: float) -> np.ndarray:
    """Sections 1 to 7 for x [1, t, dim], with the layer's weights and nothing else of it."""
    nsa = config.nsa
    assert nsa is not None
    weights = {name: oracle.f64(value) for name, value in layer.state_dict().items()}
    hidden, positions = oracle.f64(x)[0], np.arange(x.shape[1])
    heads, groups, dim = config.heads, config.kv_heads, config.dim_head

    def project(name: str, count: int) -> np.ndarray:
        return (hidden @ weights[f"{name}.weight"].T).reshape(len(hidden), count, dim).transpose(1, 0, 2)[None]

    sets = 3 if nsa.branch_kv == "independent" else 1
    # Section 'Keys and values per branch': cmp, slc, win, one after another.
    k_cmp, k_slc, k_win = (np.split(project("to_k", sets * groups), sets, axis=1) * 3)[:3]
    v_cmp, v_slc, v_win = (np.split(project("to_v", sets * groups), sets, axis=1) * 3)[:3]
    q = project("to_q", heads)
    compressed = {}
    for name, values in (("compress_k", k_cmp), ("compress_v", v_cmp)):
        network = getattr(layer, name)
        pos = oracle.f64(network.pos) if hasattr(network, "pos") else np.zeros((groups, nsa.compress_block, dim))
        blocks = range(oracle.num_compressed(len(hidden), nsa))
        out = np.zeros((1, groups, len(blocks), dim))
        for g in range(groups):
            own = oracle_weights(nsa.compress, network, g)
            for c in blocks:
                block = values[0, g, list(oracle.compressed_tokens(c, nsa))] + pos[g]
                out[0, g, c] = oracle.compress_block(nsa.compress, block, own)
        compressed[name] = out
    turned = oracle.rotate(q, positions, theta)
    q_cmp, keys = q, compressed["compress_k"]
    if nsa.compress_rope == "block":
        starts = [oracle.compressed_tokens(c, nsa)[0] for c in range(keys.shape[2])]
        q_cmp, keys = turned, oracle.rotate(keys, starts, theta)
    logits = hidden @ weights["to_gates.weight"].T + weights["to_gates.bias"]
    gates = oracle.sigmoid(logits).reshape(len(hidden), heads, 3).transpose(1, 0, 2)[None]
    out = oracle.nsa(
        turned, oracle.rotate(k_slc, positions, theta), v_slc, keys, compressed["compress_v"], gates, nsa,
        q_cmp=q_cmp, k_win=oracle.rotate(k_win, positions, theta), v_win=v_win,
    )  # fmt: skip
    return out[0].transpose(1, 0, 2).reshape(len(hidden), heads * dim) @ weights["to_out.weight"].T


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("branch_kv", ["independent", "shared"])
@pytest.mark.parametrize("compress_rope", ["none", "block"])
def test_a_layer_is_the_definition(compress: str, branch_kv: str, compress_rope: str) -> None:
    config = with_nsa(compress=compress, branch_kv=branch_kv, compress_rope=compress_rope)
    layer = SparseAttention(config, "torch").double().eval()
    randomise(layer)
    for tokens in (1, 3, 45):
        x = torch.randn(1, tokens, config.dim, dtype=torch.float64)
        rotary, positions = Rotary(config.dim_head, 100.0), torch.arange(tokens)
        with torch.no_grad():
            got = layer(x, Geometry(rotary, positions, rotary.cos_sin(positions)))
        # The model's angles are float32, the oracle's float64.
        assert_close(got[0], by_definition(layer, config, x, 100.0), 1e-5)


def test_an_open_selected_branch_is_the_dense_model() -> None:
    """Same weights, everything selected, gates 0 1 0: the logits of dense attention."""
    for branch in (1, 2):
        far = replace(SPARSE, rope_theta=50.0)
        sparse = random_model(with_nsa(far, branch_kv="shared", num_selected=20, window=200))
        dense = random_model(replace(DENSE, rope_theta=50.0))
        state = sparse.state_dict()
        assert dense.state_dict().keys() <= state.keys(), "weights do not convert by name"
        dense.load_state_dict({name: state[name] for name in dense.state_dict()})
        gates = torch.full((sparse.config.heads, 3), -1e4, dtype=torch.float64)
        gates[:, branch] = 1e4
        with torch.no_grad():
            for block in sparse.layers:
                block.attn.to_gates.weight.zero_()
                block.attn.to_gates.bias.copy_(gates.flatten())
            ids = random_ids(2)
            assert_close(sparse(ids), dense(ids), 1e-6)


def test_gates_start_alive_and_open_the_branches_in_order() -> None:
    model = build_model(SPARSE)
    with record(model) as layers, torch.no_grad():
        model(random_ids(2))
    for layer in layers:
        assert layer.gates.shape == (2, 4, 109, 3)
        assert layer.gates.min() > 0.2
        assert layer.gates.max() < 0.8


def test_gate_means_are_those_of_the_last_training_pass() -> None:
    model = random_model(SPARSE)
    assert model.gate_means() == []
    model(random_ids(2))
    assert model.gate_means() == [], "an evaluation pass left means behind"
    model.train()
    with record(model) as layers:
        model(random_ids(2))
    means = model.gate_means()
    assert len(means) == SPARSE.depth
    for mean, layer in zip(means, layers, strict=True):
        assert mean == pytest.approx(layer.gates.mean((0, 1, 2)).tolist(), abs=1e-6)
    dense = random_model(DENSE).train()
    dense(random_ids())
    assert dense.gate_means() == []


def test_recording_ends_with_its_block_even_after_an_error() -> None:
    model, ids = random_model(SPARSE), random_ids()
    with record(model) as layers:
        model(ids)
    model(ids)
    assert [layer.layer for layer in layers] == [0, 1]
    assert not any(layer.q_cmp.requires_grad or layer.gates.requires_grad for layer in layers)
    with pytest.raises(RuntimeError, match="stop"), record(model) as layers:
        raise RuntimeError("stop")
    model(ids)
    assert layers == []
