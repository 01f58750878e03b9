"""A folder in which the names of our packages and of libraries mean something else."""

from __future__ import annotations

from pathlib import Path

OURS = ("configs", "models", "trainer", "launch", "slurm", "muster")
LIBRARIES = ("torch", "yaml", "pydantic", "random", "argparse")


def fill(folder: Path, without: str = "") -> None:
    """Write modules, packages and plain folders of all names but one. They end the process that imports them."""
    ends = "raise SystemExit('the wrong module ran')\n"
    for name in {*OURS, *LIBRARIES} - {without}:
        (folder / f"{name}.py").write_text(ends)
    (folder / "configs.py").unlink(missing_ok=True)
    (folder / "configs").mkdir()  # YAML only: Python takes it for a namespace package
    (folder / "configs" / "mine.yaml").write_text("include: demo\n")
    (folder / "models.py").unlink(missing_ok=True)
    (folder / "models").mkdir()
    (folder / "models" / "__init__.py").write_text(ends)
