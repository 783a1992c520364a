"""Who may import whom: checked on what is really loaded, and by a contract that fails when it is broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEEP_LEARNING = {"tensorflow", "keras", "openvino", "jax"}
ORCHESTRATION = {"prefect", "dvc", "flows"}
#: The modules that need Keras to define their classes; nobody imports them before they are needed.
NEEDS_KERAS = {"layers", "learner", "mixing"}


def modules_of(package: str) -> list[str]:
    names = (path.stem for path in (ROOT / package).glob("[!_]*.py"))
    return sorted(f"{package}.{name}" for name in names if name not in NEEDS_KERAS)


def first_offender(program: str, suspects: set[str]) -> str:
    """Run lines of Python in a fresh interpreter; return the first one after which a suspect is loaded."""
    watched = (
        "import sys\n"
        f"for line in {program.splitlines()!r}:\n"
        "    exec(line)\n"
        f"    if found := {suspects!r} & set(sys.modules):\n"
        "        sys.exit(f'{line} loads {sorted(found)}')\n"
    )
    done = subprocess.run([sys.executable, "-c", watched], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stderr


def test_flows_load_no_deep_learning_library_even_to_validate_all_parameters():
    program = [f"import {module}" for module in modules_of("flows")]
    program += ["import pathlib", "flows.settings.read_settings(pathlib.Path('params.yaml'))"]
    assert first_offender("\n".join(program), DEEP_LEARNING) == ""


def test_tasks_load_neither_orchestration_nor_deep_learning():
    program = "\n".join(f"import {module}" for module in modules_of("tasks"))
    assert first_offender(program, DEEP_LEARNING | ORCHESTRATION) == ""


def test_the_command_line_loads_nothing_heavy():
    heavy = DEEP_LEARNING | {"prefect", "dvc", "numpy", "pandas", "pyarrow", "cv2"}
    assert first_offender("import flows.cli", heavy) == ""


def test_an_offender_is_named():
    assert "import json loads ['json']" in first_offender("import os\nimport json", {"json"})


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
