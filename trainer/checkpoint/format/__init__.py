"""Format 1: the content of a checkpoint, and how its files are written and read back."""
