"""What a checkpoint of a large model costs rank 0 and each reader, simulated on one machine: no process group, no data.

    python benchmarks/simulate.py [--preset llama3-405b] [--tensor 1 8] [--ranks 8 64 256 1024] [--json FILE]

For each number of ranks, the code of a save plans the files of every rank, reports them to rank 0 and makes the
manifest. The bytes of tensors are left out, and block hashes are zeros. Then a reader with three quarters as many ranks
plans what it would read. Tensor parallelism cuts each tensor first, then FSDP2 cuts each part.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.table import show
from configs.load import load
from models import build_model
from trainer.checkpoint.format.boxes import Group, Ints, Wanted
from trainer.checkpoint.format.collector import no_collection
from trainer.checkpoint.format.files import BLOCK_BYTES, HASH_DIGITS, blocks_in
from trainer.checkpoint.format.manifest import Manifest, decode
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.load.read import spans_for
from trainer.checkpoint.save.assemble import RunState, assemble
from trainer.checkpoint.save.share import WrittenFile, plan_files, report_of

STATES = ("", ".exp_avg", ".exp_avg_sq")
READERS = 5  # how many ranks of the reading layout are planned
META = torch.device("meta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama3-405b")
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 8], help="ranks of a tensor group")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--json")
    options = parser.parse_args()
    shapes = Shapes(options.preset)
    rows = []
    for tensor in options.tensor:
        for ranks in options.ranks:
            if ranks >= tensor:
                # one process each, so that each measures its own peak of memory
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    rows.append(pool.apply(simulate, (shapes, tensor, ranks)))
                print(rows[-1], file=sys.stderr, flush=True)
    show(f"a save and a load of {options.preset}, simulated", rows, options.json)


class Shapes:
    """Name -> (shape, dimension that tensor parallelism cuts or None) of the parameters of a preset's model."""

    def __init__(self, preset: str, overrides: Sequence[str] = ()) -> None:
        section = load(preset, list(overrides)).model
        with META:
            built = build_model(section)
        plan = built.plan
        assert plan is not None
        rules = [(plan.columns, 0), (plan.rows, 1), (plan.vocabulary, 0), (plan.whole, None), (plan.positions, None)]
        self.parameters: dict[str, tuple[Ints, int | None]] = {}
        for name, parameter in built.module.named_parameters():
            module = name.rpartition(".")[0]
            dim = next(dim for globs, dim in rules if any(fnmatchcase(module, glob) for glob in globs))
            self.parameters[name] = (tuple(parameter.shape), dim)


def box(shape: Ints, tensor_dim: int | None, tensor: int, ranks: int, rank: int) -> tuple[Ints, Ints]:
    """(offsets, sizes) of a rank's box. The tensor group is cut first, over neighbouring ranks. Then FSDP2 cuts the
    first dimension over ranks / tensor."""
    offsets, sizes = [0] * len(shape), list(shape)
    cuts = [(0, ranks // tensor, rank // tensor)]
    if tensor_dim is not None:
        cuts.insert(0, (tensor_dim, tensor, rank % tensor))
    for dim, parts, part in cuts:
        size = -(-sizes[dim] // parts)
        start = min(size * part, sizes[dim])
        offsets[dim] += start
        sizes[dim] = min(size, sizes[dim] - start)
    return tuple(offsets), tuple(sizes)


def pieces(shapes: Shapes, tensor: int, ranks: int, rank: int) -> Iterator[Piece]:
    for name, (shape, dim) in shapes.parameters.items():
        offsets, sizes = box(shape, dim, tensor, ranks, rank)
        part = torch.empty(sizes, device=META)
        copies = (rank % tensor, tensor) if dim is None else (0, 1)
        for state in STATES:
            group: Group = "optim" if state else "model"
            yield Piece(name + state, group, part, shape, offsets, sizes, *copies)


def written(shapes: Shapes, tensor: int, ranks: int, rank: int) -> list[WrittenFile]:
    """The files that a rank would report after writing."""
    return [
        report_of(file, "0" * (HASH_DIGITS * blocks_in(file.layout.size)))
        for file in plan_files(list(pieces(shapes, tensor, ranks, rank)), rank)
    ]


def simulate(shapes: Shapes, tensor: int, ranks: int) -> dict[str, Any]:
    state = RunState(step_counts=dict.fromkeys(shapes.parameters, 1000))
    plan_s, report_bytes, reports, rank_bytes = [], [], [], []
    for rank in range(ranks):
        began = time.process_time()
        files = written(shapes, tensor, ranks, rank)
        plan_s.append(time.process_time() - began)
        reports.append(json.dumps([file.to_json() for file in files]))
        report_bytes.append(len(reports[-1]))
        rank_bytes.append(sum(file.size for file in files))
    own = list(pieces(shapes, tensor, ranks, 0))
    before = peak_bytes()
    began = time.process_time()
    received = [WrittenFile.from_json(file) for report in reports for file in parsed(report)]
    manifest, sums = assemble(1000, 0, None, state, received, own)
    assembled = time.process_time()
    content = manifest.encode()
    encoded = time.process_time()
    peak = peak_bytes() - before
    del received, reports
    again = decode("manifest.json", content)
    decoded = time.process_time()
    assert again.tensors.keys() == manifest.tensors.keys()
    return {
        "ranks": ranks,
        "tensor": tensor,
        "files": len(manifest.files),
        "largest file GB": max(file.size for file in manifest.files) / 1e9,
        "GB per rank (min)": min(rank_bytes) / 1e9,
        "(median)": statistics.median(rank_bytes) / 1e9,
        "(max)": max(rank_bytes) / 1e9,
        "plan a rank's files s": statistics.median(plan_s),
        "report MB": statistics.median(report_bytes) / 1e6,
        "partitions": len(manifest.partitions),
        "manifest MB": len(content) / 1e6,
        "checksums MB": len(sums) / 1e6,
        "assemble s": assembled - began,
        "encode s": encoded - assembled,
        "decode s": decoded - encoded,
        "rank 0's memory MB": peak / 1e6,
        **reading(again, shapes, tensor, max(tensor, ranks * 3 // 4 // tensor * tensor)),
    }


def reading(manifest: Manifest, shapes: Shapes, tensor: int, ranks: int) -> dict[str, Any]:
    """What `READERS` ranks of another layout would read, and how long each takes to plan it."""
    seconds, overhead = [], []
    for rank in sorted({rank * (ranks - 1) // (READERS - 1) for rank in range(READERS)}):
        began = time.process_time()
        wanted = [Wanted(p.key, p.tensor, p.offsets, p.sizes) for p in pieces(shapes, tensor, ranks, rank)]
        blocks = {
            (file, index)
            for file, spans in spans_for(manifest, wanted).items()
            for span in spans
            for index in range(span.start // BLOCK_BYTES, blocks_in(span.end))
        }
        seconds.append(time.process_time() - began)
        read = sum(min(BLOCK_BYTES, manifest.files[file].size - index * BLOCK_BYTES) for file, index in blocks)
        overhead.append(read / sum(one.out.nbytes for one in wanted))
    return {"readers": ranks, "plan a reader s": max(seconds), "read / own bytes": max(overhead)}


@no_collection()
def parsed(report: str) -> Any:
    return json.loads(report)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
