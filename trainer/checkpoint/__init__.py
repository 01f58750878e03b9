"""Checkpoints of format 1: safetensors and JSON, committed by one rename, read into any layout.

`pieces` describes what a rank holds. `store` saves (`staging`, `share`, `files`, `assemble`, `messages`, `disk`).
`shelf` lists, keeps and deletes checkpoints. `manifest` describes a checkpoint. `plan` and `load` load one.
"""
