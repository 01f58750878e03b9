"""Every benchmark prints a Markdown table and writes its rows with `--json FILE`."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any


def show(title: str, rows: list[dict[str, Any]], json_path: str | None, device: str | None = None) -> None:
    """Print rows as a Markdown table, under a line that says on which machine they were measured."""
    device = device or about()
    print(f"\n{title} ({device})\n")
    keys = list(rows[0])
    print("| " + " | ".join(keys) + " |")
    print("|" + "---|" * len(keys))
    for row in rows:
        print(line(row), flush=True)
    write_rows(json_path, title, device, rows)


def line(row: dict[str, Any]) -> str:
    return "| " + " | ".join(_text(value) for value in row.values()) + " |"


def write_rows(json_path: str | None, title: str, device: str, rows: list[dict[str, Any]]) -> None:
    """Write the file whole or not at all, so that a benchmark that is killed keeps the rows it wrote before."""
    if json_path:
        temporary = Path(f"{json_path}.new")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"title": title, "about": device, "rows": rows}, indent=1) + "\n")
        temporary.replace(json_path)


def about() -> str:
    import torch

    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"
    return f"{device}, torch {torch.__version__}, commit {run.stdout.strip() or 'unknown'}"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
