"""Which environment variables Slurm's commands must not see. No torch.

Inside a job, variables describe that job: its memory, its time, its GPUs. `sbatch` would take some of them as options
that win over the script. It would pass the others to the new job, where `srun` would take them as options. Outside a
job, a person may have set variables (SQUEUE_FORMAT, SLURM_TIME_FORMAT, SQUEUE_PARTITION) that change the answers.
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
# The cluster that a person means. Inside a job it may be left from a submission to several clusters, so the node's own
# cluster is asked there.
CLUSTERS = "SLURM_CLUSTERS"
_DEVICES = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without variables that describe a job, or that change what Slurm's commands do."""
    inside = "SLURM_JOB_ID" in environment
    gone, kept = (_DEVICES, NEEDED) if inside else ((), (*NEEDED, CLUSTERS))
    return {k: v for k, v in environment.items() if k in kept or not (k.startswith(_PREFIXES) or k in gone)}
