"""Format 1: what lies in a checkpoint, and how its files are written and read back."""
