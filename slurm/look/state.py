"""The state of a run in a word, from its folder and from what Slurm knows about its job."""

from __future__ import annotations

from collections.abc import Sequence

from launch.look.run_folder import Outcome, RunView, running
from launch.look.text import age_text
from launch.monitor.rows import age_s
from slurm.look.queue import Job, Life, Queue
from trainer.life.rows import amount, whole

_SILENT_S = 300.0  # without a row; ten steps are added


def job_of(view: RunView, answer: Queue) -> Job | None:
    """The job in the queue that has this run."""
    return next((answer.jobs[number] for number in view.jobs if number in answer.jobs), None)


def unexplained(view: RunView, answer: Queue) -> str | None:
    """The job whose end the folder does not tell: the job died, or never began an attempt."""
    if not view.jobs or job_of(view, answer) is not None:
        return None
    number, newest = view.submitted or view.jobs[0], view.newest
    told = newest is not None and newest.reason is not None and newest.job in (number, None)
    outcome = _last_outcome(view)
    # A task of an array records its outcome under its own job number.
    told = told or (outcome is not None and (outcome.job == number or "_" in number))
    return None if told else number


def _last_outcome(view: RunView) -> Outcome | None:
    """The outcome of the last life, unless the newest attempt began in a later one."""
    newest = view.newest.number if view.newest is not None else -1
    return next((outcome for outcome in view.outcomes[-1:] if outcome.attempt >= newest), None)


def is_alive(view: RunView, answer: Queue) -> bool:
    """Whether the run is in the queue or, as far as this node can tell, one of its processes runs."""
    if job_of(view, answer) is not None:
        return True
    holder = view.holder
    return holder is not None and bool(holder.alive) and (holder.job is None or answer.silent is not None)


def may_live(view: RunView, answer: Queue) -> bool:
    """Whether another node holds the run and may run it, which this node cannot find out."""
    holder = view.holder
    return holder is not None and holder.alive is None and (holder.job is None or answer.silent is not None)


def state_of(view: RunView, answer: Queue, past: Sequence[Life]) -> str:
    """The state of the run. `past`: the lives of the job that is `unexplained`."""
    job = job_of(view, answer)
    if job is not None and job.state != "RUNNING":
        reason = f" ({job.reason})" if job.state == "PENDING" and job.reason not in ("None", "") else ""
        return job.state.lower() + reason
    return _running(view) if is_alive(view, answer) else _over(view, answer, past)


def _running(view: RunView) -> str:
    newest, holder, row = view.newest, view.holder, view.row
    if view.stop_asked:
        return "stopping"
    if newest is not None and newest.reason is not None and not newest.requeue and newest.reason != "failed":
        begun_anew = holder is not None and (holder.attempt or 0) > newest.number
        return "starting" if begun_anew else "ending"
    if newest is None or holder is None or (holder.attempt or 0) > newest.number:
        return "starting"
    if newest.reason is not None:
        return "restarting" if newest.reason == "failed" else "ending"
    if whole(row, "attempt") != newest.number:
        return running(view.phase, stepped=False)
    silent_s = age_s(view.folder.metrics)
    if silent_s > max(_SILENT_S, 10 * (amount(row, "step_s") or 0.0)):
        return f"no step for {age_text(silent_s)}" + (f" ({view.phase})" if view.phase is not None else "")
    return running(view.phase, stepped=True)


def _over(view: RunView, answer: Queue, past: Sequence[Life]) -> str:
    newest, holder = view.newest, view.holder
    if holder is not None and may_live(view, answer):
        return f"held by {holder.node or 'another node'}"
    if past:
        code = past[-1].exit_code.partition(":")[0]
        return past[-1].state.lower() + (f" (exit code {code})" if code not in ("0", "") else "")
    for end in (_last_outcome(view), newest):
        if end is not None and end.reason is not None:
            return end.reason + (f" ({end.cause})" if end.cause else "")
    return "died" if newest is not None else "never began"
