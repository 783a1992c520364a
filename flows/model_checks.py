"""What ``nightly doctor`` looks at: the models, and the storage that they are kept in."""

import os
import re
from pathlib import Path

from flows import storage
from flows.findings import Case, Finding, cache_folder, dvc, fail, ok, python, warn
from flows.reconcile import read_pointer
from tasks import promote, registry
from tasks.errors import NightlyError
from tasks.files import read_json


def champion(case: Case) -> Finding:
    """The model in service: its pointer, its files, and that it classifies."""
    models = case.workspace.models
    try:
        model_id = registry.champion_id(models)
        if model_id is None:
            last = [entry for entry in promote.history(models) if entry.action != "hold"][-1:]
            if last:
                return fail("models/champion.json is gone", f"nightly rollback {last[0].id}")
            return warn("no model is in service yet", "nightly retrain")
        path = registry.champion_path(models)
    except NightlyError as error:
        return fail(str(error), "dvc pull, or nightly rollback ID")
    try:
        said = python(
            case.root, "import sys; from flows.model_checks import classify_one as c; c(sys.argv[1])", 60, str(path)
        )
    except NightlyError as error:
        return fail(
            f"{model_id} does not classify: {error}", f"rm -r {path} && dvc checkout {path}.dvc, or nightly rollback"
        )
    return ok(f"{model_id} classifies with {said.strip()}")


def classify_one(path: str) -> None:
    """Classify a gray image with the model at ``path`` and print with which engine; run in a process of its own."""
    import numpy as np

    from tasks.bundle import load_bundle
    from tasks.choice import choose_engine
    from tasks.engines import OPENVINO_ENGINES, open_engine

    bundle = load_bundle(Path(path))
    # Keras needs seconds to start, so that it is asked only where there is nothing else.
    quick = any(bundle.engine_file(name).is_file() for name in OPENVINO_ENGINES if name in bundle.engines)
    name, _ = choose_engine(bundle, "openvino" if quick else "keras")
    image = np.full((1, bundle.decode.size, bundle.decode.size, 3), 128, np.uint8)
    probabilities = open_engine(bundle, name, batch_size=1).probabilities(image)
    if probabilities.shape != (1, len(bundle.classes)) or not np.isclose(probabilities.sum(), 1, atol=0.01):
        raise NightlyError(
            f"{name} gives no probabilities of {len(bundle.classes)} classes: {probabilities[0].tolist()}"
        )
    print(name)


def restorable(case: Case) -> Finding:
    """Every registered model is here, or can be brought back."""
    folder, ids = case.workspace.registry, registry.registered(case.workspace.models)
    gone = [model_id for model_id in ids if not (folder / model_id).is_dir()]
    lost = [model_id for model_id in gone if not _in_cache(case, read_pointer(folder / f"{model_id}.dvc"))]
    if lost and _remote(case):
        held = storage.copies(
            case.root,
            [folder / model_id for model_id in lost],
            log=case.workspace.state / "logs" / "doctor.log",
            emit=lambda line: None,
            limit_seconds=30,
        )
        lost = [path.name for path, copies in held.items() if not copies.in_remote]
    if lost:
        where = "DVC's cache or remote" if _remote(case) else "DVC's cache, and there is no remote"
        return fail(f"{', '.join(lost)}: neither here nor in {where}", "dvc push from where the model is")
    untracked = [model_id for model_id in ids if not (folder / f"{model_id}.dvc").is_file()]
    if untracked:
        named = " ".join(f"models/registry/{model_id}" for model_id in untracked)
        return warn(f"{', '.join(untracked)}: only here, DVC knows nothing of it", f"dvc add {named}")
    return ok(f"{len(ids)} models" + (f", {len(gone)} of them only in DVC's storage" if gone else ""))


def _in_cache(case: Case, digest: str | None) -> bool:
    """Tell whether DVC's cache holds a directory and all its files."""
    objects = cache_folder(case) / "files" / "md5"
    listing = objects / digest[:2] / digest[2:] if digest else None
    if listing is None or not listing.is_file():
        return False
    return all((objects / entry["md5"][:2] / entry["md5"][2:]).is_file() for entry in read_json(listing))


def _remote(case: Case) -> str | None:
    return case.dvc.get("core.remote")


def remote(case: Case) -> Finding:
    """The storage that DVC pushes to."""
    name = _remote(case)
    if name is None:
        return warn("no DVC remote: models and data are on this disk alone", "dvc remote add --default NAME URL")
    url = case.dvc.get(f"remote.{name}.url", "")
    if not url:
        return fail(f"the default remote '{name}' has no address", f"dvc remote add --default {name} URL")
    if "://" not in url:
        folder = Path(os.path.normpath(case.root / ".dvc" / url))
        if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return ok(f"{name}: {folder}")
        if not folder.exists() and folder.parent.is_dir() and os.access(folder.parent, os.W_OK | os.X_OK):
            return ok(f"{name}: {folder}, made with the first push")
        remedy = f"mount it, or dvc remote modify {name} url URL"
        return fail(f"{name}: {folder} is not there or may not be written", remedy)
    shown = re.sub(r"//[^/@]*@", "//***@", url)  # a password
    try:
        dvc(case.root, "list-url", f"remote://{name}", limit_seconds=10)
    except NightlyError as error:
        # Nothing was pushed yet, says a store that answers; that it has no such bucket is another matter.
        path = url.partition("://")[2].rstrip("/")
        if not str(error).rstrip("/").endswith(f"does not exist: {path}"):
            return fail(f"{name}: {shown}: {error}", "check the network, the address and the credentials")
    return ok(f"{name}: {shown}")
