"""Seeds as pure functions of their purpose. No random state is ever stored, since it can be derived again."""

from __future__ import annotations

import hashlib

import torch


def derive(*parts: int | str) -> int:
    """A 63-bit seed from any numbers and words; equal on every machine."""
    text = "\x1f".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(device: torch.device, *parts: int | str) -> torch.Generator:
    """A new generator on `device`, seeded by `derive(*parts)`."""
    return torch.Generator(device=device).manual_seed(derive(*parts))


def seed_micro_batch(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Seed dropout's generator for one micro batch. Masks are equal only in an equal layout.

    Ranks of a tensor group get different seeds too: each holds tokens and heads that the others do not have.
    """
    torch.manual_seed(derive(seed, "dropout", step, micro_batch, rank))
