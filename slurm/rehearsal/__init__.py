"""A real Slurm cluster on this machine, to rehearse on."""
