"""The sections of a config, one file each. No torch.

Every field says what it does, its unit stands in its name, and `result` or `speed` says whether it changes what is
learned or only how fast. The `result` fields make the fingerprint: a run folder continues only under the same one.
"""
