"""What a person types around a run: `python -m launch run`."""
