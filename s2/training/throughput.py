"""Tokens per second, MFU and memory.

MFU is achieved over peak dense bf16 FLOP/s of the device. Two numerators, both counting forward and backward once
(recomputation is not work) and attention with its causal half only:

    dense-equivalent  what a dense model of this shape would have needed: comparable with other repositories
    executed          what the sparse pattern really needs: how busy the device is

Both count a training sequence as one document. Where documents are shorter and attention stops at their borders, the
work is less, and both figures are upper bounds.
"""

from __future__ import annotations

import resource
import sys

import torch

# Dense (no 2:4 sparsity) bf16 peak in FLOP/s from the vendors' data sheets, matched as a part of the device name.
PEAK_BF16_FLOPS = {
    "B300": 2.25e15,
    "B200": 2.25e15,
    "GB200": 2.5e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a device by name; None for an unknown one, and then MFU is left out of the log.

    The longest name in the table that occurs in `device_name` wins, so that H100 PCIe is not read as H100.
    """
    matches = [name for name in PEAK_BF16_FLOPS if name.lower() in device_name.lower()]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None


def device_peak(device: torch.device) -> float | None:
    """`peak_flops` of a torch device; a CPU has none."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far in GiB: allocated on a CUDA device, resident of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / 2**30


def clock(seconds: float) -> str:
    """1:02:03"""
    whole = max(round(seconds), 0)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
