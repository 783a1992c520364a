"""The study's flow: what is missing is trained, by supervised children, and nothing else; problems are named."""

import json
import textwrap

import pytest

from flows import study as flows_study
from flows.workspace import Workspace
from tasks.errors import Interrupted, NightlyError
from tests.miniature import Miniature
from tests.test_study import made_up

#: Stands for tasks/study_run.py: leaves the result that the knobs ask for, and a line for each training.
RUN = """
    import argparse, json, pathlib, sys
    parser = argparse.ArgumentParser()
    for name in ("--network", "--seed", "--prepared", "--results", "--scratch", "--params", "--threads"):
        parser.add_argument(name)
    args = parser.parse_args()
    knobs = json.loads(pathlib.Path("knobs.json").read_text())
    with open("trained.txt", "a") as file:
        file.write(f"{args.network} {args.seed} {args.threads}\\n")
    if args.network == knobs["failing"]:
        sys.exit("error: training diverged in iteration 3 of 6")
    if args.network == knobs["interrupted"]:
        print("interrupted: training stopped by SIGTERM after iteration 2 of 6", file=sys.stderr)
        sys.exit(75)
    results = pathlib.Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    for name, result in knobs["results"].items():
        if name.startswith(f"{args.network}-seed{args.seed}-"):
            (results / name).write_text(json.dumps(result))
"""

PARAMS = """
    study:
      networks: [plain20, resnet20]
      seeds: [1, 2]
      iterations: 6
      evaluate_every: 2
      parallel: 2
    augment: {flip_horizontal: true}
"""

STAGES = """
    stages:
      prepare:
        cmd: mkdir -p data/prepared && cp facts.json data/prepared/prepared.json
        deps: [facts.json]
        outs: [data/prepared]
      train:
        cmd: exit 1
        deps: [data/prepared]
        outs: [models/exported]
"""


@pytest.fixture
def workspace(server, tmp_path, monkeypatch) -> Workspace:
    """A workspace whose data come out of a file and whose trainings take no time."""
    from tasks.params import read_section
    from tasks.study import AugmentParams, StudyParams, trials

    small = Miniature(tmp_path)
    for path, content in {
        "dvc.yaml": STAGES,
        "params.yaml": PARAMS,
        "tasks/study_run.py": RUN,
        "facts.json": '{"data_digest": "d1", "source": {"source": "cifar10"}}',
    }.items():
        (tmp_path / path).write_text(textwrap.dedent(content))
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "prepared.json").write_text('{"data_digest": "d1"}')
    params, augment = (
        read_section(tmp_path / "params.yaml", name, schema)
        for name, schema in (("study", StudyParams), ("augment", AugmentParams))
    )
    planned = trials(tmp_path / "again", params, augment)
    results = {trial.file_name: made_up(trial.network, trial.seed, 0.4 + trial.seed / 100) for trial in planned}
    small.set(results=results, failing=None, interrupted=None)
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


def trained(workspace: Workspace) -> list[str]:
    """Return the trainings that were started since the last look, in alphabetical order."""
    file = workspace.root / "trained.txt"
    lines = sorted(line.rsplit(" ", 1)[0] for line in file.read_text().splitlines()) if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def turn(workspace: Workspace, **knobs) -> None:
    file = workspace.root / "knobs.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | knobs))


@pytest.mark.slow
def test_only_what_is_missing_is_trained(workspace):
    everything = ["plain20 1", "plain20 2", "resnet20 1", "resnet20 2"]
    # One network diverges: the others are trained and reported on all the same.
    turn(workspace, failing="resnet20")
    with pytest.raises(NightlyError, match=r"2 of 4 trainings failed .*training diverged in iteration 3 of 6"):
        flows_study.study()
    assert trained(workspace) == everything
    found = json.loads((workspace.models / "study" / "report" / "study.json").read_text())
    assert [row["network"] for row in found["networks"]] == ["plain20"]

    turn(workspace, failing=None, interrupted="resnet20")
    with pytest.raises(Interrupted, match="resnet20 seed 1 will go on from its checkpoint"):
        flows_study.study(return_state=True).result()
    assert trained(workspace) == everything[2:]

    turn(workspace, interrupted=None)
    studied = flows_study.study()
    assert trained(workspace) == everything[2:]
    assert studied.trained == "2 of 4 in this run"
    assert (studied.report.parent / "figure.png").is_file()
    assert "for CIFAR-10 after 64,000 iterations" in studied.report.read_text()

    again = flows_study.study()
    assert trained(workspace) == []
    assert (again.trained, again.headline) == ("0 of 4 in this run", studied.headline)
    # Other data are other trainings, but here the stand-in leaves the results of the old ones.
    (workspace.root / "facts.json").write_text('{"data_digest": "d2"}')
    with pytest.raises(NightlyError, match="the data or the code changed while the study went on"):
        flows_study.study()
    assert trained(workspace) == everything
