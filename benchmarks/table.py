"""Every benchmark prints a Markdown table and writes its rows with `--json FILE`."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any


def show(title: str, rows: list[dict[str, Any]], json_path: str | None) -> None:
    """Print rows as a Markdown table under what it was measured with."""
    print(f"\n{title} ({about()})\n")
    keys = list(rows[0])
    print("| " + " | ".join(keys) + " |")
    print("|" + "---|" * len(keys))
    for row in rows:
        print("| " + " | ".join(_text(row[key]) for key in keys) + " |", flush=True)
    if json_path:
        Path(json_path).write_text(json.dumps({"title": title, "about": about(), "rows": rows}, indent=1) + "\n")


def about() -> str:
    import torch

    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    return f"{device}, torch {torch.__version__}, commit {run.stdout.strip() or 'unknown'}"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
