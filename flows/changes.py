"""What was otherwise tonight than when the champion was trained: images, parameters, libraries."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from natsort import natsorted

from flows.champion import Judgement
from flows.configure import Change, compare
from flows.settings import read_settings
from flows.workspace import Workspace
from tasks.errors import NightlyError
from tasks.files import read_json, write_json
from tasks.pages import counted

_ALIKE = "Each class has as many as the champion's had, but pixels, labels or their normalization differ."


@dataclass(frozen=True)
class Changes:
    """What is otherwise tonight than it was for the champion that the challenger met.

    Attributes:
        data: sentences about the images.
        classes: of each class whose number of images differs, the name, the champion's number and tonight's; None
            where there is no such class. The largest differences stand first.
        parameters: those that differ, the champion's value first.
    """

    data: list[str]
    classes: list[tuple[str, int | None, int | None]]
    parameters: list[Change]


def changes(workspace: Workspace, judged: Judgement | None, champion: str | None) -> Changes:
    """Return what is otherwise tonight than for the champion that the challenger met.

    Args:
        judged: None for a night without a verdict, whose ``params.yaml`` is compared in place of a bundle.
        champion: id of the model in service.
    """
    if judged:
        met = judged.champion["model_id"] if judged.champion else None
        now = _settings_of(facts(workspace, judged.challenger["model_id"]))
    else:
        met = champion
        now = _settings_now(workspace.params)
    before = facts(workspace, met)
    then = _settings_of(before)
    if not judged:
        # Sections that no bundle has say nothing about the training.
        then, now = ({name: side[name] for name in then if name in now} for side in (then, now))
    return Changes(*_data_changes(workspace, before, met), compare(then, now) if then and now else [])


def _settings_now(params: Path) -> dict[str, Any]:
    try:
        sections = {name: section.model_dump(mode="json") for name, section in read_settings(params).items()}
    except NightlyError:  # for which the night failed, and which is told as that
        return {}
    return _settings_of({"decode": sections["prepare"]["decode"], "parameters": sections})


def _settings_of(bundle: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a bundle's facts what a person may have changed."""
    libraries = {"libraries": bundle["libraries"]} if bundle.get("libraries") else {}
    decode = {"prepare": {"decode": bundle["decode"]}} if bundle.get("decode") else {}
    return {**bundle.get("parameters", {}), **decode, **libraries}


def _data_changes(
    workspace: Workspace, before: Mapping[str, Any], met: str | None
) -> tuple[list[str], list[tuple[str, int | None, int | None]]]:
    """Return the sentences on the images, and the classes that have more or fewer of them."""
    if not (workspace.prepared / "prepared.json").is_file():
        return [], []
    prepared = read_json(workspace.prepared / "prepared.json")
    counts = _remembered(workspace, prepared["data_digest"], look=True) or {}
    total = sum(counts.values())
    images = f"{counted(total, 'image')} in {counted(len(counts), 'class', 'classes')}"
    splits = ", ".join(f"{number:,} {name}" for name, number in prepared["counts"].items())
    if met is None:
        return [f"{images}: {splits}."], []
    if before.get("data_digest") == prepared["data_digest"]:
        return [f"The same as the champion's: {images}."], []
    told = [f"{images}: {splits}."]
    if before.get("test_digest") not in (None, prepared["test_digest"]):
        told.append("The test set is another one than the champion's.")
    old = _remembered(workspace, before.get("data_digest"))
    if old is None:
        return [*told, "How many the champion was trained on is not on record here."], []
    pairs = [(name, old.get(name), counts.get(name)) for name in natsorted({*old, *counts})]
    changed = [pair for pair in pairs if pair[1] != pair[2]]
    more = total - sum(old.values())
    told.append(f"{abs(more):,} {'more' if more >= 0 else 'fewer'} than the champion had." if changed else _ALIKE)
    return told, sorted(changed, key=lambda pair: -abs((pair[2] or 0) - (pair[1] or 0)))


def _remembered(workspace: Workspace, digest: str | None, look: bool = False) -> dict[str, int] | None:
    """Return how many images each class has in the data with this digest, None if that is not on record.

    Args:
        look: it is the data that is there now, which are counted and put on record.
    """
    path = workspace.state / "nights" / "data" / f"{digest}.json"
    if look and not path.is_file():
        import pyarrow.parquet as parquet

        manifest = parquet.read_table(
            workspace.prepared / "manifest.parquet", columns=["class"], filters=[("status", "==", "ok")]
        )
        found = {row["values"]: row["counts"] for row in manifest["class"].value_counts().to_pylist()}
        write_json(path, {name: found[name] for name in natsorted(found)})
    return read_json(path) if path.is_file() else None


def facts(workspace: Workspace, model_id: str | None) -> dict[str, Any]:
    """Return the content of a model's bundle.json; nothing if it is neither registered nor the last exported."""
    folder = folder_of(workspace, model_id)
    return read_json(folder / "bundle.json") if folder else {}


def folder_of(workspace: Workspace, model_id: str | None) -> Path | None:
    """Return where a model's files are, None if they are neither registered here nor the last exported."""
    for folder in (workspace.registry / model_id, workspace.exported) if model_id else ():
        file = folder / "bundle.json"
        if file.is_file() and read_json(file).get("id") == model_id:
            return folder
    return None
