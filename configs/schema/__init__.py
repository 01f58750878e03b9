"""The sections of a config, one file each. No torch.

Every field has a description, and a unit in its name where it has one. `result` fields change what is learned, `speed`
fields only how fast. The `result` fields make the fingerprint: a run folder continues only under the same fingerprint.
"""
