"""Peak arithmetic rates of GPUs, for MFU. A GPU that is not listed has no MFU: a wrong peak is worse than none."""

from __future__ import annotations

import torch

# Dense bf16 tensor-core rates in TFLOP/s by the vendors' data sheets (without sparsity), by words of the device's name.
# The first row whose words all occur decides, so narrower names come first.
BF16_TFLOPS: list[tuple[tuple[str, ...], float]] = [
    (("GB200",), 2500.0),
    (("B200",), 2250.0),
    (("H200",), 989.0),
    (("GH200",), 989.0),
    (("H100", "NVL"), 835.0),
    (("H100", "PCIe"), 756.0),
    (("H100",), 989.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("H800",), 989.0),
    (("L40S",), 362.0),
    (("A40",), 149.7),
    (("A10G",), 70.0),
    (("A10",), 125.0),
    (("L4",), 121.0),
]


def peak_flops_per_s(device: torch.device, compute: str) -> float | None:
    """Peak of one device in FLOP/s for bf16; None for a CPU, another precision, or a GPU that is not listed."""
    if device.type != "cuda" or compute != "bf16":
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    words = name.replace("-", " ").split()
    for needed, tflops in BF16_TFLOPS:
        if all(word in words for word in needed):
            return tflops * 1e12
    return None
