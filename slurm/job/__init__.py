"""What runs in a job, and what follows it."""
