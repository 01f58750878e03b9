"""From documents to batches: tokenise once into memory-mapped files, then draw samples in one global order.

`prepare` (rank 0) writes the cache, `Prepared` (every rank) maps it, `Order` says which sample stands at which
position, `Loader` turns positions into tensors ahead of time. The whole position of a run is one integer,
`consumed_samples`.
"""
