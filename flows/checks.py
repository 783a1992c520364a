"""What ``nightly doctor`` looks at: the software, the machine and the workspace."""

import os
import re
import shutil
import socket
import sys
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path

from flows.findings import Case, Finding, cache_folder, dvc, existing, fail, ok, output, python, warn
from flows.notify import faults, last_success
from flows.reconcile import hopeless_predictions, is_lock_file, leftovers, stale_notes, torn_pointers
from flows.runs import process_mark, started_after
from tasks.device import gpu_present
from tasks.errors import NightlyError
from tasks.files import read_json

#: The libraries whose versions decide whether a night goes as it was tested.
IMPORTANT = (
    *("prefect", "fastapi", "sqlalchemy", "dvc", "tensorflow", "keras", "openvino", "nncf", "numpy", "pandas"),
    *("pyarrow", "opencv-python", "pillow", "pydantic"),
)
#: What a first run needs at least, with a small data set.
FIRST_RUN_BYTES = 2 << 30


# --- the software


def software(case: Case) -> Finding:
    """Python and libraries: what the package asks for, and what was tested together."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    version = ".".join(map(str, sys.version_info[:3]))
    wrong = []
    about = metadata.metadata("resnet-nightly")
    if not SpecifierSet(about["Requires-Python"] or "").contains(version):
        wrong.append(f"Python {version} ({about['Requires-Python']})")
    for requirement in map(Requirement, about.get_all("Requires-Dist") or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        present = _version(requirement.name)
        if present is None and requirement.name == "tensorflow" and os.environ.get("KERAS_BACKEND") == "jax":
            continue
        if present is None or not requirement.specifier.contains(present, prereleases=True):
            wrong.append(f"{requirement.name} {present or 'missing'} ({requirement.specifier})")
    if wrong:
        return fail(f"not what this software needs: {', '.join(wrong)}", "make setup")
    locked = _locked(case.root)
    other = {name: _version(name) for name in IMPORTANT if name in locked and _version(name) not in locked[name]}
    if other := {name: present for name, present in other.items() if present}:
        named = ", ".join(f"{name} {present} ({locked[name][-1]})" for name, present in other.items())
        return warn(f"Python {version}; not as in requirements.lock: {named}", "make setup")
    return ok(
        f"Python {version}, prefect {_version('prefect')}, dvc {_version('dvc')}, as locked" if locked else version
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _locked(root: Path) -> dict[str, list[str]]:
    """Return the versions in the lock files, by name; several where they depend on the platform."""
    versions: dict[str, list[str]] = {}
    for file in (root / "requirements-gpu.lock", root / "requirements.lock"):
        if file.is_file():
            for name, version in re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==([^\s;]+)", file.read_text("utf-8"), re.M):
                versions.setdefault(name, []).append(version)
    return versions


def telemetry(case: Case) -> Finding:
    """Nothing calls home: Prefect, DVC, OpenVINO."""
    from prefect.settings import PREFECT_SERVER_ANALYTICS_ENABLED

    loud = []
    if PREFECT_SERVER_ANALYTICS_ENABLED.value():
        loud.append(("Prefect's", "export PREFECT_SERVER_ANALYTICS_ENABLED=false"))
    if case.dvc.get("core.analytics") != "false":  # what DVC_NO_ANALYTICS says counts for our own commands alone
        loud.append(("DVC's", "dvc config core.analytics false"))
    code = "import sys, tasks.engines as e; e.import_openvino(); print('openvino_telemetry.main' in sys.modules)"
    if python(case.root, code, 20).strip() == "True":
        loud.append(("OpenVINO's", "pip uninstall openvino-telemetry"))
    if loud:
        whose, remedies = zip(*loud, strict=True)
        return warn(f"{' and '.join(whose)} is on", "; ".join(remedies))
    return ok("off: Prefect, DVC, OpenVINO")


def parameters(case: Case) -> Finding:
    """``params.yaml`` as a whole."""
    from flows.settings import read_settings

    try:
        read_settings(case.workspace.params)
    except NightlyError as error:
        return fail(str(error), "edit params.yaml, or start over with 'nightly configure PRESET'")
    return ok("params.yaml is valid")


def gpu(case: Case) -> Finding:
    """A GPU, where training asks for one."""
    if not getattr(case.settings.get("train"), "require_gpu", False):
        return ok("none is required" + (", one is present" if gpu_present() else ""))
    remedy = "check 'nvidia-smi' and that the extra 'gpu' is installed, or set train.require_gpu to false"
    if not gpu_present():
        return fail("train.require_gpu is true, but no GPU is present", remedy)
    code = "from tasks.device import prepare_device; d = prepare_device(True, only_look=True)\n"
    code += "print(f'{d.count} × {d.name}, {d.driver}')"
    try:
        return ok(python(case.root, code, 60).strip())
    except NightlyError as error:
        return fail(str(error), remedy)


def notifications(case: Case) -> Finding:
    """The addresses that are told of a night; nobody is told anything now."""
    addresses = getattr(case.settings.get("retrain"), "notify", ())
    if found := faults(addresses):
        return fail("; ".join(found), "mend retrain.notify, or set the variable where the nights run")
    return ok(f"{len(addresses)} addresses" if addresses else "nobody is told; retrain.notify names addresses")


# --- the workspace


def git(case: Case) -> Finding:
    """The repository that keeps the history."""
    try:
        head = output(["git", "rev-parse", "--symbolic-full-name", "HEAD"], case.root, 10).strip()
    except NightlyError as error:
        if "dubious ownership" in str(error):
            return fail(str(error), f"git config --global --add safe.directory {case.root}")
        if "ambiguous argument 'HEAD'" in str(error) or "Needed a single revision" in str(error):
            return warn("a repository without a commit", "git add . && git commit")
        return fail(str(error), "git init, or work in a clone")
    folder = Path(output(["git", "rev-parse", "--absolute-git-dir"], case.root, 10).strip())
    if _is_old(folder / "index.lock"):
        return fail("a killed git left its lock behind: nothing can be committed", f"rm {folder / 'index.lock'}")
    publish = getattr(case.settings.get("retrain"), "publish", "none")
    if head == "HEAD":
        finding = warn if publish == "none" else fail
        return finding("no branch is checked out, so that nothing can be committed to it", "git switch BRANCH")
    if publish == "push" and not _has_upstream(case.root):
        return fail("retrain.publish is push, but the branch has no upstream", "git push --set-upstream REMOTE BRANCH")
    changed = output(["git", "status", "--porcelain"], case.root, 20).splitlines()
    branch = head.removeprefix("refs/heads/")
    if changed:
        return warn(f"on branch {branch}, {len(changed):,} files are changed or new", "git status; git commit")
    return ok(f"on branch {branch}, everything is committed")


def _has_upstream(root: Path) -> bool:
    try:
        return bool(output(["git", "rev-parse", "--symbolic-full-name", "@{upstream}"], root, 10).strip())
    except NightlyError:
        return False


def _is_old(path: Path) -> bool:
    try:
        return datetime.now().timestamp() - path.stat().st_mtime > 600
    except FileNotFoundError:
        return False


def dvc_works(case: Case) -> Finding:
    """DVC reads its files, may write its cache, and nobody who is dead holds it."""
    lock = case.root / "dvc.lock"
    if reason := stale_notes(case.root):
        return fail(f"DVC's notes on who is at work are wrong, and block it: {reason}", "nightly doctor --fix")
    torn = [path for path in (lock,) if path.exists() and not is_lock_file(path)] + torn_pointers(case.workspace)
    if torn:
        return fail(f"{case.workspace.shown(torn[0])} is torn, which blocks DVC", "nightly doctor --fix")
    try:
        names = dvc(case.root, "stage", "list", "--name-only", "dvc.yaml").split()
    except NightlyError as error:
        return fail(str(error), "mend what it names; 'git diff' shows what has changed")
    cache = cache_folder(case)
    writable = existing(cache)
    if not os.access(writable, os.W_OK | os.X_OK):
        return fail(f"the cache {cache} may not be written", f"give this user the right to write {writable}")
    if holders := _at_work(case.root):
        return warn(f"in use by {holders}", "wait for it to end")
    return ok(f"{len(names)} stages, the cache is {cache}")


def _at_work(root: Path) -> str:
    """Return whom DVC's notes name, as far as they are there."""
    try:
        notes = read_json(root / ".dvc" / "tmp" / "rwlock")
    except (FileNotFoundError, ValueError):
        return ""
    holders = [
        *notes.get("write", {}).values(),
        *(holder for each in notes.get("read", {}).values() for holder in each),
    ]
    there = {f"'{holder['cmd']}' (process {holder['pid']})" for holder in holders if process_mark(holder["pid"])}
    return ", ".join(sorted(there))


def lock(case: Case) -> Finding:
    """Who holds the workspace."""
    try:
        owner = read_json(case.workspace.state / "owner.json")
        pid, since = int(owner["pid"]), datetime.fromisoformat(owner["since"])
    except FileNotFoundError:
        return ok("nobody is at work here")
    who = f"'{owner['command']}' (process {pid} on {owner['host']}) since {since:%Y-%m-%d %H:%M}"
    if owner["host"] != socket.gethostname():
        return warn(f"held by {who}, as far as can be told from here", f"look at process {pid} on {owner['host']}")
    if process_mark(pid) is None or started_after(pid, since.timestamp()):
        return warn(f"a note of {who}, which was killed; the lock itself is free", "nightly doctor --fix")
    return ok(f"held by {who}")


def left_behind(case: Case) -> Finding:
    """What killed runs left."""
    workspace = case.workspace
    if found := leftovers(workspace):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return warn(f"{workspace.shown(found[0])}{more} of killed runs", "nightly doctor --fix, or the next night")
    try:
        hopeless = list(hopeless_predictions(workspace))
    except NightlyError:  # a matter of the champion's pointer, which has a check of its own
        hopeless = []
    if hopeless:
        more = f", and {len(hopeless) - 1} more" if len(hopeless) > 1 else ""
        return warn(hopeless[0] + more, "remove it, if nobody wants to repeat its command")
    return ok("nothing of killed runs")


def disk(case: Case) -> Finding:
    """Room for the next run: all that is made anew, once in its place and once in DVC's cache."""
    workspace = case.workspace
    made = sum(map(_size, (workspace.prepared, workspace.models / "candidate", workspace.exported)))
    here = made + _size(workspace.exported) + _size(workspace.state / "training") if made else FIRST_RUN_BYTES
    cache = cache_folder(case)
    places = {case.root: here}
    there = existing(cache)
    if there.stat().st_dev == case.root.stat().st_dev:
        places[case.root] += made
    else:
        places[there] = made
    lines: list[tuple[float, str]] = []
    for place, need in places.items():
        free = shutil.disk_usage(place).free
        share = free / max(need, 1)
        lines.append((share, f"{_gigabytes(free)} free in {place}, the next run needs about {_gigabytes(need)}"))
    share, text = min(lines)
    if share < 2:
        finding = fail if share < 1 else warn
        return finding(text, "remove old predictions and models, 'dvc gc --workspace', or get a larger disk")
    return ok(text)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def success(case: Case) -> Finding:
    """When a night ended well for the last time."""
    last = last_success(case.workspace)
    remedy = "look at the last run's log in .nightly/logs, and whether 'nightly serve' runs"
    limit = case.max_age_hours
    if last is None:
        text = "no night has ended well yet"
        return fail(text, remedy) if limit is not None else warn(text, "nightly retrain")
    age = datetime.now().astimezone() - last
    text = f"the last night that ended well was {last.astimezone():%Y-%m-%d %H:%M}"
    if limit is not None and age > timedelta(hours=limit):
        return fail(f"{text}, more than {limit:g} h ago", remedy)
    return ok(text)
