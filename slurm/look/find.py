"""Which run a person means, by its folder or by the number of its job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from launch.look import run_folder
from slurm.look import queue

_RUNS = Path("runs")  # where a config without run.dir puts its runs


def folders_named(words: Sequence[str]) -> list[Path]:
    """The run folders that the words name, in order and each once. Raises UserError for a word that names none."""
    found = [folder for word in words for folder in _of_job(word) or _below(word)]
    return list({folder.resolve(): folder for folder in found}.values())


def folder_named(word: str) -> Path:
    """The one run folder that the word names. Raises UserError for none or several."""
    found = folders_named([word])
    if len(found) > 1:
        raise UserError(f"{word}: holds {len(found)} runs; name one, such as {found[0]}")
    return found[0]


def is_job(word: str) -> bool:
    """Whether the word is a job's number: a number, and no folder."""
    return queue.NUMBER.fullmatch(word) is not None and not Path(word).exists()


def _below(word: str) -> list[Path]:
    found = run_folder.runs_in(Path(word))
    if not found:
        raise UserError(f"{word}: neither a run folder nor a folder of runs")
    return found


def _of_job(word: str) -> list[Path]:
    if not is_job(word):
        return []
    below = run_folder.runs_in(_RUNS) if _RUNS.is_dir() else []
    if runs := [folder for folder in below if _had(folder, word)]:
        return runs
    found = queue.folder_of(word)
    runs = run_folder.runs_in(found) if found is not None and found.is_dir() else []
    runs = [run for run in runs if _had(run, word)] or runs  # all tasks of an array have their runs in one folder
    if not runs:
        raise UserError(f"job {word}: its run folder is not known here; name the folder")
    return runs


def _had(folder: Path, number: str) -> bool:
    """Whether this job, or a task of this array, has or had the run."""
    own = any(job == number or job.startswith(f"{number}_") for job in run_folder.view(folder).jobs)
    return own or any((folder / "slurm").glob(f"{number}_*"))
