"""The coverage-guided fuzzer: `python tests/fuzz/fuzz.py manifest -max_total_time=300 tests/fuzz/corpus/manifest`.

Needs atheris (pip install atheris), which nothing else does. What it finds is written to the folder named first; the
seeds kept in tests/fuzz/corpus are replayed by every test run. Options are libFuzzer's.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

import atheris  # type: ignore[import-not-found]
import torch  # noqa: F401 - not instrumented

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
with atheris.instrument_imports(include=["trainer.checkpoint", "tests.fuzz"]):
    from tests.fuzz.targets import TARGETS

ODD: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        63,
        64,
        1 << 31,
        (1 << 62) - 1,
        1 << 62,
        1 << 63,
        1 << 64,
        10**400,
        0.5,
        1e308,
        float("nan"),
        float("-inf"),
    ),
    *("", "a", "F32", "BF16", "model", "optim", "../x", "model/../x.safetensors", "/etc/passwd", "\u0000", "\ud800"),
    *([], {}, [[]], [0], [1], {"file": 0, "start": 0, "length": 1}, {"file": 0, "offsets": [0], "sizes": [1]}),
]


def mutate_json(data: bytes, limit: int, seed: int) -> bytes:
    """One change of the tree, or of the bytes where there is no tree."""
    rng = random.Random(seed)
    prefix, text = (data[:8], data[8:-2]) if sys.argv[1] == "header" else (b"", data)
    try:
        tree = json.loads(text)
        if not isinstance(tree, dict) or rng.random() < 0.2:
            raise ValueError
        _change(tree, rng)
        text = json.dumps(tree, separators=(",", ":"), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return bytes(atheris.Mutate(data, limit))
    if sys.argv[1] == "header":
        text = text.ljust(-(-(len(text) + 8) // 64) * 64 - 8)
        return (len(text).to_bytes(8, "little") if rng.random() < 0.9 else prefix) + text + data[-2:]
    return text[:limit]


def _change(tree: Any, rng: random.Random) -> None:
    nodes = [tree]
    for node in nodes:
        nodes += [
            child for child in (node.values() if isinstance(node, dict) else node) if isinstance(child, dict | list)
        ]
    node = rng.choice([n for n in nodes if n] or [tree])
    if not node:
        return
    key = rng.choice(sorted(node) if isinstance(node, dict) else range(len(node)))
    what = rng.randrange(6)
    if what == 0:
        node[key] = copy.deepcopy(rng.choice(ODD))
    elif what == 1 and isinstance(node[key], int):
        node[key] += rng.choice([-1, 1, 64, -64, 1 << 61])
    elif what == 2:
        del node[key]
    elif what == 3 and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    elif what == 4 and isinstance(node, dict):
        node[rng.choice(["a", "b", "", key + "x", "files", "sources"])] = copy.deepcopy(node[key])
    else:
        node[key] = copy.deepcopy(rng.choice(nodes))  # a copy of the whole in a part of it is fine


def main() -> None:
    target = TARGETS[sys.argv[1]]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target, custom_mutator=mutate_json)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
