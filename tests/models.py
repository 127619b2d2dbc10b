"""Small models with every parameter randomised: zeros and ones of an initialisation hide bugs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nsa_cli.config import ModelConfig, NSAConfig
from nsa_cli.model import Transformer, build_model

NSA = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=5, window=12)
"""14 selection blocks at TOKENS, two free places."""

TOKENS = 109
SPARSE = ModelConfig(vocab_size=31, dim=16, depth=2, heads=4, kv_heads=2, dim_head=8, context=128, nsa=NSA)
DENSE = replace(SPARSE, nsa=None)


def with_nsa(config: ModelConfig = SPARSE, **changes: Any) -> ModelConfig:
    assert config.nsa is not None
    return replace(config, nsa=replace(config.nsa, **changes))


def random_model(config: ModelConfig, *, dtype: torch.dtype = torch.float64, std: float = 0.4) -> Transformer:
    """In evaluation mode; float64 unless told, so that a leak shows and rounding does not."""
    model = build_model(config, dtype=dtype).eval()
    randomise(model, std)
    return model


def randomise(model: torch.nn.Module, std: float = 0.4) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)


def random_ids(batch: int = 1, tokens: int = TOKENS, vocab: int = 31) -> Tensor:
    return torch.randint(vocab, (batch, tokens))
