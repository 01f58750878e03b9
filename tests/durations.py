"""The recorded time of each file of tests. Long files start first, so that none of them is the last to end.

`make test ARGS=--record` records the times of a run; `--full --record` records those of all tests.
"""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).with_name("durations.json")
UNKNOWN_S = 5.0


def recorded(tier: str) -> dict[str, float]:
    """File -> seconds, for the tier `quick` or `full`."""
    found: dict[str, dict[str, float]] = json.loads(FILE.read_text("utf-8"))
    return found.get(tier, {})


def record(tier: str, seconds: dict[str, float]) -> None:
    """Record the seconds of these files. Other files keep their recorded times."""
    found = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    known = {name: s for name, s in found.get(tier, {}).items() if (FILE.parent.parent / name).exists()}
    found[tier] = dict(sorted({**known, **{name: round(s, 1) for name, s in seconds.items()}}.items()))
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
