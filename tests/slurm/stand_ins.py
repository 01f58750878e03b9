"""Stand-ins for Slurm's commands, for tests without a cluster, and our verbs called with them."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from pathlib import Path
from unittest.mock import patch

from slurm.__main__ import main

SLURM = {"squeue": "!slurm_load_jobs error: Invalid job id specified", "sacct": "", "scontrol": "!none", "scancel": ""}


def in_queue(job: str, state: str = "RUNNING", reason: str = "None", folder: Path = Path("/none")) -> str:
    """A line of squeue in the format that we ask for."""
    left = "10:00" if state == "RUNNING" else "20:00"
    return f"{job}|{job}|{state}|{reason}|2|node[1-2]|{left}|0|{folder}/slurm/%j_0_log.out|"


def commands(place: Path, **answers: str) -> dict[str, str]:
    """An environment with only these of Slurm's commands, which give these answers. `!words` is an error."""
    place.mkdir(exist_ok=True)
    for name, answer in answers.items():
        (place / f"{name}.txt").write_text(answer.removeprefix("!"))
        failed = ">&2; exit 1" if answer.startswith("!") else ""
        script = f'#!/bin/sh\necho "$0 $*" >> {place}/asked\n/bin/cat {place}/{name}.txt {failed}\n'
        (place / name).write_text(script)
        (place / name).chmod(0o755)
    return {**{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}, "PATH": str(place)}


def verb(folder: Path, *words: str, **answers: str) -> subprocess.CompletedProcess[str]:
    """Run a verb as if typed in `folder`, with these answers of Slurm. In this process, for speed."""
    out, err = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
    with (
        patch.dict(os.environ, commands(folder / "bin", **answers), clear=True),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main(list(words))
    return subprocess.CompletedProcess(words, code, out.buffer.getvalue().decode(), err.getvalue())  # type: ignore[attr-defined]
