"""The command line as a person meets it: what it prints, and how it fails."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flows import cli
from flows.settings import read_settings
from flows.workspace import Workspace, locked
from tasks import promote as registry
from tasks.errors import NightlyError
from tests.miniature import Miniature, export, metrics

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["configure", "retrain", "predict", "explain", "study", "serve", "history", "promote", "rollback", "doctor"]


@pytest.fixture
def nightly(monkeypatch, capsys):
    """Return a function that runs a command and returns its exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nightly", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Workspace:
    """A workspace with the project's own presets and two registered models, the second in service."""
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / ".dvc").mkdir()
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copyfile(ROOT / "presets" / "digits.yaml", tmp_path / "params.yaml")
    models = tmp_path / "models"
    for model_id, accuracy in (("aaa", 0.9), ("bbb", 0.95)):
        registry.register(*export(tmp_path / "exports" / model_id, model_id, accuracy), models / "registry")
    registry.promote(models, "aaa", registry.Verdict("promote", ["the first model"]))
    registry.promote(models, "bbb", registry.Verdict("promote", ["better"]), metrics("aaa", 0.9))
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


def failed(result: tuple[int, str, str], code: int = 1) -> str:
    """Check that a command failed with one line on standard error, and return that line."""
    assert result[0] == code
    assert result[1] == ""
    assert result[2].startswith("error: ")
    assert result[2].count("\n") == 1
    return result[2].removeprefix("error: ").strip()


# --- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(nightly, command):
    code, out, err = nightly(command, "--help")
    assert (code, err) == (0, "")
    assert f"Example: nightly {command}" in out


def test_help_lists_every_command_and_loads_nothing_heavy():
    program = (
        "import sys\nfrom flows.cli import main\nsys.argv = ['nightly', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit:\n    print('LOADED', *{'prefect', 'numpy', 'pyarrow', 'dvc'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    text, loaded = done.stdout.split("LOADED")
    assert all(f" {command} " in text for command in COMMANDS)
    assert loaded.split() == []


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predcit"], "No such command 'predcit'"),
        (["predict"], "Missing argument 'SOURCE'; see 'nightly predict --help'"),
        (["predict", "x", "--topk", "3"], "No such option: --topk"),
        (["predict", "x", "--workers", "2"], "Invalid value: --address and --workers need --on"),
        (["history", "--limit", "many"], "Invalid value for '--limit'"),
    ],
)
def test_a_slip_of_the_keyboard_is_one_line(nightly, workspace, arguments, message):
    assert failed(nightly(*arguments), code=2).startswith(message)


@pytest.mark.parametrize("arguments", [[command] for command in COMMANDS if command != "promote"] + [["promote", "x"]])
def test_outside_of_a_workspace_every_command_says_so(nightly, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] in ("predict", "explain"):
        arguments = [*arguments, "."]
    assert "is in no workspace: go to the folder that holds dvc.yaml" in failed(nightly(*arguments))


def test_the_version_is_that_of_the_package(nightly, tmp_path, monkeypatch):
    version = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
    monkeypatch.chdir(tmp_path)
    assert nightly("--version") == (0, f"nightly {version}\n", "")


def test_a_full_disk_is_one_line(nightly, workspace, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "params.yaml")

    monkeypatch.setattr("flows.configure.shutil.copyfile", full)
    assert failed(nightly("configure", "cifar10")) == (
        "the disk is full (params.yaml): free some space and run the same command again"
    )
    assert (workspace.params).read_bytes() == (ROOT / "presets" / "digits.yaml").read_bytes()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/api", "no Prefect server answers at PREFECT_API_URL=http://127.0.0.1:9/api"),
        (None, "a schedule needs a Prefect server that stays: start one with 'prefect server start'"),
    ],
)
def test_serving_without_a_server_says_how_to_start_one(workspace, url, message, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path / "home")} | ({"PREFECT_API_URL": url} if url else {})
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "serve"], env=environment, capture_output=True, text=True, check=False
    )
    assert message in failed((done.returncode, done.stdout, done.stderr))


# --- configure


def test_the_presets_are_listed(nightly, workspace):
    code, out, _ = nightly("configure", "--list")
    assert code == 0
    names = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))
    assert [line.split(":")[0] for line in out.splitlines()] == names


def test_a_preset_replaces_the_parameters_and_shows_what_changes(nightly, workspace):
    code, out, _ = nightly("configure", "cifar10")
    assert code == 0
    assert workspace.params.read_bytes() == (ROOT / "presets" / "cifar10.yaml").read_bytes()
    [line] = [line for line in out.splitlines() if line.startswith("download.source")]
    assert line.split() == ["download.source", "digits", "cifar10"]
    assert "params.yaml is preset cifar10" in out
    assert not (workspace.root / "params.yaml.bak").exists()


def test_own_edits_are_kept_aside(nightly, workspace):
    edited = workspace.params.read_text() + "\n# mine\n"
    workspace.params.write_text(edited)
    _, out, _ = nightly("configure", "digits")
    assert "your own edits are kept in params.yaml.bak" in out
    assert "params.yaml is preset digits already, in content" in out
    assert (workspace.root / "params.yaml.bak").read_text() == edited


def test_an_unknown_preset_is_answered_with_the_nearest(nightly, workspace):
    assert failed(nightly("configure", "cifar")) == "no preset 'cifar': did you mean 'cifar10'?"


def test_a_broken_preset_changes_nothing(nightly, workspace):
    before = workspace.params.read_bytes()
    (workspace.presets / "mine.yaml").write_text("train: {epohcs: 3}")
    assert "unknown key 'train.epohcs', did you mean 'epochs'?" in failed(nightly("configure", "mine"))
    assert workspace.params.read_bytes() == before


def test_a_broken_parameter_file_can_be_replaced(nightly, workspace):
    workspace.params.write_text("train: [")
    assert nightly("configure", "digits")[0] == 0
    assert (workspace.root / "params.yaml.bak").read_text() == "train: ["


def test_parameters_do_not_change_under_a_running_night(nightly, workspace):
    with locked(workspace, "nightly retrain"):
        assert "the workspace is busy: 'nightly retrain' (process" in failed(nightly("configure", "cifar10"))


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "presets").glob("*.yaml")))
def test_every_preset_is_valid(preset):
    read_settings(ROOT / "presets" / f"{preset}.yaml")


def test_an_unknown_section_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "params.yaml").write_text("trian: {}")
    with pytest.raises(NightlyError, match=r"unknown section 'trian', did you mean 'train'\?"):
        read_settings(tmp_path / "params.yaml")


# --- history, promote, rollback


def test_history_shows_decisions_and_marks_the_one_that_counts(nightly, workspace):
    registry.hold(workspace.models, registry.Verdict("hold", ["worse"]), metrics("bbb", 0.95), None, "d1")
    code, out, _ = nightly("history")
    assert code == 0
    first, second, third = out.splitlines()[1:4]
    assert first.split()[2:] == ["promote", "aaa", "90.00%", "–", "the", "first", "model"]
    assert second.split()[2:] == ["promote", "bbb", "*", "95.00%", "90.00%", "better"]
    assert third.split()[2:] == ["hold", "bbb", "95.00%", "–", "worse"]
    assert "* in service: bbb" in out
    assert "aaa" not in nightly("history", "--limit", "1")[1]


def test_history_of_nothing_says_what_makes_the_first_entry(nightly, workspace):
    (workspace.models / "ledger.jsonl").unlink()
    assert nightly("history")[:2] == (0, "no decisions yet: 'nightly retrain' makes the first\n")


def test_rollback_and_promote_move_the_champion_and_are_written_down(nightly, workspace):
    assert nightly("rollback", "--reason", "too slow")[:2] == (0, "in service: aaa (before: bbb)\n")
    assert registry.champion_id(workspace.models) == "aaa"
    assert nightly("promote", "bbb")[:2] == (0, "in service: bbb (before: aaa)\n")
    rolled_back, promoted = registry.history(workspace.models)[-2:]
    assert (rolled_back.action, rolled_back.id, rolled_back.reasons) == ("rollback", "aaa", ["too slow"])
    assert (promoted.action, promoted.id, promoted.reasons) == ("promote", "bbb", ["by hand"])


def test_models_that_are_not_there_or_in_service_already_are_refused(nightly, workspace):
    assert failed(nightly("promote", "bba")) == "no model 'bba' in the registry: did you mean 'bbb'?"
    assert failed(nightly("promote", "bbb")) == "bbb is the champion already"
    assert failed(nightly("rollback", "bbb")) == "bbb is the champion already"
    with locked(workspace, "nightly retrain"):
        assert "the workspace is busy" in failed(nightly("rollback"))


@pytest.mark.slow
def test_a_held_model_is_promoted_by_hand_and_a_pruned_one_fetched(nightly, tmp_path, monkeypatch):
    Miniature(tmp_path)
    for model_id in ("aaa", "bbb"):
        exported, evaluation = export(tmp_path / "exports", model_id)
        shutil.copytree(exported, tmp_path / "models" / "exported", dirs_exist_ok=True)
        shutil.copytree(evaluation, tmp_path / "models" / "evaluation", dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path / "data")  # anywhere in the workspace will do
        assert nightly("promote", model_id)[0] == 0
    assert registry.champion_id(tmp_path / "models") == "bbb"
    shutil.rmtree(tmp_path / "models" / "registry" / "aaa")
    assert nightly("rollback")[:2] == (0, "fetching aaa from DVC's storage\nin service: aaa (before: bbb)\n")
    assert (tmp_path / "models" / "registry" / "aaa" / "model.keras").read_text() == "weights of aaa"


# --- predict


def test_predicting_without_a_model_says_what_to_do(nightly, workspace):
    (workspace.models / "champion.json").unlink()
    assert failed(nightly("predict", ".")) == "no model yet: run 'nightly retrain', or name one with --model"


def test_a_wrong_option_names_what_is_allowed(nightly, workspace):
    message = failed(nightly("predict", ".", "--engine", "torch"))
    assert message.startswith("nightly predict: 'predict.engine': input should be 'auto', 'keras' or 'openvino'")


@pytest.mark.slow
def test_a_folder_is_classified_with_the_options_given(nightly, workspace, exported, tmp_path):
    import pandas as pd

    from tasks.images import encode_png
    from tests.conftest import COLORS, colored_image

    folder = tmp_path / "colors"
    folder.mkdir()
    for name in COLORS:
        (folder / f"{name}.png").write_bytes(encode_png(colored_image(name, 7)))
    (folder / "broken.png").write_bytes(b"no image")
    code, out, _ = nightly(
        "predict", folder, "--model", exported, "--engine", "keras", "--top-k", 2, "--threshold", 0, "--out", "labels"
    )
    assert code == 0
    assert "4 (3 ok, 1 not_an_image)" in out
    assert "labels/predictions.parquet" in out
    table = pd.read_parquet("labels/predictions.parquet").set_index("path")
    assert [table.label[f"{name}.png"] for name in COLORS] == list(COLORS)
    assert [len(table["labels"][f"{name}.png"]) for name in COLORS] == [2, 2, 2]


@pytest.mark.slow
def test_a_folder_is_shown_sorted_and_held_to_its_failures(nightly, workspace, exported, tmp_path):
    from tasks.images import encode_png
    from tests.conftest import COLORS, colored_image

    folder = tmp_path / "colors"
    folder.mkdir()
    for name in COLORS:
        (folder / f"{name}.png").write_bytes(encode_png(colored_image(name, 7)))
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("x")
    (folder / "other.jpg").write_bytes(b"")
    arguments = ("predict", "colors", "--model", exported, "--threshold", 0, "--exclude", "*.jpg", "--format", "jsonl")
    code, out, _ = nightly(*arguments, "--report", "--sort-into", "sorted", "--copy", "--out", "labels")
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.replace("left out", "left_out").splitlines())
    assert lines["left_out"] == "1 hidden and side files, 1 by include and exclude"
    assert lines["report"] == "labels/report.html"
    assert lines["sorted"] == "3 copies in sorted, 1 failed"
    assert (tmp_path / "labels" / "predictions.jsonl").is_file()
    assert sorted(str(path.relative_to(tmp_path / "sorted")) for path in (tmp_path / "sorted").rglob("*.png")) == [
        f"{name}/{name}.png" for name in sorted(COLORS)
    ]
    code, out, err = nightly(*arguments, "--max-failed", "20%", "--out", "labels")
    assert (code, "4 (3 ok, 1 not_an_image)" in out) == (3, True)
    assert err.startswith(
        "error: 1 of 4 files failed (1 not_an_image), allowed: 20% with --max-failed; every row is in"
    )
    code, _, err = nightly(*arguments, "--copy")
    assert (code, err) == (2, "error: Invalid value: --copy needs --sort-into; see 'nightly predict --help'\n")


# --- retrain, as a process of its own


@pytest.mark.slow
def test_a_whole_night_in_a_terminal(tmp_path):
    miniature = Miniature(tmp_path)
    miniature.incoming("a.png")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment["PREFECT_HOME"] = str(tmp_path / "home")
    # From a folder below: relative paths of the stages must not depend on where it was typed.
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "retrain"],
        cwd=tmp_path / "data",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[2:])
    assert done.stdout.startswith("starting a temporary Prefect server")
    assert lines["verdict"].startswith("promoted: the first model")
    assert lines["accuracy"] == "90.00% on 100 test images"
    assert (tmp_path / lines["predictions"]).is_file()
    assert (tmp_path / lines["report"]).is_file()
    # Nothing but the stages' own lines, in order, each once and plain.
    words = [line.split(maxsplit=2)[1:] for line in done.stderr.splitlines()]
    assert [name for name, _ in words] == [
        *("download", "download", "train", "train", "evaluate", "judge", "promote", "predict")
    ]
    assert words[0][1] == "downloading"
    assert "\x1b" not in done.stderr
