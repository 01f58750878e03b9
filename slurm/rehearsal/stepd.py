"""Starts slurmstepd on a rehearsal cluster, and makes it the parent of orphans.

Without cgroups Slurm finds the processes of a job by their parents, and would lose the workers of a killed launcher.
This is run by its path, outside the package, so it imports nothing of ours.
"""

import ctypes
import os
import shutil
import sys

_PR_SET_CHILD_SUBREAPER = 36

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    program = shutil.which("slurmstepd", path="/usr/sbin:/usr/local/sbin:/usr/lib/slurm:/usr/libexec/slurm")
    if program is None:
        sys.exit("slurmstepd is not installed")
    os.execv(program, ["slurmstepd", *sys.argv[1:]])
