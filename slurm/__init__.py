"""Muster on Slurm: today the job scripts in `examples/`."""
