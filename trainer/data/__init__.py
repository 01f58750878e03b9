"""From documents to batches: tokenise once into memory-mapped files, then draw samples in one global order.

`prepare` (rank 0) writes the cache. `Prepared` (every rank) maps it. `Order` tells which sample is at which position.
`Loader` turns positions into tensors ahead of time. The position of a run in its data is one integer,
`consumed_samples`.
"""
