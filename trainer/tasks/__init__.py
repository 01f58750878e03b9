"""What is learned: one file per task."""
