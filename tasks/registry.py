"""Where models are registered, and which of them is in service."""

from pathlib import Path

from tasks.errors import NightlyError
from tasks.files import read_json
from tasks.params import nearest


def champion_id(models: Path) -> str | None:
    """Return the id of the model in service, None if there is none yet."""
    pointer = models / "champion.json"
    if not pointer.exists():
        return None
    try:
        return read_json(pointer)["id"]
    except (ValueError, KeyError, TypeError):
        raise NightlyError(f"{pointer} is damaged: put a model in service with 'nightly rollback ID'") from None


def champion_path(models: Path) -> Path:
    """Return the directory of the model in service.

    Raises:
        NightlyError: there is none, or its directory is gone.
    """
    model_id = champion_id(models)
    if model_id is None:
        raise NightlyError("no model yet: run 'nightly retrain', or name one with --model")
    return registered_path(models, model_id)


def registered_path(models: Path, model_id: str) -> Path:
    """Return the directory of a registered model.

    Raises:
        NightlyError: the id is unknown, or the directory was pruned.
    """
    path = models / "registry" / model_id
    if path.is_dir():
        return path
    if model_id in (known := registered(models)):
        raise NightlyError(f"{path} is missing: fetch it with 'dvc pull {path}.dvc'")
    hint = nearest(model_id, known) if known else "there is none yet, run 'nightly retrain' first"
    raise NightlyError(f"no model '{model_id}' in the registry: {hint}")


def registered(models: Path) -> list[str]:
    """Return the ids in the registry, those that only DVC's storage still holds included."""
    registry = models / "registry"
    directories = {path.name for path in registry.glob("[!.]*") if path.is_dir()}
    return sorted(directories | {path.stem for path in registry.glob("[!.]*.dvc")})
