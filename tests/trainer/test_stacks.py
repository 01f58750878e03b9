"""Which of torch's records of collectives a hung rank gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from trainer.host.stacks import _flight

EMPTY, MADE = b'{"pg_config":{},"version":"2.10"}', '{"entries":[{"collective_seq_id":1}]}'


def recorders(**dumps: Any) -> Any:
    return SimpleNamespace(**{f"_dump_{name}_trace_json": lambda dump=dump: dump for name, dump in dumps.items()})


def test_the_record_that_has_collectives_is_told() -> None:
    """A torch built for CUDA has two records. On the CPU that of NCCL exists, and is empty."""
    assert _flight(recorders(nccl=EMPTY, fr=MADE)) == MADE.encode()
    assert _flight(recorders(nccl=MADE, fr=EMPTY)) == MADE.encode()
    assert _flight(recorders(nccl=MADE.encode(), fr=MADE)) == MADE.encode()
    assert _flight(recorders(fr=MADE)) == MADE.encode()
    assert _flight(recorders(nccl=EMPTY, fr=EMPTY)) == EMPTY
