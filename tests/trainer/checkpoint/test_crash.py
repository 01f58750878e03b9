"""Every file operation of a two-rank save is a crash point: after a kill there, the run finds a whole checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import two_ranks

# The calls that strace shows: every one that can change a file or a folder, ours or not.
TRACED = (
    "mkdir,mkdirat,open,openat,openat2,creat,write,pwrite64,writev,pwritev,pwritev2,fsync,fdatasync,sync,syncfs,"
    "sync_file_range,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,truncate,ftruncate,"
    "fallocate,chmod,fchmod,fchmodat,chown,fchown,fchownat,utimensat,copy_file_range,sendfile,splice,mknod,mknodat"
)
# The system calls that the disk layer's operations make.
AS_CALL = {"create": "openat", "fsync_dir": "fsync"}


def traced_calls(trace: str, folder: str) -> Counter[str]:
    """Calls between the marks that name a path below `folder`. An open counts only if it makes or empties a file: a
    file that is only locked is opened for writing, too."""
    calls: Counter[str] = Counter()
    counting = False
    for line in trace.splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if call is None:
            continue
        name, arguments = call.groups()
        if "/mark-" in arguments and name.startswith("mkdir"):
            counting = "/mark-begin" in arguments
        elif counting and re.search(re.escape(folder) + r"[/\">]", arguments):
            changes = not name.startswith("open") or re.search(r"O_CREAT|O_TRUNC", arguments)
            calls[name] += 1 if changes else 0
    return +calls


def told_by(program: ModuleType, what: str, folder: Path, prefix: list[str] | None = None) -> Any:
    """Run a program of this folder, and return the JSON that it printed."""
    command = [*(prefix or []), sys.executable, str(program.__file__), what, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_the_counted_operations_are_all_there_are(tmp_path: Path) -> None:
    """strace sees the same save from outside. No operation bypasses the disk layer, so no crash point is missed."""
    strace = shutil.which("strace")
    assert strace, "strace is needed to count system calls (apt-get install strace)"
    trace = tmp_path / "trace"
    options = ["-f", "-y", "--seccomp-bpf", "-e", f"trace={TRACED}", "-o", str(trace)]
    names = told_by(two_ranks, "names", tmp_path, [strace, *options])
    expected = Counter(AS_CALL.get(name, name) for rank in names for name in rank)
    found = traced_calls(trace.read_text(), str(tmp_path / "run"))
    print(f"crash points of a two-rank save: {len(names[0])} + {len(names[1])}; strace counts {found.total()}")
    assert found == expected


def test_killed_at_every_operation(tmp_path: Path) -> None:
    """SIGKILL right before and right after each operation of each rank. The old checkpoint or the new one is whole, and
    the rename alone decides which."""
    result = told_by(two_ranks, "kill", tmp_path)
    names, found = result["names"], result["found"]
    commit = names[0].index("rename")
    points = len(names[0]) + len(names[1])
    print(f"{points} crash points, each before and after: steps found {dict(Counter(step for *_, step in found))}")
    assert len(found) == 2 * points
    for victim, point, after, step in found:
        if victim == 0:
            assert step == (2 if point + after > commit else 1), (point, after)
    assert {step for *_, step in found} == {1, 2}
