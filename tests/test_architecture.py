"""Who may import whom: checked on what is really loaded, and by a contract that fails when it is broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEEP_LEARNING = {"tensorflow", "keras", "openvino", "jax"}
ORCHESTRATION = {"prefect", "dvc", "flows"}
#: The one module that needs Keras to define its classes; nobody imports it before it is needed.
NEEDS_KERAS = {"layers"}


def loaded_by(module: str, suspects: set[str]) -> set[str]:
    """Return which of ``suspects`` a fresh interpreter has loaded after importing ``module``."""
    program = f"import sys, {module}; print(*({suspects!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", sorted(f"flows.{path.stem}" for path in (ROOT / "flows").glob("[!_]*.py")))
def test_flows_load_no_deep_learning_library(module):
    assert loaded_by(module, DEEP_LEARNING) == set()


def test_validating_all_parameters_loads_none_either():
    program = (
        "import sys; from pathlib import Path; from flows.settings import read_settings\n"
        "read_settings(Path('params.yaml'))\n"
        f"print(*({DEEP_LEARNING!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "module", sorted(f"tasks.{path.stem}" for path in (ROOT / "tasks").glob("[!_]*.py") if path.stem not in NEEDS_KERAS)
)
def test_tasks_load_neither_orchestration_nor_deep_learning(module):
    assert loaded_by(module, DEEP_LEARNING | ORCHESTRATION) == set()


def test_the_command_line_loads_nothing_heavy():
    assert loaded_by("flows.cli", DEEP_LEARNING | {"prefect", "dvc", "numpy", "pandas", "pyarrow", "cv2"}) == set()


# --- the contract itself


def lint_imports(root: Path) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    # -P and the copy's folder first on the path: the copy is what is judged, not what is installed.
    return subprocess.run(command, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path):
    for package in ("flows", "tasks"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def test_the_import_contracts_are_kept(copy):
    done = lint_imports(copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("tasks/files.py", "import prefect", "tasks know neither the orchestrator nor DVC"),
        ("tasks/files.py", "import dvc.api", "tasks know neither the orchestrator nor DVC"),
        ("tasks/files.py", "from flows import child", "tasks know neither the orchestrator nor DVC"),
        ("flows/stages.py", "import tensorflow", "flows import no deep-learning library themselves"),
        ("flows/stages.py", "def late():\n    import openvino", "flows import no deep-learning library themselves"),
    ],
)
def test_a_broken_contract_is_found(copy, module, line, contract):
    with (copy / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint_imports(copy)
    assert done.returncode == 1
    assert f"{contract} BROKEN" in done.stdout
