"""DeepSpeed ZeRO behind the engines' protocol."""
