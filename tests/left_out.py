"""What could not run on this machine: a line each, said at the end."""

import pytest

LEFT_OUT = pytest.StashKey[set[str]]()
