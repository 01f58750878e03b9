"""What a run looks like from outside: watched, reported, read from its folder."""
