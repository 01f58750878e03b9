"""Which checkpoints stay, and how a damaged one is repaired."""
