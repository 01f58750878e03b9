"""The ranks of a run: how they meet, the collectives that the loop itself needs, and their seeds."""
