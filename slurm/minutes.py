"""Times in the forms that Slurm writes."""

from __future__ import annotations

from configs.errors import UserError


def minutes(text: str) -> float | None:
    """Minutes of a time limit as Slurm reads it; None for no limit. Raises UserError."""
    if text.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return None
    days, dash, rest = text.partition("-")
    parts = (rest if dash else text).split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise UserError(f'time {text!r}: write it as Slurm does: "30" minutes, "12:00:00" or "2-00:00:00"')
    numbers = [int(part) for part in parts]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, mins, seconds = (*numbers, 0, 0)[:3]
        return int(days) * 1440 + hours * 60 + mins + seconds / 60
    if len(numbers) == 3:
        return numbers[0] * 60 + numbers[1] + numbers[2] / 60
    return numbers[0] + (numbers[1] / 60 if len(numbers) == 2 else 0)
