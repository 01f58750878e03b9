"""Checkpoints of one kind into another, streaming: Muster, torch.save, torch.distributed.checkpoint, DeepSpeed."""
