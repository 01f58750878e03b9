"""What Slurm's commands must not hear of the environment that they are called in. No torch.

Inside a job it tells of that job: its memory, its time, its GPUs. `sbatch` takes some of it for options, over those in
the script, hands on the rest, and `srun` in the new job takes that for options. Outside it may hold what a person likes
to see (SQUEUE_FORMAT, SLURM_TIME_FORMAT, SQUEUE_PARTITION), which changes the answers that are read here.
"""

from __future__ import annotations

from collections.abc import Mapping

_PREFIXES = (
    "SLURM_",
    "SLURMD_",
    "SBATCH_",
    "SALLOC_",
    "SRUN_",
    "SQUEUE_",
    "SINFO_",
    "SACCT_",
    "SCANCEL_",
    "PMI_",
    "PMIX_",
)
NEEDED = ("SLURM_CONF", "SLURM_JWT")  # where the cluster is, and who asks
# Which cluster a person means. In a job it may be left from a submission to several: there the node's own one is asked.
CLUSTERS = "SLURM_CLUSTERS"
_DEVICES = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what tells of a job, or tells Slurm's commands what to do."""
    inside = "SLURM_JOB_ID" in environment
    gone, kept = (_DEVICES, NEEDED) if inside else ((), (*NEEDED, CLUSTERS))
    return {k: v for k, v in environment.items() if k in kept or not (k.startswith(_PREFIXES) or k in gone)}
