"""Saving: every rank writes its share, and rank 0 commits."""
