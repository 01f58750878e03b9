"""Rotary positions, in the rotate-half convention of Hugging Face (the two halves of a head turn together)."""

import math

import torch
from torch import Tensor

from configs.schema.model import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Radians per position of each pair of channels: (head_dim / 2,) fp32, highest first."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_seq_len * frequencies / (2 * math.pi)  # full turns over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: many turns, unchanged; 0: few turns, slowed by the factor
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions (B or 1, T). Each is (B or 1, T, 1, head_dim / 2) fp32."""
    angles = positions[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, T, heads, head_dim) by its tables. Computed in the tables' fp32, returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
