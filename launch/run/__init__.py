"""`python -m launch run`: one node's share of a run, supervised."""
