"""A job before the queue: asked for, checked, its code copied, its script."""
