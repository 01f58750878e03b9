"""Muster on Slurm: submit and watch jobs, rehearse on a cluster of one machine. Nothing here imports torch."""
