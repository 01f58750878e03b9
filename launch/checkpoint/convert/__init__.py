"""Convert checkpoints by streaming: Muster's, torch.save's, torch.distributed.checkpoint's and DeepSpeed's."""
