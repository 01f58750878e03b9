"""Numbers and tables as all commands print them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.errors import printable


def size_text(count: int) -> str:
    """A number of bytes in decimal units, with three digits."""
    size = float(count)
    if size < 1000:
        return f"{count} B"
    units = iter(("kB", "MB", "GB", "TB"))
    unit = next(units)
    size /= 1000
    while size >= 999.5 and unit != "TB":
        size, unit = size / 1000, next(units)
    return f"{size:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f} {unit}"


def age_text(seconds: float) -> str:
    """An age in one unit: enough to tell checkpoints apart."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def one_line(text: str) -> str:
    """A name for a cell or part of a line. A line break in it is escaped too."""
    return printable(text).replace("\n", "\\n")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], right: str = "") -> list[str]:
    """Lines of aligned columns. The columns named in `right` are aligned to the right."""
    cells = [list(header), *([one_line(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    to_right = [name in right.split(",") for name in header]
    lines = []
    for row in cells:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, to_right, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return lines
