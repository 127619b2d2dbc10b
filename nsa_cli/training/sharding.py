"""`--parallel fsdp`: weights, gradients and moments in shards, one a process (FSDP2), and whole again in the files.

A block's weights are gathered for its forward and its backward and let go after each; the embedding and the last norm stay for
the whole pass. Each micro-batch's gradients are reduced at once, so that no process ever holds all of them. A state and a
checkpoint hold whole tensors under the model's own names, as those of one process do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nsa_cli.config import TrainConfig
from nsa_cli.model import Transformer
from nsa_cli.model.transformer import Block
from nsa_cli.training.optim import make_optimizer, moments


def shard(
    model: Transformer, optimizer: torch.optim.AdamW, config: TrainConfig, *, device: torch.device, world: int, dtype: torch.dtype
) -> torch.optim.AdamW:
    """Shards the model in place, from whole weights that every process has, onto its device; the optimizer of the shards
    comes back, with the moments of the old one.

    dtype: of the arithmetic. For bfloat16 the blocks' weights travel as such, and gradients as float32: autocast would
    round them there anyway. The residual stream between the blocks keeps its own dtype.
    """
    named = moments(model, optimizer)
    mesh = init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy()
    if dtype is torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        assert isinstance(block, Block)
        if dtype is torch.bfloat16:  # the fused norm wants weights like the residual stream's
            fully_shard([block.attn_norm, block.ff_norm], mesh=mesh)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    sharded = make_optimizer(model, config)
    if named:
        _set_moments(model, sharded, named)
    return sharded


def gather(model: Transformer, optimizer: torch.optim.AdamW) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and moments, whole, on the CPU of process 0; nothing on the others, which all have to call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: Any = get_model_state_dict(model, options=options)
    if not optimizer.state:
        return weights, {}  # asked for moments before the first step, torch would make some, of a step that never was
    states: Any = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})
    return weights, {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}


def _set_moments(model: Transformer, optimizer: torch.optim.AdamW, named: dict[str, Tensor]) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in named.items():
        parameter, _, key = name.rpartition(".")
        states.setdefault(parameter, {})[key] = value
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{**group, "params": [names[each] for each in group["params"]]} for group in optimizer.param_groups]
    state: Any = {"state": states, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
