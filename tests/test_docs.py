"""What the README and docs/ say exists: commands, options, links, parameters, findings, units."""

import configparser
import re
from pathlib import Path

import pytest
import typer

from flows.cli import app
from flows.doctor import CHECKS
from flows.reference import keys, render
from flows.settings import RetrainParams, schemas

PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
UNITS = sorted(Path("docs/systemd").glob("*.service"))
COMMANDS = typer.main.get_command(app).commands
OPTIONS = {name: {option for given in command.params for option in given.opts} for name, command in COMMANDS.items()}
#: Options of other programs that stand by themselves.
OTHERS = {"--all-commits", "--cloud", "--dry"}
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")


def code_of(page: Path) -> list[str]:
    """Return what a page has in code: the lines of its blocks, where a backslash goes on, and its spans."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands_in(line: str) -> list[tuple[str, list[str]]]:
    """Return name and options of each ``nightly`` command in a line of code."""
    found = []
    for part in re.split(r"&&|\||;|'(?=nightly )", re.sub(r"\s#.*", "", line)):
        if match := re.match(r"\s*(?:\S*/)?nightly ([a-z]+)\b(.*)", part):
            found.append((match[1], re.findall(r"(?<!\S)--[a-z-]+", match[2])))
    return found


def anchors(page: Path) -> set[str]:
    """Return the names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_of_the_parameters_is_fresh():
    hint = "run 'python -m flows.reference > docs/configuration.md'"
    assert Path("docs/configuration.md").read_text() == render(), hint


@pytest.mark.parametrize("section", schemas())
def test_every_parameter_is_explained(section):
    for key, allowed, _, text in keys(schemas()[section], f"{section}."):
        assert allowed, key
        assert len(text.split()) > 1, f"the docstring says nothing of {key} under Attributes"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_and_options_exist(page):
    for line in code_of(page):
        for name, options in commands_in(line):
            assert name in COMMANDS, f"{page}: there is no such command: {line}"
            assert set(options) <= OPTIONS[name], f"{page}: nightly {name} has no such option: {line}"
        if match := re.match(r"--[a-z-]+", line):
            assert match[0] in set().union(*OPTIONS.values()) | OTHERS, f"{page}: no command has {match[0]}"


def test_the_check_of_commands_sees_what_is_wrong():
    assert commands_in("cd x && nightly retrain --force a/b --x  # nightly foo") == [("retrain", ["--force", "--x"])]
    assert commands_in("busy: 'nightly foo' since") == [("foo", [])]
    assert commands_in(".venv/bin/nightly doctor --max-age 36h --json | jq") == [("doctor", ["--max-age", "--json"])]
    assert commands_in("sudo systemctl stop nightly prefect-server") == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page}: there is no {target}"
        if anchor:
            assert anchor in anchors(file), f"{page}: {file} has no heading for #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_parameters_exist(page):
    known = {key for name, schema in schemas().items() for key, *_ in keys(schema, f"{name}.")}
    for span in code_of(page):
        # A file such as train.py is none, nor is a method such as model.predict, which the benchmarks name.
        found = re.match(rf"(?:{'|'.join(schemas())})\.[a-z_.]+(?=$|[:\[ ])", span)
        if found and found[0] != "model.predict" and not re.search(r"\.(py|log|json|html)$", found[0]):
            assert found[0] in known, f"{page}: there is no parameter {found[0]}"


def test_every_finding_of_the_doctor_is_explained():
    section = Path("docs/operating.md").read_text().partition("## What the doctor says")[2].partition("\n## ")[0]
    assert re.findall(r"^\| ([a-z ]+) \|", section, re.MULTILINE)[1:] == list(CHECKS)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_gives_a_stage_time_to_save_and_starts_what_there_is(unit):
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read_string(unit.read_text())
    service = parser["Service"]
    for name, options in commands_in(service["ExecStart"]):
        assert name in COMMANDS
        assert set(options) <= OPTIONS[name]
    assert "DO_NOT_TRACK=1" in unit.read_text()
    assert "PREFECT_SERVER_ANALYTICS_ENABLED=false" in unit.read_text()
    if unit.stem in ("nightly", "nightly-worker"):
        assert int(service["TimeoutStopSec"]) > RetrainParams().stop_grace_seconds
        assert service["KillMode"] == "mixed"
