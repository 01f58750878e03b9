"""Muster on Slurm: a cluster to rehearse on, and the job scripts in `examples/`. Nothing here imports torch."""
