"""All sections of a config, each right by itself. `configs/rules.py` holds the rules between them."""

from __future__ import annotations

from configs.schema.checkpoint import CheckpointSection
from configs.schema.data import DataSection
from configs.schema.freeze import FreezeSection
from configs.schema.model import DecoderSection, ModelSection
from configs.schema.monitor import MonitorSection
from configs.schema.optim import OptimSection
from configs.schema.own import OwnModel
from configs.schema.parallel import ParallelSection
from configs.schema.precision import PrecisionSection
from configs.schema.run import RunSection
from configs.schema.section import MOST_WORDS, Section, result, speed
from configs.schema.slurm import SlurmSection
from configs.schema.start import StartSection
from configs.schema.task import LmSection, TaskSection
from configs.schema.train import TrainSection


class Sections(Section):
    """Everything a run is."""

    run: RunSection = speed(RunSection(), "the run itself")
    model: ModelSection = result(..., "the model")
    start: StartSection = result(StartSection(), "where a new run begins")
    data: DataSection = result(..., "what is read")
    task: TaskSection = result(LmSection(), "what is learned")
    train: TrainSection = result(..., "how long and in what batches")
    optim: OptimSection = result(OptimSection(), "optimizer and schedule")
    precision: PrecisionSection = result(PrecisionSection(), "number formats")
    parallel: ParallelSection = speed(ParallelSection(), "layout")
    freeze: FreezeSection = result(FreezeSection(), "which parameters train")
    checkpoint: CheckpointSection = speed(CheckpointSection(), "saving")
    monitor: MonitorSection = speed(MonitorSection(), "watching each node")
    slurm: SlurmSection = speed(SlurmSection(), "what to ask a Slurm cluster for")

    @property
    def run_dir(self) -> str:
        return self.run.dir or f"runs/{self.run.name}"

    @property
    def seq_len(self) -> int:
        """Tokens per sample. Only for a task that has tokens."""
        assert self.data.seq_len is not None
        return self.data.seq_len

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding. None for a model that takes no tokens, and while the data have not decided it."""
        if isinstance(self.model, OwnModel):
            size = self.model.options.get("vocab_size")
            return size if isinstance(size, int) else None
        return self.model.vocab_size if isinstance(self.model, DecoderSection) else None

    @property
    def most_words(self) -> int:
        """No token id may reach it: `vocab_size`, or the most there can be while the data have not decided it."""
        return self.vocab_size or MOST_WORDS

    @property
    def decoder(self) -> DecoderSection:
        """The model, where it must be a decoder. Raises TypeError for another."""
        if not isinstance(self.model, DecoderSection):
            raise TypeError(f"model.name is {self.model.name}, not decoder")
        return self.model

    @property
    def lm(self) -> LmSection:
        """The task, where it must be language modelling. Raises TypeError for another."""
        if not isinstance(self.task, LmSection):
            raise TypeError(f"task.name is {self.task.name}, not lm")
        return self.task
