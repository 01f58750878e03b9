"""What tasks, batches and engines rely on: fill-ups change nothing, weights add up, no engine knows the task."""

from __future__ import annotations

import ast
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.schema.model import DecoderSection
from configs.schema.task import LmSection
from models import IGNORE, Model, build_model
from trainer.data.batch import Batch, Row
from trainer.data.loader import Cut, Place, assemble, weigh
from trainer.data.samples import Columns
from trainer.data.windows import Split, Windows
from trainer.tasks.lm import LanguageModelling

SEQ_LEN = 12
VOCABULARY = 31


def corpus(documents: Sequence[int], seed: int = 0) -> Split:
    """Random tokens in documents of these lengths."""
    starts = np.cumsum([0, *documents[:-1]]).astype(np.int64)
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, sum(documents), dtype=np.uint16)
    return Split(tokens, starts)


def windows(documents: Sequence[int] = (5, 30, 7, 1, 40, 17, 90), document_mask: bool = True) -> Windows:
    return Windows(corpus(documents), SEQ_LEN, document_mask)


def lm(**keys: Any) -> LanguageModelling:
    return LanguageModelling(LmSection(**keys))


# ---- fill-ups -------------------------------------------------------------------------------------------------------


MODELS: list[dict[str, Any]] = [{}, {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qkv_bias": True}]
ROWS = [(1, 1), (1, 3), (2, 1), (3, 2), (5, 3)]  # (samples, fill-ups)


def tiny(dtype: torch.dtype = torch.float32, **keys: Any) -> Model:
    small = {"vocab_size": VOCABULARY, "dim": 16, "layers": 2, "heads": 2, "mlp_dim": 24, "max_seq_len": SEQ_LEN}
    built = build_model(DecoderSection(**{**small, "init_std": 0.2, **keys}))
    built.module.to(dtype)
    for name, parameter in built.module.named_parameters():
        built.initialise(name, parameter, torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return built


def learned(task: LanguageModelling, built: Model, batch: Batch) -> dict[str, torch.Tensor]:
    """Everything that a batch gives: its sums, the gradient of each parameter, and that of each row's embeddings."""
    rows: list[torch.Tensor] = []

    def keep(module: Any, args: Any, out: torch.Tensor) -> None:
        out.retain_grad()
        rows.append(out)

    built.module.zero_grad()
    handle = built.module.get_submodule("embed").register_forward_hook(keep)
    total, sums = task.sums(built.module, batch)
    handle.remove()
    total.backward()
    gradients = {name: p.grad.clone() for name, p in built.module.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(built.module.parameters()))
    (embedded,) = rows
    assert embedded.grad is not None
    return {"total": total.detach(), "sums": sums, "rows": embedded.grad, **gradients}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(("real", "filled"), ROWS)
def test_a_fill_up_gives_exact_zeros(real: int, filled: int, document_mask: bool, model: dict[str, Any]) -> None:
    """No bit depends on the content of a fill-up: its own gradients are zeros, and no other gradient depends on it."""
    task, samples = lm(z_loss=1e-3, loss_chunk_tokens=8), windows(document_mask=document_mask)
    built, places = tiny(**model), [Place(samples, i) for i in range(real)]
    found = []
    for fill in (places[0], Place(samples, 9), Place(samples, 14)):
        (batch,) = assemble(task, 0, places, Cut(1, real + filled), fill)
        assert (batch.rows, batch.size) == (real, real + filled)
        found.append(learned(task, built, batch))
        gradients = found[-1]["rows"]
        assert gradients.shape[0] == real + filled
        assert all(row.any() for row in gradients[:real])
        assert not gradients[real:].any()
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert [name for name in other if not torch.equal(other[name], found[0][name])] == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(("real", "filled"), ROWS)
def test_a_fill_up_changes_nothing(real: int, filled: int, document_mask: bool, model: dict[str, Any]) -> None:
    """Sums and gradients equal those of the same rows without it. In fp64, up to its last bits: torch sums more rows in
    another order, even where the added rows are zeros."""
    task, samples = lm(z_loss=1e-3, loss_chunk_tokens=8), windows(document_mask=document_mask)
    built, places = tiny(torch.float64, **model), [Place(samples, i) for i in range(real)]
    (plain,) = assemble(task, 0, places, Cut(1, real), places[0])
    assert (plain.rows, plain.size) == (real, real)
    expected = learned(task, built, plain)
    assert expected["sums"][0] > 0
    (batch,) = assemble(task, 0, places, Cut(1, real + filled), places[0])
    found = learned(task, built, batch)
    found["rows"] = found["rows"][:real]
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-13 * float(expected[name].abs().max()))


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_batch_of_fill_ups_alone_is_worth_nothing(document_mask: bool) -> None:
    """As on a rank without samples."""
    task, samples = lm(z_loss=1e-3), windows(document_mask=document_mask)
    (batch,) = assemble(task, 0, [], Cut(1, 2), Place(samples, 3))
    assert task.weigh(batch) == (0.0,)
    assert task.fault(batch) is None
    assert all(not value.any() for value in learned(task, tiny(), batch).values())


# ---- weights --------------------------------------------------------------------------------------------------------


@given(
    documents=st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda found: sum(found) > SEQ_LEN),
    global_batch=st.integers(1, 20),
    micro_batch=st.integers(1, 6),
    world_size=st.integers(1, 8),
    data=st.data(),
)
def test_weights_over_any_cut_are_the_count_of_targets(
    documents: list[int], global_batch: int, micro_batch: int, world_size: int, data: st.DataObject
) -> None:
    samples, task = windows(documents), lm()
    index = st.integers(0, len(samples) - 1)
    drawn = [Place(samples, i) for i in data.draw(st.lists(index, min_size=global_batch, max_size=global_batch))]
    cut = Cut.of(global_batch, micro_batch, world_size)
    targets = sum(int((place.samples.read(place.index)["targets"] != IGNORE).sum()) for place in drawn)
    ranks = [assemble(task, 0, drawn[rank::world_size], cut, drawn[0]) for rank in range(world_size)]
    assert sum(weigh(task, batches)[0] for batches in ranks) == targets
    assert sum(task.weigh(batch)[0] for batches in ranks for batch in batches) == targets
    assert sum(batch.rows for batches in ranks for batch in batches) == global_batch
    assert {(len(batches), batch.size) for batches in ranks for batch in batches} == {(cut.batches, cut.size)}


# ---- what the loader asks for ---------------------------------------------------------------------------------------


class Noted:
    """Collates nothing, and records its arguments."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Columns], int, list[Row]]] = []

    def collate(self, samples: Sequence[Columns], real: int, rows: Sequence[Row]) -> Batch:
        self.asked.append((list(samples), real, list(rows)))
        return Batch({"number": torch.tensor([int(sample["number"]) for sample in samples])}, real)

    def weigh(self, batch: Batch) -> tuple[float, ...]:
        return (float(batch.rows), 2.0 * batch.rows)


class Numbers:
    """A sample holds its own number and that of its source."""

    def __init__(self, source: int) -> None:
        self.source = source

    def __len__(self) -> int:
        return 1000

    def read(self, index: int) -> Columns:
        return {"number": np.array(1000 * self.source + index)}

    def cost(self, index: int) -> int:
        return 1


@given(mine=st.integers(0, 12), micro_batch=st.integers(1, 5), more=st.integers(0, 5))
def test_samples_stand_in_order_and_then_fill_ups(mine: int, micro_batch: int, more: int) -> None:
    task, cut = Noted(), Cut.of(max(mine + more, 1), micro_batch, 1)
    sources = [Numbers(0), Numbers(1)]
    places = [Place(sources[i % 2], 7 * i, i // 3) for i in range(mine)]
    fill = Place(sources[1], 999, 5)
    batches = assemble(task, 42, places, cut, fill)
    filled = [*places, *[fill] * (cut.batches * cut.size - mine)]
    numbers = [1000 * place.samples.source + place.index for place in filled]  # type: ignore[attr-defined]
    assert [n for batch in batches for n in batch.tensors["number"].tolist()] == numbers
    assert [row for _, _, rows in task.asked for row in rows] == [Row(42, p.epoch, p.index) for p in filled]
    real = [real for _, real, _ in task.asked]
    assert [batch.rows for batch in batches] == real
    assert real == [min(max(mine - k * cut.size, 0), cut.size) for k in range(cut.batches)]
    assert [batch.size for batch in batches] == [cut.size] * cut.batches
    assert weigh(task, batches) == (float(mine), 2.0 * mine)


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_fill_up_is_its_sample_without_targets(document_mask: bool) -> None:
    samples = windows(document_mask=document_mask)
    places, fill = [Place(samples, i) for i in (4, 2, 6)], Place(samples, 9)
    batches = assemble(lm(), 0, places, Cut(3, 2), fill)
    assert [batch.rows for batch in batches] == [2, 1, 0]
    rows = [{name: t[i].numpy() for name, t in batch.tensors.items()} for batch in batches for i in range(2)]
    for row, place in zip(rows, [*places, fill, fill, fill], strict=True):
        sample = place.samples.read(place.index)
        assert row.keys() == sample.keys()
        expected = {**sample, "targets": np.full(SEQ_LEN, IGNORE)} if place is fill else sample
        assert (sample["targets"] != IGNORE).any()
        assert all(np.array_equal(row[name], expected[name]) and row[name].dtype == sample[name].dtype for name in row)


# ---- who knows the task ---------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
BLIND = ["engines", "shown", "loop.py", "step.py", "validation.py", "run.py"]


def words(source: str) -> Iterator[str]:
    """Every name in the code: of variables, attributes, arguments and imports, and whole strings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in (alias.name, *alias.name.split(".")))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (module, *module.split("."), *(alias.name for alias in node.names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        else:
            yield from (str(getattr(node, field)) for field in ("id", "attr", "arg", "name") if hasattr(node, field))


def knows_the_task(source: str) -> bool:
    return not {"lm", "LanguageModelling", "trainer.tasks.lm"}.isdisjoint(words(source))


@pytest.mark.parametrize(
    "source",
    [
        "from trainer.tasks.lm import anything",
        "import trainer.tasks.lm as other",
        "from trainer.tasks import lm",
        "if config.task.name == 'lm': pass",
        "def f(task: LanguageModelling) -> None: pass",
        "tasks.LanguageModelling(section)",
    ],
)
def test_who_knows_the_task_is_found(source: str) -> None:
    assert knows_the_task(source)
    assert not knows_the_task("from trainer.tasks.base import Task\nx = 'an lm'  # LanguageModelling")


@pytest.mark.parametrize("place", BLIND)
def test_what_trains_does_not_know_the_task(place: str) -> None:
    path = ROOT / "trainer" / place
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files
    assert [str(file.relative_to(ROOT)) for file in files if knows_the_task(file.read_text())] == []
