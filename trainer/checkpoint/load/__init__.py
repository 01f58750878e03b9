"""Open a checkpoint, and load it into any layout."""
