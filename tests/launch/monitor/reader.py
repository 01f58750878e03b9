"""Reads the GPUs once for each line of its input, and prints the readings; see standin.py."""

from __future__ import annotations

import json
import sys
from typing import Any

from launch.monitor import gpus as module
from launch.monitor import readings

told: list[dict[str, Any]] = []


def tell(event: str, line: str | None, **facts: Any) -> None:
    told.append({"event": event, "line": line, **facts})


gpus = module.Gpus(tell, "auto")
for command in sys.stdin:
    if command.strip() == "again":  # read slow readings, and ask again for lost ones, at once
        readings.NOW_AND_THEN_S = module._AGAIN_S = 0.0
        gpus._again_s = 0.0
    rows = gpus.read()
    readings.NOW_AND_THEN_S, module._AGAIN_S = 10.0, 60.0
    print(json.dumps([rows, told]), flush=True)
    told.clear()
