"""Continuing text: filters and noise (sampling), token ids (engine), bytes in and out (text)."""

from __future__ import annotations

from nsa_cli.generation.engine import Continuation, GenerationStats, decode, generate
from nsa_cli.generation.sampling import SamplingConfig
from nsa_cli.generation.text import StreamFilter, TextOptions, run

__all__ = [
    "Continuation",
    "GenerationStats",
    "SamplingConfig",
    "StreamFilter",
    "TextOptions",
    "decode",
    "generate",
    "run",
]
