import re
import subprocess
import tomllib
from pathlib import Path

import pytest

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def normal(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-")


def test_every_dependency_says_why_it_is_there():
    lines = Path("pyproject.toml").read_text().splitlines()
    groups = [PROJECT["dependencies"], PROJECT["optional-dependencies"]["dev"]]
    for requirement in (requirement for group in groups for requirement in group):
        line = next(line for line in lines if f'"{requirement}"' in line and line.startswith("    "))
        assert "#" in line, f"{requirement} has no comment in pyproject.toml"


def test_the_extras_that_people_are_told_of_exist():
    assert {"gpu", "dask", "ray", "s3", "dev"} == set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("extra", ["", "-gpu"])
def test_every_dependency_is_locked_with_hashes_and_without_an_address(extra):
    lock = Path(f"requirements{extra}.lock").read_text()
    locked = set(re.findall(r"^([a-z0-9._-]+)(?:\[[^]]*\])?==", lock, re.MULTILINE))
    wanted = {normal(name) for name in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])}
    assert wanted <= locked
    assert any(name.startswith("nvidia-cudnn") for name in locked) == bool(extra)
    assert "://" not in lock
    assert not re.search(r"^(-i|--index-url|--extra-index-url|--find-links|-f)\b", lock, re.MULTILINE)
    blocks = re.split(r"^(?=[a-z0-9._-]+(?:\[[^]]*\])?==)", lock, flags=re.MULTILINE)[1:]
    assert len(blocks) > 100
    assert all("--hash=sha256:" in block for block in blocks)


def test_make_lists_its_targets():
    shown = subprocess.run(["make", "help"], check=True, capture_output=True, text=True).stdout
    for target in ("setup", "run", "test", "check", "bench"):
        assert re.search(rf"^{target}\s+\S", shown, re.MULTILINE), shown


def test_continuous_integration_runs_what_the_readme_says():
    assert "make test" in Path(".ci/run").read_text()
    assert "make test" in Path("README.md").read_text()
    assert Path(".ci/run").stat().st_mode & 0o111
