"""`python -m muster VERB ...`: the same as `muster VERB ...`."""

from muster import script

if __name__ == "__main__":
    script()
