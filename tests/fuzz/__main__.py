"""Odd inputs by the thousand: `python -m tests.fuzz --kind all --count 10000 --seed 0`. Needs no atheris.

Inputs that cause a defect are kept in the folder `--keep`. An input moved to tests/fuzz/corpus/KIND is replayed in
every test run. `--replay FILE` calls the kind's target with one input in this process, so that the traceback is
printed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.fuzz.drive import drive, fresh, keep, table
from tests.fuzz.kinds import KINDS, SIX


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="all", choices=("all", "six", *KINDS), help="six: no texts of a checkpoint")
    parser.add_argument("--count", type=int, default=10_000, help="inputs, over all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "muster-fuzz-found")
    parser.add_argument("--replay", type=Path, help="one input of --kind")
    options = parser.parse_args()
    names = {"all": tuple(KINDS), "six": SIX}.get(options.kind, (options.kind,))
    if options.replay is not None:
        print("used" if KINDS[names[0]].target(options.replay.read_bytes()) else "refused")
        return 0
    tallies = []
    for place, name in enumerate(names):
        count = options.count // len(names) + (place < options.count % len(names))
        tallies.append(drive(KINDS[name], fresh(KINDS[name], count, options.seed)))
        print(table(tallies[-1:]).splitlines()[1], flush=True)
        for path in keep(tallies[-1], options.keep):
            print(f"  {path}: {path.with_suffix('.txt').read_text('utf-8').strip().splitlines()[-1][:150]}")
    print(table(tallies))
    return int(any(tally.defects for tally in tallies))


if __name__ == "__main__":
    raise SystemExit(main())
