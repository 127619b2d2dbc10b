"""What a sparse model looked at: statistics over a trace of its own forward pass."""

from __future__ import annotations

from nsa_cli.inspection.prompt import clip_prompt, inspect_prompt
from nsa_cli.inspection.report import (
    CompressedBlock,
    GroupSelection,
    HeadView,
    Inspection,
    QueryView,
    SelectedBlock,
)
from nsa_cli.inspection.statistics import SelectionStatistics

__all__ = [
    "CompressedBlock",
    "GroupSelection",
    "HeadView",
    "Inspection",
    "QueryView",
    "SelectedBlock",
    "SelectionStatistics",
    "clip_prompt",
    "inspect_prompt",
]
