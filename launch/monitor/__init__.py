"""The monitor: one process per node that records what every GPU, the host and each rank do. No torch, no root."""
