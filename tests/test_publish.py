"""Publishing with real git: what others see, and that the user's branch, index and files stay what they are."""

import http.client
import http.server
import json
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from flows import publish as publishing
from flows import storage
from flows.publish import Published, publish, unite_ledgers
from flows.workspace import Workspace
from tests import object_store


@pytest.fixture(autouse=True)
def bare_machine(tmp_path_factory, monkeypatch):
    """Nobody has configured git here."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in [name for name in os.environ if name.startswith(("GIT_AUTHOR", "GIT_COMMITTER", "EMAIL"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(publishing, "_LOCK_PATIENCE_SECONDS", 0.3)


def git(folder: Path, *arguments: str, stdin: str = "") -> str:
    person = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "protocol.file.allow=always")
    done = subprocess.run(
        ["git", *person, *arguments], cwd=folder, input=stdin, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def line(model_id: str, hour: int) -> str:
    return json.dumps({"time": f"2026-01-01T{hour:02}:00:00+00:00", "action": "promote", "id": model_id}) + "\n"


def night(workspace: Workspace, model_id: str, hour: int) -> None:
    """Write what a promotion writes."""
    ledger, ignored = workspace.models / "ledger.jsonl", workspace.registry / ".gitignore"
    before, ignored_before = (file.read_text() if file.exists() else "" for file in (ledger, ignored))
    write(
        workspace.root,
        {
            "dvc.lock": f"lock of {model_id}\n",
            "models/champion.json": json.dumps({"id": model_id}),
            "models/ledger.jsonl": before + line(model_id, hour),
            f"models/registry/{model_id}.dvc": f"pointer to {model_id}\n",
            f"models/registry/{model_id}/model": "weights",
            "models/registry/.gitignore": f"{ignored_before}/{model_id}\n",
            "models/evaluation/metrics.json": f'{{"model_id": "{model_id}"}}',
            "models/evaluation/report.html": "of DVC's",
        },
    )


@pytest.fixture
def upstream(tmp_path) -> Path:
    """A bare repository with one commit."""
    bare = tmp_path / "upstream.git"
    git(tmp_path, "init", "-q", "--bare", "-b", "main", str(bare))
    seed = tmp_path / "seed"
    git(tmp_path, "init", "-q", "-b", "main", str(seed))
    write(
        seed,
        {
            ".gitignore": ".nightly/\n",
            "dvc.yaml": "stages: {}\n",
            "models/.gitignore": "/evaluation/report.html\n",
            "README.md": "one\n",
            "notes.md": "one\n",
            "code.py": "one\n",
        },
    )
    git(seed, "add", ".")
    git(seed, "commit", "-qm", "start")
    git(seed, "push", "-q", str(bare), "main")
    return bare


@pytest.fixture
def colleague(upstream, tmp_path) -> Path:
    """Another clone."""
    return clone(upstream, tmp_path / "colleague")


def clone(upstream: Path, to: Path) -> Path:
    git(to.parent, "clone", "-q", str(upstream), str(to))
    return to


@pytest.fixture
def workspace(upstream, tmp_path, monkeypatch) -> Workspace:
    """A clone; DVC's part always succeeds."""
    monkeypatch.setattr(storage, "push", lambda root, **options: [])
    return Workspace(clone(upstream, tmp_path / "workspace"))


def run(workspace: Workspace, mode: str = "push", message: str = "nightly: promoted") -> Published:
    return publish(workspace, mode, message, log=workspace.state / "log", emit=lambda line: None)


def files_of(folder: Path, commit: str) -> list[str]:
    return sorted(git(folder, "show", "--name-only", "--format=", commit).split())


def ledger_of(folder: Path, commit: str) -> list[str]:
    return [json.loads(entry)["id"] for entry in git(folder, "show", f"{commit}:models/ledger.jsonl").splitlines()]


OURS_OF_AAA = [
    "dvc.lock",
    "models/champion.json",
    "models/evaluation/metrics.json",
    "models/ledger.jsonl",
    "models/registry/.gitignore",
    "models/registry/aaa.dvc",
]


def the_users(workspace: Workspace) -> tuple[str, str, str, str]:
    """What must survive: the staged and the changed, byte for byte, the state of each file, the branch."""
    root = workspace.root
    status = git(root, "status", "--porcelain=v2", "--branch", "--untracked-files=all").splitlines()
    ours = ("models/", "dvc.lock", "# branch.oid", "# branch.ab")
    kept = [entry for entry in status if not entry.startswith(ours) and not any(o in entry for o in ours[:2])]
    return git(root, "diff", "--cached"), git(root, "diff"), "\n".join(kept), git(root, "stash", "list")


def make_dirty(workspace: Workspace) -> None:
    """Change, stage, stage and change again, delete, add with intent, leave untracked."""
    write(workspace.root, {"README.md": "staged\n"})
    git(workspace.root, "add", "README.md")
    write(workspace.root, {"README.md": "staged, then changed\n", "code.py": "changed\n"})
    write(workspace.root, {"new.py": "staged anew\n", "later.py": "with intent\n", "untracked.txt": "mine\n"})
    git(workspace.root, "add", "new.py")
    git(workspace.root, "add", "--intent-to-add", "later.py")
    (workspace.root / "notes.md").unlink()


# --- commits


def test_a_commit_holds_exactly_our_files(workspace, upstream):
    night(workspace, "aaa", 1)
    write(workspace.root, {"scratch.txt": "not ours", "code.py": "not ours"})
    published = run(workspace, "commit", "nightly: promoted aaa\n\nbetter by 1 point")
    assert (published.state, published.pushed_to, published.notes) == ("done", "", [])
    assert files_of(workspace.root, "HEAD") == OURS_OF_AAA
    subject, _, body = git(workspace.root, "log", "-1", "--format=%B").partition("\n")
    assert subject == "nightly: promoted aaa [skip ci]"
    assert "\nbetter by 1 point\n\nNightly-Change: " in body
    assert git(workspace.root, "log", "-1", "--format=%an <%ae>") == "resnet-nightly <nightly@localhost>"
    assert git(workspace.root, "status", "--porcelain").splitlines() == [" M code.py", "?? scratch.txt"]
    assert git(upstream, "log", "--format=%s", "main") == "start"


def test_nothing_new_is_no_commit_and_asks_neither_dvc_nor_the_other_side(workspace, upstream, monkeypatch):
    night(workspace, "aaa", 1)
    assert run(workspace).state == "done"
    monkeypatch.setattr(storage, "push", lambda root, **options: pytest.fail("DVC was asked"))
    upstream.rename(upstream.with_name("gone"))
    head = git(workspace.root, "rev-parse", "HEAD")
    assert run(workspace) == Published("nothing")
    assert git(workspace.root, "rev-parse", "HEAD") == head


def test_mode_none_touches_nothing(workspace):
    night(workspace, "aaa", 1)
    assert run(workspace, "none") == Published("nothing")
    assert git(workspace.root, "log", "--format=%s") == "start"


def test_a_configured_person_is_the_author(workspace):
    git(workspace.root, "config", "user.name", "Grace")
    git(workspace.root, "config", "user.email", "grace@example.org")
    night(workspace, "aaa", 1)
    run(workspace, "commit")
    assert git(workspace.root, "log", "-1", "--format=%an %ce") == "Grace grace@example.org"


def test_a_missing_file_is_not_published_as_deleted(workspace):
    night(workspace, "aaa", 1)
    run(workspace, "commit")
    (workspace.evaluation / "metrics.json").unlink()
    night_files = (workspace.models / "ledger.jsonl").read_text() + line("bbb", 2)
    write(workspace.root, {"models/ledger.jsonl": night_files})
    assert run(workspace, "commit").state == "done"
    assert files_of(workspace.root, "HEAD") == ["models/ledger.jsonl"]
    assert git(workspace.root, "status", "--porcelain") == " D models/evaluation/metrics.json"


def test_a_workspace_below_the_top_of_its_repository(workspace):
    below = Workspace(workspace.root / "projects" / "digits")
    write(below.root, {"dvc.yaml": "", ".gitignore": ".nightly/\n", "models/.gitignore": "/evaluation/report.html\n"})
    night(below, "aaa", 1)
    night(workspace, "zzz", 1)
    assert run(below).state == "done"
    assert files_of(workspace.root, "HEAD") == [f"projects/digits/{name}" for name in OURS_OF_AAA]
    night(below, "bbb", 2)
    assert run(below).state == "done"


def test_the_users_changes_survive_a_commit_and_a_push_byte_for_byte(workspace, upstream):
    night(workspace, "aaa", 1)
    make_dirty(workspace)
    before = the_users(workspace)
    assert run(workspace).state == "done"
    assert the_users(workspace) == before
    assert files_of(upstream, "main") == OURS_OF_AAA
    night(workspace, "bbb", 2)
    assert run(workspace).state == "done"
    assert the_users(workspace) == before


def test_what_the_user_staged_of_our_files_stays_staged(workspace):
    night(workspace, "aaa", 1)
    run(workspace, "commit")
    write(workspace.root, {"dvc.lock": "tried by hand\n"})
    git(workspace.root, "add", "dvc.lock")
    night(workspace, "bbb", 2)
    published = run(workspace, "commit")
    assert published.notes == ["what you staged of dvc.lock stays staged"]
    assert git(workspace.root, "show", ":dvc.lock") == "tried by hand"
    assert git(workspace.root, "show", "HEAD:dvc.lock") == "lock of bbb"
    assert git(workspace.root, "status", "--porcelain") == "MM dvc.lock"


# --- pushes


def test_a_commit_is_put_on_top_of_an_upstream_that_moved_and_the_branch_follows(workspace, colleague, upstream):
    night(workspace, "aaa", 1)
    run(workspace)
    write(colleague, {"code.py": "two\n", "more.py": "two\n"})
    git(colleague, "add", ".")
    git(colleague, "commit", "-qm", "a colleague's")
    git(colleague, "push", "-q", "origin", "HEAD:topic")
    git(colleague, "pull", "-q", "--rebase")
    git(colleague, "push", "-q")
    night(workspace, "bbb", 2)
    write(workspace.root, {"README.md": "changed\n"})
    git(workspace.root, "add", "README.md")
    published = run(workspace)
    assert (published.state, published.pushed_to, published.notes) == ("done", "origin/main", [])
    assert git(upstream, "log", "--format=%s", "main").splitlines() == [
        "nightly: promoted [skip ci]",
        "a colleague's",
        "nightly: promoted [skip ci]",
        "start",
    ]
    assert files_of(upstream, "main") == sorted(
        set(OURS_OF_AAA) - {"models/registry/aaa.dvc"} | {"models/registry/bbb.dvc"}
    )
    assert git(workspace.root, "rev-parse", "HEAD") == git(upstream, "rev-parse", "main")
    assert git(workspace.root, "status", "--porcelain") == "M  README.md"
    assert (workspace.root / "more.py").read_text() == "two\n"
    assert ledger_of(upstream, "main") == ["aaa", "bbb"]


@pytest.mark.parametrize(
    ("hindrance", "reason"),
    [
        ({"code.py": "mine\n"}, "'code.py' not uptodate"),
        ({"more.py": "mine\n"}, "Untracked working tree file 'more.py' would be overwritten"),
    ],
)
def test_a_branch_stays_where_following_would_touch_the_users_files(workspace, colleague, upstream, hindrance, reason):
    write(colleague, {"code.py": "two\n", "more.py": "two\n"})
    git(colleague, "add", ".")
    git(colleague, "commit", "-qm", "a colleague's")
    git(colleague, "push", "-q")
    write(workspace.root, hindrance)
    night(workspace, "aaa", 1)
    before = the_users(workspace)
    published = run(workspace)
    assert (published.state, published.pushed_to) == ("done", "origin/main")
    assert "main was left as it is beside origin/main" in published.notes[0]
    assert reason in published.notes[0]
    assert the_users(workspace) == before
    assert git(workspace.root, "log", "-2", "--format=%s").splitlines()[1] == "start"
    # The next night publishes its own news only, and once nothing is in the way the branch follows.
    for name in hindrance:
        (workspace.root / name).unlink()
    git(workspace.root, "checkout", "--", "code.py")
    night(workspace, "bbb", 2)
    assert run(workspace).notes == []
    assert git(upstream, "log", "--format=%s", "main").splitlines()[:-2] == ["nightly: promoted [skip ci]"] * 2
    assert git(workspace.root, "rev-parse", "HEAD") == git(upstream, "rev-parse", "main")
    assert git(workspace.root, "status", "--porcelain") == ""


def test_the_users_own_commits_are_not_pushed(workspace, upstream):
    write(workspace.root, {"code.py": "unfinished\n"})
    git(workspace.root, "commit", "-qam", "not for others yet")
    mine = git(workspace.root, "rev-parse", "HEAD")
    night(workspace, "aaa", 1)
    published = run(workspace)
    assert published.state == "done"
    assert "it has commits of your own" in published.notes[0]
    assert git(upstream, "log", "--format=%s", "main").splitlines() == ["nightly: promoted [skip ci]", "start"]
    assert git(workspace.root, "rev-parse", "HEAD^") == mine
    assert run(workspace).state == "nothing"
    git(workspace.root, "pull", "-q", "--rebase")
    log = git(workspace.root, "log", "--format=%s").splitlines()
    assert log == ["not for others yet", "nightly: promoted [skip ci]", "start"]


def test_two_machines_keep_all_lines_of_the_ledger_in_the_order_of_time(workspace, colleague, upstream):
    other = Workspace(colleague)
    for machine, model_id, hour in ((workspace, "aaa", 1), (other, "bbb", 3), (workspace, "ccc", 2)):
        night(machine, model_id, hour)
        run(machine)
    assert ledger_of(upstream, "main") == ["aaa", "ccc", "bbb"]
    assert git(upstream, "show", "main:models/champion.json") == '{"id": "ccc"}'
    assert ledger_of(workspace.root, "HEAD") == ["aaa", "ccc", "bbb"]
    assert (workspace.models / "ledger.jsonl").read_text() == line("aaa", 1) + line("ccc", 2) + line("bbb", 3)
    assert git(workspace.root, "status", "--porcelain") == ""


def test_another_champion_upstream_does_not_replace_the_one_in_service(workspace, colleague, upstream):
    night(workspace, "aaa", 1)
    run(workspace)
    git(colleague, "pull", "-q")
    night(Workspace(colleague), "bbb", 2)
    run(Workspace(colleague))
    ledger = workspace.models / "ledger.jsonl"
    ledger.write_text(ledger.read_text() + line("held", 3))
    published = run(workspace)
    assert "another champion was chosen there" in published.notes[0]
    assert json.loads((workspace.models / "champion.json").read_text()) == {"id": "aaa"}
    assert git(upstream, "show", "main:models/champion.json") == '{"id": "bbb"}'
    assert ledger_of(upstream, "main") == ["aaa", "bbb", "held"]


def test_an_upstream_that_moves_during_the_push_is_tried_again(workspace, colleague, upstream, monkeypatch):
    night(workspace, "aaa", 1)
    real, pushes = publishing.Repository.push, []

    def push(self, commit, *arguments):
        pushes.append(commit)
        if len(pushes) < 3:
            git(colleague, "pull", "-q", "--rebase")
            git(colleague, "commit", "-q", "--allow-empty", "-m", f"number {len(pushes)}")
            git(colleague, "push", "-q")
        real(self, commit, *arguments)

    monkeypatch.setattr(publishing.Repository, "push", push)
    assert run(workspace).state == "done"
    log = git(upstream, "log", "--format=%s", "main").splitlines()
    assert log == ["nightly: promoted [skip ci]", "number 2", "number 1", "start"]


# --- what is postponed


def refuse(upstream: Path) -> None:
    hook = upstream / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho 'no pushes at night' >&2\nexit 1\n")
    hook.chmod(0o755)


def test_a_refused_push_is_made_up_for_by_the_next_call(workspace, upstream):
    refuse(upstream)
    night(workspace, "aaa", 1)
    published = run(workspace)
    assert published.state == "postponed"
    assert published.reason == "git push: [remote rejected] (pre-receive hook declined) (no pushes at night)"
    night(workspace, "bbb", 2)
    assert run(workspace).state == "postponed"
    (upstream / "hooks" / "pre-receive").unlink()
    published = run(workspace)
    assert published.sentence == f"committed as {published.commit[:10]} and pushed to origin/main"
    assert git(upstream, "log", "--format=%s", "main").splitlines()[:2] == ["nightly: promoted [skip ci]"] * 2
    assert git(workspace.root, "rev-parse", "HEAD") == git(upstream, "rev-parse", "main")


def test_an_upstream_out_of_reach_is_one_line(workspace, upstream):
    night(workspace, "aaa", 1)
    upstream.rename(upstream.with_name("away.git"))
    published = run(workspace)
    assert published.state == "postponed"
    assert published.sentence.startswith(f"committed as {published.commit[:10]}; the rest is postponed: git fetch: ")
    assert "\n" not in published.reason
    upstream.with_name("away.git").rename(upstream)
    assert run(workspace).pushed_to == "origin/main"


def detach(root: Path) -> None:
    git(root, "checkout", "-q", "--detach")


def start_merge(root: Path) -> None:
    git(root, "checkout", "-qb", "topic")
    write(root, {"code.py": "topic\n"})
    git(root, "commit", "-qam", "topic")
    git(root, "checkout", "-q", "main")
    git(root, "merge", "-q", "--no-ff", "--no-commit", "topic")


def lock_index(root: Path) -> None:
    (root / ".git" / "index.lock").touch()


def without_commits(root: Path) -> None:
    git(root, "checkout", "-q", "--orphan", "empty")


def without_upstream(root: Path) -> None:
    git(root, "branch", "-q", "--unset-upstream")


def without_remote(root: Path) -> None:
    git(root, "remote", "remove", "origin")


def without_git(root: Path) -> None:
    (root / ".git").rename(root / "not-git")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (detach, "HEAD is detached: check a branch out"),
        (start_merge, "a merge is in progress: finish or abort it"),
        (lock_index, "a git command is at work here, or was killed: if none is running, remove /"),
        (without_commits, "this repository has no commit yet"),
        (without_upstream, "branch main has no upstream: say where it goes, once, by 'git push -u origin main'"),
        (without_remote, "branch main has no upstream"),
        (without_git, "not a git repository"),
    ],
)
def test_a_repository_in_no_state_for_it_is_one_line(workspace, spoil, reason):
    spoil(workspace.root)
    night(workspace, "aaa", 1)
    published = run(workspace)
    assert published.state == "postponed"
    assert reason in published.reason
    assert "\n" not in published.reason


def test_a_bare_repository_and_a_missing_git_are_one_line(workspace, upstream, monkeypatch):
    assert "must be run in a work tree" in run(Workspace(upstream)).reason
    monkeypatch.setenv("PATH", "/nowhere")
    assert run(workspace).reason == "git is not installed"


def test_a_shallow_clone_publishes_on_a_moved_upstream(workspace, colleague, upstream, tmp_path):
    for number in range(3):
        git(colleague, "commit", "-q", "--allow-empty", "-m", f"number {number}")
    git(colleague, "push", "-q")
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{upstream}", "shallow")
    shallow = Workspace(tmp_path / "shallow")
    write(colleague, {"code.py": "moved\n"})
    git(colleague, "commit", "-qam", "moved")
    git(colleague, "push", "-q")
    night(shallow, "aaa", 1)
    assert run(shallow).notes == []
    assert git(upstream, "log", "-2", "--format=%s", "main").splitlines() == ["nightly: promoted [skip ci]", "moved"]


def test_without_dvc_storage_the_commit_is_made_and_that_is_said(workspace, monkeypatch):
    def push(root, **options):
        raise storage.NoRemote("dvc push: no remote specified")

    monkeypatch.setattr(storage, "push", push)
    night(workspace, "aaa", 1)
    published = run(workspace)
    assert published.state == "done"
    assert published.notes == ["DVC has no remote storage, so the data is on this machine only"]


# --- with DVC


def dvc(root: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, check=True, capture_output=True)


@pytest.mark.slow
def test_a_dvc_remote_that_fails_half_way_postpones_the_commit_and_the_next_call_finishes(upstream, tmp_path):
    workspace, remote = Workspace(clone(upstream, tmp_path / "workspace")), tmp_path / "remote"
    root = workspace.root
    dvc(root, "init", "--quiet")
    config = root / ".dvc" / "config"
    config.write_text(f"[core]\n analytics = false\n remote = storage\n['remote \"storage\"']\n url = {remote}\n")
    git(root, "add", ".dvc", ".dvcignore")
    git(root, "commit", "-qm", "DVC")
    git(root, "push", "-q")
    write(root, {f"models/registry/aaa/part-{number}": f"part {number} of aaa" for number in range(5)})
    dvc(root, "add", "--quiet", "models/registry/aaa")
    before = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain")

    objects = [
        path.relative_to(root / ".dvc" / "cache") for path in (root / ".dvc" / "cache").rglob("*") if path.is_file()
    ]
    blocked = next(path for path in objects if path.suffix != ".dir")
    (remote / blocked).parent.parent.mkdir(parents=True)
    (remote / blocked).parent.touch()  # a file where a directory must be: what nobody's permissions get round
    published = run(workspace)
    assert published.state == "postponed"
    assert published.reason.startswith("dvc push: ")
    assert "Not a directory" in published.reason
    assert (git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain")) == before

    (remote / blocked).parent.unlink()
    published = run(workspace)
    assert (published.state, published.pushed_to, published.notes) == ("done", "origin/main", [])
    assert files_of(upstream, "main") == ["models/registry/.gitignore", "models/registry/aaa.dvc"]
    elsewhere = clone(upstream, tmp_path / "elsewhere")
    dvc(elsewhere, "pull", "--quiet")
    assert (elsewhere / "models/registry/aaa/part-4").read_text() == "part 4 of aaa"

    shutil.rmtree(root / ".dvc" / "cache" / "files")
    shutil.rmtree(remote)
    write(root, {"models/ledger.jsonl": line("bbb", 1)})
    assert run(workspace).notes == ["some of the data is neither in DVC's cache nor in the remote (log: .nightly/log)"]

    config.write_text("[core]\n analytics = false\n")
    write(root, {"dvc.lock": "schema: '2.0'\n"})
    assert run(workspace).notes == ["DVC has no remote storage, so the data is on this machine only"]


# --- kills

KILLED = """
    import os, signal, sys
    from pathlib import Path
    from flows import child, git, storage
    from flows.publish import publish
    from flows.workspace import Workspace

    left = int(sys.argv[2])

    def counted(call):
        def counting(*arguments, **options):
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return counting

    storage.push = counted(lambda root, **options: [])
    git.Repository._run = counted(git.Repository._run)
    child.run = counted(child.run)
    Path.unlink = counted(Path.unlink)
    workspace = Workspace(Path(sys.argv[1]))
    print(publish(workspace, "push", "nightly", log=workspace.state / "log", emit=print).sentence)
"""


@pytest.mark.slow
def test_killed_between_any_two_steps_it_is_done_once_by_the_next_call(upstream, colleague, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "push", lambda root, **options: [])
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    base = Workspace(clone(upstream, tmp_path / "base"))
    write(colleague, {"code.py": "moved\n", "models/ledger.jsonl": line("zzz", 0)})
    git(colleague, "add", ".")
    git(colleague, "commit", "-qm", "moved")
    git(colleague, "push", "-q")
    night(base, "aaa", 1)
    for steps in range(200):
        remote, root = tmp_path / f"{steps}.git", tmp_path / f"{steps}"
        git(tmp_path, "clone", "-q", "--bare", str(upstream), str(remote))
        subprocess.run(["cp", "-a", str(base.root), str(root)], check=True)
        git(root, "remote", "set-url", "origin", str(remote))
        workspace = Workspace(root)
        make_dirty(workspace)
        git(root, "checkout", "-q", "--", "code.py")
        before = the_users(workspace)
        killed = subprocess.run([sys.executable, str(script), str(root), str(steps)], capture_output=True, check=False)
        assert killed.returncode in (0, -signal.SIGKILL), killed.stderr
        published = run(workspace)
        assert published.state in ("done", "nothing"), (steps, published)
        log = git(remote, "log", "--format=%s", "main").splitlines()
        assert log == [log[0], "moved", "start"], steps
        assert ledger_of(remote, "main") == ["zzz", "aaa"], steps
        assert the_users(workspace) == before, steps
        assert git(root, "status", "--porcelain", "--", "models", "dvc.lock") == "", steps
        assert (workspace.models / "ledger.jsonl").read_text() == line("zzz", 0) + line("aaa", 1), steps
        assert git(root, "rev-parse", "HEAD") == git(remote, "rev-parse", "main"), steps
        assert run(workspace) == Published("nothing"), steps
        assert not list(workspace.state.glob("publish.*")), steps
        if killed.returncode == 0:
            break
    assert 20 < steps < 199


@pytest.mark.parametrize("upstream_moved", [False, True])
def test_a_night_after_a_kill_finds_nothing_staged_by_its_predecessor(
    workspace, colleague, upstream, monkeypatch, upstream_moved
):
    if upstream_moved:
        write(colleague, {"code.py": "moved\n", "models/ledger.jsonl": line("zzz", 0)})
        git(colleague, "add", ".")
        git(colleague, "commit", "-qm", "moved")
        git(colleague, "push", "-q")
    night(workspace, "aaa", 1)
    calls = []

    def stop(self, branch, old, new):
        calls.append(new)
        if len(calls) == 1 + upstream_moved:  # once for the commit, once to follow the upstream branch
            raise KeyboardInterrupt
        return real(self, branch, old, new)

    real = publishing.Repository.move_branch
    with monkeypatch.context() as patch:
        patch.setattr(publishing.Repository, "move_branch", stop)
        with pytest.raises(KeyboardInterrupt):
            run(workspace)
    night(workspace, "bbb", 2)
    published = run(workspace)
    assert (published.state, published.notes) == ("done", [])
    assert git(workspace.root, "status", "--porcelain") == ""
    assert git(workspace.root, "rev-parse", "HEAD") == git(upstream, "rev-parse", "main")
    assert ledger_of(upstream, "main") == ["zzz"] * upstream_moved + ["aaa", "bbb"]


# --- the ledger


def test_ledgers_are_united_by_time_and_keep_their_own_order():
    theirs = line("a", 1) + line("b", 3) + line("late", 2)
    ours = line("a", 1) + line("x", 2) + line("y", 4)
    assert unite_ledgers(theirs, ours) == line("a", 1) + line("x", 2) + line("b", 3) + line("late", 2) + line("y", 4)
    assert unite_ledgers(theirs, "") == theirs
    torn = line("a", 1) + '{"time": "20'
    assert unite_ledgers(torn, line("a", 1) + line("b", 2)) == line("a", 1) + '{"time": "20\n' + line("b", 2)


class FailingStore(http.server.BaseHTTPRequestHandler):
    """Passes requests on to an object store until ``puts_left`` is used up; then an error or two, then resets."""

    protocol_version = "HTTP/1.1"  # whose clients wait for a "100 Continue" before they send an object
    store: tuple[str, int]
    puts_left: float
    errors_left: int

    def handle_request(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "PUT":
            type(self).puts_left -= 1
            if self.puts_left < 0:
                self.fail()
                return
        connection = http.client.HTTPConnection(*self.store, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        connection.request(self.command, self.path, data, headers)
        answer = connection.getresponse()
        body = answer.read()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        self.wfile.write(body)
        connection.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request

    def fail(self) -> None:
        if self.errors_left > 0:
            type(self).errors_left -= 1
            body = b"<Error><Code>InternalError</Code><Message>disk on fire</Message></Error>"
            self.send_response(500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        else:  # lingering for no time at all sends a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def failing_store(monkeypatch) -> Iterator[tuple[str, type[FailingStore]]]:
    """An address in an S3 that answers on loopback, and the handler that says how much longer it takes things."""
    with object_store.s3() as address:
        behind = urlsplit(os.environ["AWS_ENDPOINT_URL"])

        class Handler(FailingStore):
            store = (behind.hostname, behind.port)
            puts_left = math.inf
            errors_left = 0

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
            yield address, Handler
            server.shutdown()


@pytest.mark.slow
def test_an_s3_remote_that_dies_half_way_under_a_moved_upstream_and_a_dirty_tree(
    upstream, colleague, tmp_path, failing_store, monkeypatch
):
    address, store = failing_store
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # patience would only take time here
    workspace = Workspace(clone(upstream, tmp_path / "workspace"))
    root = workspace.root
    dvc(root, "init", "--quiet")
    config = f"[core]\n analytics = false\n remote = storage\n['remote \"storage\"']\n url = {address}/dvc\n"
    (root / ".dvc" / "config").write_text(config)
    git(root, "add", ".dvc", ".dvcignore")
    git(root, "commit", "-qm", "DVC")
    git(root, "push", "-q")
    parts = {f"models/registry/aaa/part-{number}": f"part {number} of aaa" for number in range(6)}
    write(root, {**parts, "models/champion.json": '{"id": "aaa"}', "models/ledger.jsonl": line("aaa", 1)})
    dvc(root, "add", "--quiet", "models/registry/aaa")
    git(colleague, "pull", "-q")
    write(colleague, {"more.py": "a colleague's\n"})
    git(colleague, "add", ".")
    git(colleague, "commit", "-qm", "moved")
    git(colleague, "push", "-q")
    make_dirty(workspace)
    before = the_users(workspace)
    heads = git(root, "rev-parse", "HEAD"), git(upstream, "rev-parse", "main")

    store.puts_left, store.errors_left = 3, 2
    published = run(workspace)
    assert (published.state, published.commit) == ("postponed", None)
    assert published.reason.startswith("dvc push: ")
    assert store.puts_left < 0
    assert (git(root, "rev-parse", "HEAD"), git(upstream, "rev-parse", "main")) == heads
    assert the_users(workspace) == before

    store.puts_left = math.inf
    published = run(workspace)
    assert (published.state, published.pushed_to, published.notes) == ("done", "origin/main", [])
    assert git(upstream, "log", "-2", "--format=%s", "main").splitlines() == ["nightly: promoted [skip ci]", "moved"]
    assert the_users(workspace) == before
    elsewhere = clone(upstream, tmp_path / "elsewhere")
    dvc(elsewhere, "pull", "--quiet")
    assert {name: (elsewhere / name).read_text() for name in parts} == parts
