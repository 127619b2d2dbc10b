"""MFU: tokens a second, the model's own FLOPs of a token and the devices' peak, and null where that is not known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nsa_cli.training.loop as loop
from nsa_cli.cli import output
from nsa_cli.model.accounting import model_flops_per_token
from nsa_cli.model.peaks import named_peak, peak_flops
from nsa_cli.training.distributed import Team
from tests.training_runs import Told, model_config, run, steps, text_corpus


class Together(Team):
    """Several processes of which this one needs none: it exchanges nothing with them."""

    @property
    def alone(self) -> bool:
        return True


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_mfu_is_the_share_of_all_devices_peaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: bool, world: int
) -> None:
    asked = []

    def peak(device: torch.device, dtype: torch.dtype) -> float:
        asked.append((device.type, dtype))
        return 1e9

    monkeypatch.setattr(loop, "peak_flops", peak)
    config = {"steps": 3, "eval_every": 0}
    run(tmp_path, text_corpus(tmp_path), sparse=sparse, dtype=torch.bfloat16, config=config, team=Together(world=world))
    assert asked == [("cpu", torch.bfloat16)]
    flops = model_flops_per_token(model_config(sparse)).necessary
    for line in steps(tmp_path):
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * flops / (world * 1e9), rel=1e-3, abs=1e-4)
        assert line["mfu"] > 0


def test_without_a_known_peak_mfu_is_null_and_not_shown(tmp_path: Path) -> None:
    told = Told()
    run(tmp_path, text_corpus(tmp_path), config={"steps": 1, "eval_every": 0}, reporter=told)
    assert steps(tmp_path)[0]["mfu"] is told.lines[0]["mfu"] is None
    assert output._speed({"tokens_per_s": 1234.5, "mfu": None}) == "1,234 tok/s"
    assert output._speed({"tokens_per_s": 380000.0, "mfu": 0.4321}) == "380,000 tok/s  MFU 43.2%"
    assert output._speed({}) == ""


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "peak"),
    [
        ("NVIDIA H200", torch.bfloat16, False, 989.4e12),
        ("NVIDIA H200", torch.float32, False, 66.9e12),
        ("NVIDIA H200", torch.float32, True, 494.7e12),
        ("NVIDIA H200", torch.float64, False, None),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, True, 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, False, None),
        ("Some GPU of next year", torch.bfloat16, False, None),
    ],
)
def test_a_peak_is_that_of_the_whole_name_and_the_number_format(
    name: str, dtype: torch.dtype, tf32: bool, peak: float | None
) -> None:
    assert named_peak(name, dtype, tf32=tf32) == pytest.approx(peak)


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) is None
