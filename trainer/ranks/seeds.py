"""Seeds as pure functions of what they are for. No random state is ever stored: it is derived again."""

from __future__ import annotations

import hashlib

import torch


def derive(*parts: int | str) -> int:
    """A 63-bit seed from any numbers and words; equal on every machine."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(device: torch.device, *parts: int | str) -> torch.Generator:
    """A generator of its own on `device`, seeded by `derive(*parts)`."""
    return torch.Generator(device=device).manual_seed(derive(*parts))


def seed_micro_batch(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Dropout's generator for one micro batch. Masks are equal at the same layout only.

    Ranks of a tensor group draw differently too: each drops out of tokens and heads that the others do not hold.
    """
    torch.manual_seed(derive(seed, "dropout", step, micro_batch, rank))
