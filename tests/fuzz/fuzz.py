"""The coverage-guided fuzzer: `python tests/fuzz/fuzz.py manifest -max_total_time=300 tests/fuzz/corpus/manifest`.

Needs atheris (pip install atheris), which nothing else needs; `python -m tests.fuzz` runs without it. The kinds and
targets are the same. Inputs that it finds are written to the folder named first. Options are libFuzzer's.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris  # type: ignore[import-not-found]
import torch  # noqa: F401 - imported here, so that it is not instrumented

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
with atheris.instrument_imports(include=["configs", "trainer", "launch", "slurm", "tests.fuzz"]):
    from tests.fuzz.kinds import KINDS


def main() -> None:
    kind = KINDS[sys.argv[1]]

    def target(data: bytes) -> None:
        kind.target(data)

    def mutate(data: bytes, limit: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return bytes(atheris.Mutate(data, limit)) if rng.random() < 0.2 else kind.mutate(rng, [data])[:limit]

    atheris.Setup([sys.argv[0], *sys.argv[2:]], target, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
