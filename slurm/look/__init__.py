"""Runs and jobs looked at, read and stopped."""
