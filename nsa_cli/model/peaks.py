"""What a device can do at most, from its maker's data sheet: the denominator of MFU (model FLOPs utilisation).

Dense rates, those without structured sparsity. A device that is not in the table has no peak, and its runs no MFU: a CPU's
depends on clocks and instructions that nobody states, and a slice of a GPU (MIG) has a share that its name does not tell.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class Peaks(NamedTuple):
    """TFLOP/s of dense matrix products: bfloat16 on tensor cores (float32 sums), TF32 on tensor cores, plain float32."""

    bf16: float
    tf32: float
    fp32: float


_SXM, _NVL = Peaks(989.4, 494.7, 66.9), Peaks(835.5, 417.5, 60.0)
NVIDIA = {
    r"H200|H100 80GB HBM3|GH200 \d+GB": _SXM,
    r"H[12]00 NVL": _NVL,
    r"H100 PCIe": Peaks(756.0, 378.0, 51.2),
    r"A100.SXM4.\d+GB|A100.PCIE.\d+GB|A100 80GB PCIe": Peaks(312.0, 156.0, 19.5),
    r"L40S": Peaks(362.0, 183.0, 91.6),
    r"A40": Peaks(149.7, 74.8, 37.4),
    r"A10": Peaks(125.0, 62.5, 31.2),
    r"L4": Peaks(121.0, 60.0, 30.3),
    r"GeForce RTX 4090": Peaks(165.2, 82.6, 82.6),
    r"GeForce RTX 3090": Peaks(71.0, 35.6, 35.6),
}
"""By the name that CUDA gives the device, less "NVIDIA ", all of it: an "RTX 4090 Laptop GPU" is another device."""


def named_peak(name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Peak FLOP/s of a CUDA device by its name, None if it is not known.

    bfloat16 (autocast too): bf16 on tensor cores. float32: plain float32, or TF32 on tensor cores where products may use
    it. Of float64 no peak is kept.
    """
    for pattern, peaks in NVIDIA.items():
        if re.fullmatch(pattern, name.removeprefix("NVIDIA ")):
            known = {torch.bfloat16: peaks.bf16, torch.float32: peaks.tf32 if tf32 else peaks.fp32}
            return known[dtype] * 1e12 if dtype in known else None
    return None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one device for arithmetic in dtype, as `named_peak`; None for a CPU.

    float32 counts as TF32 where torch.set_float32_matmul_precision allows it; by default it does not.
    """
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return named_peak(torch.cuda.get_device_name(device), dtype, tf32=tf32)
