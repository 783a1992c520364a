"""dvc.yaml is the only graph: its code dependencies are the closure of each stage's imports, its parameters theirs."""

import ast
from pathlib import Path

import pytest
import yaml

STAGES = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
ROOT = Path("tasks")


def imported_modules(module: Path) -> set[Path]:
    """Return the tasks modules that a module imports, also inside functions, and the templates it names."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tasks":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {path for name in [node.module, *names] if (path := as_path(name)).is_file()}
        elif isinstance(node, ast.Import):
            found |= {path for alias in node.names if (path := as_path(alias.name)).is_file()}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".html"):
            template = ROOT / "templates" / Path(node.value).name
            if template.is_file():
                found.add(template)
    return found


def as_path(dotted: str) -> Path:
    return Path(*dotted.split(".")).with_suffix(".py")


def closure(stage: str) -> set[str]:
    """Return every file of tasks/ that a stage's module reaches; package markers hold no code and do not count."""
    seen: set[Path] = set()
    todo = [ROOT / f"{stage}.py"]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        if path.suffix == ".py":
            todo += imported_modules(path)
        else:
            todo += [path.parent / name for name in templates_of(path)]
    return {path.as_posix() for path in seen}


def templates_of(template: Path) -> list[str]:
    """Return the templates that a template includes or extends."""
    words = template.read_text().split('"')
    return [word for word in words if word.endswith(".html") and (template.parent / word).is_file()]


def test_stage_names_are_the_words_of_the_project():
    assert list(STAGES) == ["download", "prepare", "augment", "train", "export", "evaluate"]
    for name, stage in STAGES.items():
        assert (ROOT / f"{name}.py").is_file()
        assert stage["cmd"].startswith(f"python -m tasks.{name} ")
        assert name in stage["params"]
        assert stage["desc"]


@pytest.mark.parametrize("name", list(STAGES))
def test_code_dependencies_are_the_import_closure(name):
    listed = {dependency for dependency in STAGES[name]["deps"] if dependency.startswith("tasks/")}
    assert listed == closure(name), "fix with: the right-hand side is what dvc.yaml must list"


@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_depends_on_exactly_the_paths_its_command_reads(name):
    words = STAGES[name]["cmd"].split()[3:]
    paths = dict(zip(words[::2], words[1::2], strict=True))
    writes = {path for option, path in paths.items() if option in ("--out", "--card", "--preview")}
    # What outlives a run and what is in service are no inputs: a new champion makes no training stale.
    reads = {path for option, path in paths.items() if option not in ("--scratch", "--models")} - writes
    listed = {dependency for dependency in STAGES[name]["deps"] if not dependency.startswith("tasks/")}
    assert listed == reads
    for kind in ("outs", "metrics", "plots"):
        for entry in STAGES[name].get(kind, []):
            path = entry if isinstance(entry, str) else next(iter(entry))
            assert any(Path(path).is_relative_to(written) for written in writes)


def test_the_closure_sees_imports_inside_functions():
    assert "tasks/layers.py" in closure("train")


def test_every_parameter_section_of_a_stage_is_read_by_its_module():
    for name, stage in STAGES.items():
        source = (ROOT / f"{name}.py").read_text()
        for section in stage["params"]:
            assert f'read_section(args.params, "{section}"' in source, f"{name} lists {section} but does not read it"


def test_stages_stand_in_the_order_in_which_they_must_run():
    written: set[str] = set()
    for name, stage in STAGES.items():
        outputs = {entry if isinstance(entry, str) else next(iter(entry)) for entry in stage["outs"]}
        for earlier in STAGES.values():
            if earlier is stage:
                break
            assert not outputs & set(earlier["deps"]), f"{name} stands after a stage that reads what it writes"
        written |= outputs
    assert "models/exported" in written
