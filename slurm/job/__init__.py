"""What runs inside a job, and what runs after it."""
