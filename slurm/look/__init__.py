"""Look at runs and jobs, read their logs, and stop them."""
