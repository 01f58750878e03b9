"""Whether a config and a run folder belong together. No torch: the launcher asks before it starts anything."""

from __future__ import annotations

from typing import Any

from configs.errors import UserError
from configs.load import dump, load
from configs.schema import Config, differences, fields, fingerprint, result_fields
from trainer.folder import RunFolder, write_text


def check_folder(config: Config, folder: RunFolder) -> list[dict[str, Any]]:
    """Compare with the config this folder was begun with.

    Returns the admitted changes as facts for events. Raises UserError that names every other field that changes the
    result. Touches nothing.
    """
    known = {key for key, _, _ in fields(config)}
    for key in config.run.accept_changes:
        if key not in known:
            raise UserError(f"run.accept_changes: there is no key {key!r}")
    if not folder.config.exists():
        if folder.root.exists() and not folder.root.is_dir():
            raise UserError(f"run.dir: {folder.root} is not a folder")
        return []
    old = load(str(folder.config), [])
    changes = [
        {"key": key, "old": before, "new": after}
        for key, before, after in differences(result_fields(old), result_fields(config))
    ]
    refused = [c for c in changes if c["key"] not in config.run.accept_changes]
    if refused:
        named = ", ".join(f"{c['key']} {c['old']!r} -> {c['new']!r}" for c in refused)
        keys = ",".join(c["key"] for c in refused)
        raise UserError(
            f"{folder.root} was begun with another config: {named}\n"
            f"use another run.dir, or admit it with run.accept_changes=[{keys}]"
        )
    events = [{"event": "config_changed", **c} for c in changes]
    if old.train.steps != config.train.steps:
        events.append(_steps_changed(old, config))
    return events


def _steps_changed(old: Config, new: Config) -> dict[str, Any]:
    schedule = new.optim.schedule
    effect = "none: the rate is constant" if schedule == "constant" else f"{schedule} now ends at {new.train.steps}"
    return {"event": "steps_changed", "old": old.train.steps, "new": new.train.steps, "schedule": effect}


def write_config(config: Config, folder: RunFolder) -> None:
    """Put the resolved config and its fingerprint into the run folder."""
    text = f"# fingerprint: {fingerprint(config)}\n{dump(config)}"
    if not folder.config.exists() or folder.config.read_text(encoding="utf-8") != text:
        write_text(folder.config, text)
