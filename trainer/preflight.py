"""What can be known of a run before it starts, cheap things first: asked by `trainer`, `launch run` and `slurm submit`.

No torch, except for the names of parameters where a config freezes some.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from configs.config import Config
from configs.errors import UserError
from configs.fingerprint import decide, differences, fields, fingerprint, result_fields, undecided
from configs.load import dump, load
from configs.own import check_own, is_own
from configs.paths import fitting
from configs.schema.own import SIZES, OwnModel
from trainer.checkpoint.load.start_from import checkpoint_named
from trainer.data.listing import check_source
from trainer.engines import check_engine, check_package
from trainer.freeze import check_schedule
from trainer.life.entries import refuse_to_pass_over
from trainer.life.folder import RunFolder, write_text, wrong_kinds
from trainer.life.layout import resolve
from trainer.schedule import check_rates
from trainer.shown.series import check_series

DATA_CONTENT = "data.content"  # what the sources hold: not a key, and admitted like one in `run.accept_changes`
_SHOWN = 3
# Keys that decide which tensors there are, and of which shape.
_TENSORS = {
    *(f"model.{key}" for key in ("name", "vocab_size", "dim", "layers", "kv_heads", "head_dim", "mlp_dim", "mlp")),
    *(f"model.{key}" for key in ("norm", "position", "qkv_bias", "out_bias", "mlp_bias", "qk_norm", "tie_embeddings")),
    "optim.name",
}
_OTHER_DEFAULT = {"optim.weight_decay"}  # under adam and sgd it was once 0.1, as under adamw


@dataclass(frozen=True)
class Problem:
    """One thing that keeps a run from starting. `text`: one or two lines, as a UserError has them. `elsewhere`: it is
    about a path that perhaps only the nodes of a cluster see."""

    text: str
    elsewhere: bool = False


def check(
    config: Config, processes: int, folder: RunFolder, paths: bool = True, packages: bool = True
) -> list[Problem]:
    """Everything that is wrong, as far as it can be known without work. `processes`: all of the run, over all nodes.

    `paths` False: what the config names outside the run folder is not looked for. `packages` False: nor what is
    installed, as the run has another Python. Touches nothing.
    """
    found = check_numbers(config, processes, packages)
    place = problems_of(lambda: check_place("run.dir", folder.root))
    found += place or problems_of(lambda: check_folder(config, folder))
    found += problems_of(lambda: _check_freezing(config), lambda: _check_own(config))
    return found + (_check_paths(config, folder) if paths and not place else [])


def check_numbers(config: Config, processes: int, packages: bool = True) -> list[Problem]:
    """What every rank finds alike by itself: nothing of the run's is read."""
    installed = (lambda: check_package(config.parallel), lambda: check_series(config.run)) if packages else ()
    return problems_of(
        lambda: resolve(config.parallel, processes),
        lambda: check_engine(config.parallel, processes),
        *installed,
        lambda: check_rates(config),
    )


def _check_own(config: Config) -> None:
    for key, name in (("task.name", config.task.name), ("model.name", config.model.name)):
        if is_own(name):
            check_own(key, name)


def _check_freezing(config: Config) -> None:
    """The patterns against the model's own names. A list of names beside the model would be a second truth, so torch
    is imported, seconds, by those who freeze."""
    freeze = config.freeze
    if is_own(config.model.name):
        return  # only what trains imports it, and that will look
    if freeze.frozen or freeze.trainable or freeze.schedule:
        from trainer.engines.named import names_of

        check_schedule(freeze, *names_of(config.model))


def _check_paths(config: Config, folder: RunFolder) -> list[Problem]:
    from trainer.data.tokenizer import load_tokenizer  # late: numpy takes a while, and most mistakes need none

    def start() -> None:
        if config.start.from_ is not None and folder.newest_checkpoint()[1] is None:  # else it is not read
            checkpoint_named(Path(config.start.from_))

    def tokenizer() -> None:
        if config.task.needs_tokenizer:
            load_tokenizer(config.data, config.most_words)

    return problems_of(
        start,
        lambda: _check_cache(config, folder.cache(config.data.cache)),
        tokenizer,
        *(partial(check_source, source) for source in config.data.sources),
        elsewhere=True,
    )


def _check_cache(config: Config, cache: Path) -> None:
    """Somebody else's cache may be closed to us and serve: it is written to only where something is to be made. Whether
    that is so, the start finds out by reading; here it counts that something of each source is there."""
    try:
        check_place("data.cache", cache)
    except UserError:
        if not cache.is_dir() or not all(any(cache.glob(f"{source.name}-*")) for source in config.data.sources):
            raise


def problems_of(*checks: Callable[[], object], elsewhere: bool = False) -> list[Problem]:
    """What these say, each of which raises UserError when something is wrong."""
    found = []
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(Problem(str(error), elsewhere))
        except OSError as error:  # a folder is closed to us, a server does not answer
            found.append(Problem(f"{error.filename}: cannot be looked at: {error.strerror or error}", elsewhere))
    return found


def refuse(problems: Iterable[Problem], advice: str = "") -> None:
    """Raise UserError that says all of them, each once, and the advice."""
    texts = list(dict.fromkeys(problem.text for problem in problems))
    if texts:
        heading = [f"{len(texts)} mistakes:"] if len(texts) > 1 else []
        raise UserError("\n".join([*heading, *texts, *([advice] if advice else [])]))


def check_place(key: str, folder: Path) -> None:
    """Raise UserError unless this is a folder that we may write to, or can be made."""
    existing = folder = folder.absolute()
    try:
        fitting(str(folder))
    except ValueError as error:
        raise UserError(f"{key}: {folder}: {error}") from None
    try:
        while not existing.exists():
            if os.path.lexists(existing):
                raise UserError(f"{key}: {existing} is a link to {os.readlink(existing)}, which does not exist")
            existing = existing.parent
    except OSError as error:
        raise UserError(f"{key}: cannot write to {folder}: {error.strerror or error}") from error
    if not existing.is_dir():
        what = f"{existing} is not a folder" if existing != folder else "it is not a folder"
        raise UserError(f"{key}: cannot write to {folder}: {what}")
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=True):
        raise UserError(f"{key}: cannot write to {folder}: {existing} cannot be written to")


def check_contents(folder: RunFolder) -> None:
    """Raise UserError when something in the run folder is of another kind than what is written there, or may be a newer
    checkpoint and cannot be used."""
    try:
        wrong = wrong_kinds(folder)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be looked at: {error.strerror or error}") from error
    if wrong:
        more = f"\nand {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError("\n".join(wrong[:_SHOWN]) + f"{more}\nmove it away, or use another run.dir")
    steps = folder.committed_steps()
    refuse_to_pass_over(folder.checkpoints, steps[-1] if steps else None)


def check_folder(config: Config, folder: RunFolder) -> list[dict[str, Any]]:
    """Compare with the config this folder was begun with.

    Returns the admitted changes as facts for events. Raises UserError that names every other field that changes the
    result, and whatever lies in the way. Touches nothing.
    """
    check_contents(folder)
    known = {key for key, _, _ in fields(config)} | {DATA_CONTENT}
    for key in config.run.accept_changes:
        if key not in known:
            raise UserError(f"run.accept_changes: there is no key {key!r}")
    if not folder.config.exists():
        return []
    old = load(str(folder.config), [])
    config = begun_with(config, old)
    changes = [
        {"key": key, "old": before, "new": after}
        for key, before, after in differences(result_fields(old), result_fields(config))
    ]
    moved = [c for c in changes if _is_settled_by_content(c, config)]
    refused = [c for c in changes if c not in moved and c["key"] not in config.run.accept_changes]
    if refused:
        named = ", ".join(f"{c['key']} {c['old']!r} -> {c['new']!r}" for c in refused)
        raise UserError(f"{folder.root} was begun with another config: {named}\n{_advice(refused, folder)}")
    events = [{"event": "data_moved" if c in moved else "config_changed", **c} for c in changes]
    if config.train.epochs is None and old.train.steps != config.train.steps:
        events.append(_steps_changed(old, config))
    return events


def begun_with(config: Config, old: Config) -> Config:
    """The config with the sizes that the data decided when the folder was begun, where it leaves them out."""
    if old.model.name != config.model.name:
        return config  # it is refused by that name
    known = {key: value for key, value, _ in fields(old)}
    sizes = {key: known[key] for key in undecided(config) if known.get(key) is not None}
    if isinstance(config.model, OwnModel) and isinstance(old.model, OwnModel):
        options = {key: old.model.options[key] for key in SIZES if key in old.model.options}
        sizes["model.options"] = {**options, **config.model.options}
    return decide(config, sizes)


def _is_settled_by_content(change: dict[str, Any], config: Config) -> bool:
    """Whether a change is only where data lies. What it holds is compared, before a checkpoint is gone on from."""
    if change["key"] == "data.sources":
        old, new = ([{**s, "path": "", "pattern": "", "labels": ""} for s in change[when]] for when in ("old", "new"))
        return old == new
    # Ids are there already: these two only tell where documents end, and the content is compared for that too.
    only_ids = all(source.kind == "tokens" for source in config.data.sources)
    return only_ids and change["key"] in ("data.tokenizer", "data.end_token")


def _advice(refused: list[dict[str, Any]], folder: RunFolder) -> str:
    """What helps. Other tensors than those that are stored would be refused again once they are read. Nobody
    changed a key that once had another default: to admit it would change the run."""
    keys = [change["key"] for change in refused]
    other = [key for key in keys if key in _TENSORS]
    if other and folder.newest_checkpoint()[1] is not None:
        return f"use another run.dir: the checkpoints in this one hold other tensors ({', '.join(other)})"
    begun = [f"{change['key']}={change['old']}" for change in refused if change["key"] in _OTHER_DEFAULT]
    kept = f"{' '.join(begun)} keeps what it was begun with; or " if begun else ""
    return f"{kept}use another run.dir, or admit it with run.accept_changes=[{','.join(keys)}]"


def _steps_changed(old: Config, new: Config) -> dict[str, Any]:
    schedule = new.optim.schedule
    effect = "none: the rate is constant" if schedule == "constant" else f"{schedule} now ends at {new.train.steps}"
    return {"event": "steps_changed", "old": old.train.steps, "new": new.train.steps, "schedule": effect}


def write_config(config: Config, folder: RunFolder) -> None:
    """Put the resolved config and its fingerprint into the run folder."""
    text = f"# fingerprint: {fingerprint(config)}\n{dump(config)}"
    if not folder.config.exists() or folder.config.read_text(encoding="utf-8") != text:
        write_text(folder.config, text)
