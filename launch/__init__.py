"""The commands that a person types around a run, such as `python -m launch run`."""
