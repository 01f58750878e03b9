"""Opening a checkpoint, and loading it into any layout."""
