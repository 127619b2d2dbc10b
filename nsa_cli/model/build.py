"""THE builder: every command, test and script makes its model here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nsa_cli.config import ModelConfig
from nsa_cli.model.transformer import Transformer
from nsa_cli.ops.dispatch import kernel_refusal, resolve_kernel


class _Undrawn(TorchFunctionMode):
    """Weights stay as they are: the meta device's have no numbers, and drawing them would load torch's compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is nn.init.normal_:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def build_model(
    config: ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    kernel: str = "auto",
    weights_device: str | torch.device | None = None,
) -> Transformer:
    """A freshly initialised model, dense if config.nsa is None, in training mode.

    Weights are drawn on the CPU from torch's global generator, whatever the device: a seed gives one model everywhere.
    weights_device: where the weights lie, if not on the `device` that they will be moved to. dtype: of the weights.
    kernel: auto, torch, flex or triton, for the sparse branches.
    Raises ValueError for an unknown kernel, NsaError (exit 5) for one that cannot run on the device,
    or cannot compute this geometry.
    """
    device = torch.device(device)
    name, _ = resolve_kernel(kernel, device) if config.nsa is not None else ("torch", None)
    if config.nsa is not None:
        refusal = kernel_refusal(name, config.nsa, dim=config.dim_head, group=config.group, dtype=dtype)
        if refusal is not None and kernel != "auto":
            raise refusal
        name = "torch" if refusal is not None else name
    meta = device.type == "meta"
    with torch.device("meta" if meta else "cpu"), _Undrawn() if meta else nullcontext():
        model = Transformer(config, name)
    if not meta:
        model.rotary.to(device)
    return model.to(device=device if weights_device is None else weights_device, dtype=dtype)
