"""`python -m launch checkpoint list|show|verify|diff|prune`, as a person types them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema.checkpoint import KeepSection
from launch.__main__ import main
from trainer.checkpoint.format.files import BLOCK_BYTES
from trainer.checkpoint.format.pieces import Piece
from trainer.checkpoint.save.assemble import RunState
from trainer.checkpoint.save.store import CheckpointStore
from trainer.life.folder import RunFolder
from trainer.life.lease import Lease
from trainer.progress import Progress

STEPS = (10, 20, 30, 40)


def tensors(step: int) -> dict[str, tuple[str, torch.Tensor]]:
    """Name -> (group, value) at a step. The frozen tensor and one other never change."""
    torch.manual_seed(1)
    return {
        "embed.weight": ("frozen", torch.randn(3_000_000)),
        "head.weight": ("model", torch.arange(12.0).reshape(3, 4) + step),
        "head.bias": ("model", torch.ones(3)),
        "head.weight.exp_avg": ("optim", torch.full((3, 4), float(step))),
    }


def save(run: Path, cut: int = 0) -> None:
    """Four checkpoints of one attempt. `cut` 1 writes the head in two ranges: another layout of the same state."""
    run.mkdir(parents=True)
    store = CheckpointStore(run / "checkpoints", asynchronous=False, keep=KeepSection(last=9))
    for step in STEPS:
        pieces = []
        for key, (group, tensor) in tensors(step).items():
            shape = tuple(tensor.shape)
            if cut and key == "head.weight":
                for start, end in ((0, 5), (5, 12)):
                    part = tensor.view(-1)[start:end]
                    pieces.append(Piece(key, group, part, shape, (), (), start=start))  # type: ignore[arg-type]
            else:
                pieces.append(Piece(key, group, tensor, shape, (0,) * len(shape), shape))  # type: ignore[arg-type]
        state = RunState(
            position={"consumed_samples": 8 * step},
            loop=Progress(step, 8 * step, best_score=1.0 / step).state(),
            config={"optim": {"lr": step / 100}},
            fingerprint="0123",
            layout={"engine": "fsdp", "replicate": 1, "shard": 2 * cut},
            step_counts={"head.weight": step},
            aliases={"tied.weight": "head.bias"},
        )
        store.save(step, pieces, state, metric=1.0 / step)
        assert [result.error for result in store.poll()] == [None]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save(tmp_path / "runs" / "a")
    return tmp_path / "runs" / "a"


def say(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, output and error output of a command."""
    capsys.readouterr()
    code = main(["checkpoint", *map(str, words)])
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    assert len(told.err.splitlines()) <= 2 or code != 2
    return code, told.out, told.err


def path_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.unlink()  # from now on its own file, not a second name of another
    path.write_bytes(content)


def file_of(run: Path, step: int, group: str) -> Path:
    (found,) = (path_of(run, step) / group).iterdir()
    return found


def test_nothing_slow_before_the_words_are_right(tmp_path: Path) -> None:
    """Help and mistakes do not import torch."""
    code = """if True:
        import sys
        from launch.__main__ import main
        for words in (["--help"], ["list", "--help"], ["convert", "a"], ["verify", "nowhere"], ["bake"], []):
            try:
                print(main(["checkpoint", *words]))
            except SystemExit as end:
                print(end.code)
        print("torch" in sys.modules)
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    codes = [line for line in done.stdout.splitlines() if line in ("0", "1", "2", "True", "False")]
    assert codes == ["0", "0", "2", "2", "2", "2", "False"], done.stdout + done.stderr


def test_list(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = time.time()
    monkeypatch.setattr(time, "time", lambda: now_s)  # ages would differ between the two lists below
    code, told, _ = say(capsys, "list", run)
    assert code == 0
    rows = [line.split() for line in told.splitlines()]
    assert [row[0] for row in rows[2:]] == [str(step) for step in STEPS]
    assert all(row[-1] == "good" and "0.0%" in row for row in rows[2:])
    assert "4 checkpoints" in told
    assert say(capsys, "list", run.parent)[1] == told  # given a folder of runs
    (found,) = json.loads(say(capsys, "list", run, "--json")[1])
    frozen = file_of(run, 10, "frozen").stat().st_size
    assert all(row["shared_bytes"] == frozen for row in found["checkpoints"])
    total = sum(row["bytes"] for row in found["checkpoints"])
    assert found["bytes_on_disk"] == total - 3 * frozen
    share = found["checkpoints"][0]["trained_share"]
    assert share == pytest.approx(15 / 3_000_015)


def test_list_from_the_current_folder(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = json.loads(say(capsys, "list", run, "--json")[1])[0]["bytes_on_disk"]
    assert expected > 12_000_000
    monkeypatch.chdir(run.parent)
    assert json.loads(say(capsys, "list", run.name, "--json")[1])[0]["bytes_on_disk"] == expected


def test_list_names_what_is_bad(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file_of(run, 20, "optim").unlink()
    flip(path_of(run, 30) / "manifest.json", 40)
    path_of(run, 40).rename(path_of(run, 40).with_name("step-00000040.bad-0"))
    (run / "checkpoints" / "step-00000050.partial-001-1").mkdir()
    code, told, _ = say(capsys, "list", run)
    assert code == 1
    rows = {line.split()[0]: line for line in told.splitlines()[2:]}
    assert "good" in rows["10"]
    assert "optim/rank-00000.safetensors: the file is missing" in rows["20"]
    assert "manifest.json" in rows["30"]
    assert "digest is wrong" in rows["30"]
    assert "bad-0: bad: set aside" in rows["40"]
    assert "unfinished" in rows["50"]


def test_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = say(capsys, "show", run)
    assert code == 0
    assert "consumed_samples 320" in told
    row = next(line for line in told.splitlines() if line.startswith("head.weight"))
    assert row.split() == ["head.weight", "3", "x", "4", "F32", "exp_avg", "40", "step", "40"]
    assert "head.bias = tied.weight" in told
    assert told.index("-- trained") < told.index("-- frozen") < told.index("embed.weight")
    found = json.loads(say(capsys, "show", path_of(run, 10), "tied.*", "--json")[1])
    assert [row["name"] for row in found["tensors"]] == ["head.bias"]
    assert found["summary"]["step"] == 10
    code, _, error = say(capsys, "show", run, "tail.*")
    assert code == 2
    assert "'tail.*' matches no parameter" in error


def test_verify_names_every_bad_block(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = say(capsys, "verify", run)
    assert code == 0
    assert told.count(": good,") == 4
    frozen = file_of(run, 40, "frozen")
    flip(frozen, 5)
    flip(frozen, BLOCK_BYTES + 5)
    flip(file_of(run, 40, "optim"), -1)
    file_of(run, 20, "model").unlink()
    code, told, _ = say(capsys, "verify", run)
    assert code == 1
    bad = [line for line in told.splitlines() if line.startswith("bad: ")]
    assert len(bad) == 3, told
    assert f"{frozen} (bytes 0 to {2 * BLOCK_BYTES}): in each of 2 blocks: the block's checksum is wrong" in told
    assert f"{file_of(run, 40, 'optim')} (bytes 0 to " in told
    assert "model/rank-00000.safetensors: the file is missing" in told
    assert told.count(": good,") == 2
    assert say(capsys, "verify", path_of(run, 10), "--threads", 1)[0] == 0
    assert say(capsys, "verify", path_of(run, 40), "--threads", 3)[0] == 1


def test_verify_looks_at_headers_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A header whose checksums are right but that disagrees with the manifest, as a faulty writer would leave."""
    from trainer.checkpoint.format import manifest as format_1

    checkpoint = path_of(run, 40)
    path = file_of(run, 40, "model")
    content = path.read_bytes().replace(b"head.bias@0", b"head.bios@0")
    path.write_bytes(content)
    sums = json.loads((checkpoint / "checksums.json").read_text())
    import xxhash

    sums["xxh3_64"]["model/" + path.name] = xxhash.xxh3_64_hexdigest(content)
    text = json.dumps(sums, separators=(",", ":")).encode() + b"\n"
    (checkpoint / "checksums.json").write_bytes(text)
    told = format_1.decode("m", (checkpoint / "manifest.json").read_bytes())
    told = told.model_copy(update={"checksums": format_1.digest(text)})
    (checkpoint / "manifest.json").write_bytes(told.encode())
    code, out, _ = say(capsys, "verify", checkpoint)
    assert code == 1
    assert "disagree about head.bi" in out


def test_ctrl_c_ends_verify(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.checkpoint.verify.Progress.__call__", interrupted)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):  # every program ends on this: tests/test_terminal.py
        say(capsys, "verify", run)
    assert not set(threading.enumerate()) - before


def test_progress_on_a_log_and_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.checkpoint import text as checkpoint_text

    monkeypatch.setattr(checkpoint_text, "_LOG_EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint_text, "_DRAW_EVERY_S", 0.0)
    log = checkpoint_text.Progress("verified", 4_000_000)
    log(1_000_000)
    log.close()
    assert capsys.readouterr().err.startswith("verified  25%  1.00 MB of 4.00 MB  ")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = checkpoint_text.Progress("verified", 4_000_000)
    bar(2_000_000)
    bar.close()
    told = capsys.readouterr().err
    assert "[###############...............] verified  50%" in told
    assert told.endswith("\r\x1b[K")


def test_diff(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = say(capsys, "diff", path_of(run, 30), run)
    assert code == 1
    assert "2 tensors are equal, bit for bit; 2 changed" in told
    row = next(line for line in told.splitlines() if line.startswith("head.weight "))
    change, base = torch.full((3, 4), 10.0), tensors(30)["head.weight"][1]
    assert row.split() == ["head.weight", "float32", "100.0%", "10", f"{float(change.norm() / base.norm()):.3g}"]
    assert "step counts: 30 -> 40 (1 parameters)" in told
    assert "config.optim.lr: 0.3 -> 0.4" in told
    assert "position.consumed_samples: 240 -> 320" in told
    save(tmp_path / "b", cut=1)
    code, told, _ = say(capsys, "diff", run, tmp_path / "b")
    assert code == 0, told  # another layout alone is no difference
    assert "4 tensors are equal, bit for bit; 0 changed" in told
    assert "layout.shard: 0 -> 2" in told


def test_diff_of_other_tensors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor in only one of them, another shape, another dtype, NaN; and a file of torch.save."""
    weights = {name: t for name, (group, t) in tensors(40).items() if group != "optim"}
    weights["head.weight"] = weights["head.weight"].half()
    weights["head.bias"] = torch.tensor([1.0, float("nan"), 1.0])
    weights["embed.weight"] = weights["embed.weight"].view(2, -1)
    torch.save({"model": {**weights, "new": torch.ones(1)}}, tmp_path / "b.pt")
    code, told, _ = say(capsys, "diff", run, tmp_path / "b.pt")
    assert code == 1
    assert "1 only in A: head.weight.exp_avg" in told
    assert "1 only in B: new" in told
    assert "embed.weight: shape [3000000] in A, [2, 1500000] in B" in told
    assert "embed.weight: frozen in A, model in B" in told
    found = json.loads(say(capsys, "diff", run, tmp_path / "b.pt", "--json")[1])
    rows = {row["name"]: row for row in found["changed"]}
    assert rows["head.weight"]["dtype"] == ["float32", "float16"]
    assert rows["head.weight"]["max_change"] == 0.0
    assert rows["head.bias"]["differing"] == 1
    assert rows["head.bias"]["max_change"] == "nan"


def test_diff_says_what_it_cannot_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(file_of(run, 40, "model"), -1)
    code, _, error = say(capsys, "diff", path_of(run, 30), run)
    assert code == 2
    assert "checksum is wrong" in error


def left(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = left(run)
    code, told, _ = say(capsys, "prune", run, "--last", 1, "--every-steps", 20, "--dry-run")
    assert code == 0
    assert left(run) == before
    assert told.count("would delete") == 2
    code, _, error = say(capsys, "prune", run, "--last", 1)
    assert code == 2  # nobody can confirm
    assert "--yes" in error
    assert left(run) == before
    unique = lambda: {f.stat().st_ino: f.stat().st_size for f in run.rglob("*") if f.is_file()}  # noqa: E731
    size = sum(unique().values())
    code, told, _ = say(capsys, "prune", run, "--last", 1, "--every-steps", 20, "--yes")
    assert code == 0
    assert left(run) == ["step-00000020", "step-00000040"]
    from launch.look.text import size_text

    assert f"{size_text(size - sum(unique().values()))} freed" in told
    assert say(capsys, "verify", run)[0] == 0
    assert not RunFolder(run).lease.exists()
    assert "nothing to delete" in say(capsys, "prune", run, "--yes")[1]


def test_prune_keeps_what_the_run_keeps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The setting is read as the run reads it: 010 is ten, a double key is refused, an include is followed."""
    (run / "config.yaml").write_text("include: demo\ncheckpoint: {keep: {last: 010, every_steps: 0, best: false}}\n")
    assert "keeping the newest 10\n" in say(capsys, "prune", run, "--dry-run")[1]
    (run / "config.yaml").write_text("include: demo\ncheckpoint: {keep: {last: 3, last: 1}}\n")
    code, _, error = say(capsys, "prune", run, "--yes")
    assert code == 2
    assert "config.yaml:2: " in error
    assert "say --last N" in error
    assert "keeping the newest 4" in say(capsys, "prune", run, "--last", 4, "--dry-run")[1]
    (run / "config.yaml").write_text("include: demo\ncheckpoint: {keep: {last: 03, every_steps: 0, best: false}}\n")
    assert say(capsys, "prune", run, "--yes")[0] == 0
    assert left(run) == [path_of(run, step).name for step in (20, 30, 40)]


def test_prune_never_deletes_the_last_good_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (20, 30, 40):
        file_of(run, step, "optim").unlink()
    code, _, _ = say(capsys, "prune", run, "--last", 1, "--yes")
    assert code == 0
    assert path_of(run, 10).name in left(run)


def test_prune_of_those_set_aside(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path_of(run, 30).rename(run / "checkpoints" / "step-00000030.bad-0")
    say(capsys, "prune", run, "--last", 9, "--yes")
    assert "step-00000030.bad-0" in left(run)
    code, told, _ = say(capsys, "prune", run, "--last", 9, "--bad", "--yes")
    assert code == 0
    assert "deleting step-00000030.bad-0" in told
    assert left(run) == [path_of(run, step).name for step in (10, 20, 40)]
    for step in (10, 20, 40):
        path_of(run, step).rename(run / "checkpoints" / f"step-{step:08d}.bad-0")
    code, _, error = say(capsys, "prune", run, "--bad", "--yes")
    assert code == 2
    assert "no good checkpoint" in error
    assert len(left(run)) == 3


def test_prune_is_refused_while_the_run_lives(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lease = Lease.take(RunFolder(run), "here", 0, print)
    before = left(run)
    code, _, error = say(capsys, "prune", run, "--last", 1, "--yes")
    assert code == 2
    assert "already running" in error
    assert left(run) == before
    assert RunFolder(run).lease.exists()
    lease.release()


@pytest.mark.parametrize("verb", ["list", "show", "verify", "prune"])
def test_folders_without_checkpoints(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert say(capsys, verb, tmp_path)[0] == 2
    (tmp_path / "file").write_text("x")
    assert say(capsys, verb, tmp_path / "file")[0] == 2
    assert say(capsys, verb, tmp_path / "nowhere")[0] == 2


def test_a_run_copied_away_is_listed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run / "checkpoints", tmp_path / "copies")
    assert say(capsys, "list", tmp_path / "copies")[0] == 0
