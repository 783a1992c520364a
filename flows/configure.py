"""Putting a preset in place as ``params.yaml``, and saying what that changes."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.settings import read_settings
from flows.workspace import Workspace, locked
from tasks.errors import NightlyError
from tasks.files import publish_file
from tasks.params import nearest, read_params_file


@dataclass(frozen=True)
class Change:
    """One parameter that a preset sets otherwise; None means that it is left at its default."""

    key: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Configured:
    """What ``configure`` did; ``backup`` is the copy of a hand-edited ``params.yaml``, if it was one."""

    changes: list[Change]
    backup: Path | None


def preset_names(workspace: Workspace) -> list[str]:
    """Return the presets' names in alphabetical order."""
    return sorted(path.stem for path in workspace.presets.glob("*.yaml"))


def preset_summary(workspace: Workspace, name: str) -> str:
    """Return the first paragraph of the comment that a preset opens with, in one line."""
    words = []
    for line in (workspace.presets / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        words.append(text)
    return " ".join(words)


def configure(workspace: Workspace, preset: str) -> Configured:
    """Replace ``params.yaml`` by a preset, all of it or nothing.

    Raises:
        NightlyError: there is no such preset, it is not valid, or a retraining is on.
    """
    names = preset_names(workspace)
    if preset not in names:
        raise NightlyError(f"no preset '{preset}': {nearest(preset, names)}")
    source = workspace.presets / f"{preset}.yaml"
    read_settings(source)
    with locked(workspace, f"nightly configure {preset}"):
        changes = compare(_values(workspace.params), read_params_file(source))
        backup = None
        if workspace.params.exists() and not _is_preset(workspace):
            backup = workspace.params.with_suffix(".yaml.bak")
            _copy(workspace.params, backup)
        _copy(source, workspace.params)
    return Configured(changes, backup)


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Return the parameters that differ between two parameter files, in the order of the second."""
    old, new = _flat(before), _flat(after)
    keys = [*new, *(key for key in old if key not in new)]
    return [Change(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested parameters as ``{"train.epochs": "6"}``."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif prefix + key == "retrain.notify":
            flat[prefix + key] = f"{len(value or [])} addresses"  # which hold passwords
        elif value is not None or prefix:  # an empty section is no value
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _values(params: Path) -> dict[str, Any]:
    """Return what stands in ``params.yaml``; a file that is missing or broken sets nothing."""
    try:
        return read_params_file(params)
    except NightlyError:
        return {}


def _is_preset(workspace: Workspace) -> bool:
    content = workspace.params.read_bytes()
    return any(path.read_bytes() == content for path in workspace.presets.glob("*.yaml"))


def _copy(source: Path, destination: Path) -> None:
    with publish_file(destination) as partial:
        shutil.copyfile(source, partial)
