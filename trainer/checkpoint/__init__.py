"""Checkpoints of format 1: safetensors and JSON, committed by one rename, read into any layout.

`pieces` says what a rank holds; `store` saves (`staging`, `share`, `files`, `assemble`, `messages`, `disk`); `shelf`
lists, keeps and deletes; `manifest` is what a checkpoint says of itself; `plan` and `load` bring it back.
"""
