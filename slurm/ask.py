"""Ask Slurm: every call of one of its commands is here."""

from __future__ import annotations

import os
import subprocess

from configs.errors import UserError
from trainer.host.inherited import without_job


def ask(*command: str, script: str | None = None, timeout_s: float = 60.0, **more: str) -> str:
    """What one of Slurm's commands prints. Raises UserError with Slurm's words. `more`: environment variables."""
    try:
        done = subprocess.run(
            command,
            input=script,
            env=without_job(os.environ) | more,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]}: {error}") from error
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        told = words[-1].strip().removeprefix(f"{command[0]}: ") if words else f"exit code {done.returncode}"
        raise UserError(f"{command[0]}: {told}")
    return done.stdout


def facts_of(line: str) -> dict[str, str]:
    """`key=value` words of a line of `scontrol --oneliner`. A value with blanks is cut at its first blank.

    A person chooses a job's name and its comment, and they may hold such words too. So the name is left out. Of equal
    keys the first counts: Slurm's own keys come before the comment.
    """
    before, _, after = line.partition(" JobName=")
    facts: dict[str, str] = {}
    for word in (before + " UserId=" + after.partition(" UserId=")[2] if after else line).split():
        key, equals, value = word.partition("=")
        if equals:
            facts.setdefault(key, value)
    return facts
