"""`python -m launch run`: run one node's share of a run under supervision."""
