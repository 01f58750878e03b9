"""Look at a run from outside: watch it, report on it, read its folder."""
