"""Publishing a night: data to DVC's remote, then a commit of exactly our files, then a push. No Prefect in here.

The order makes every commit's data fetchable. Commits are made aside, from an index of our own, and put in place by
comparing and swapping; what the user changed, staged or committed stays what and where it was. Each commit carries a
number, by which it is recognized on both sides: what was not pushed, for whatever reason, is pushed the next time.
"""

import heapq
import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from flows import storage
from flows.git import Blobs, Change, GitFailed, Repository, Upstream
from flows.stages import Emit
from flows.storage import NoRemote
from flows.workspace import Workspace
from tasks.errors import NightlyError, describe
from tasks.files import publish_file, read_json, write_json

Mode = Literal["none", "commit", "push"]

LEDGER, CHAMPION = "models/ledger.jsonl", "models/champion.json"

#: What a night writes for git, relative to the workspace; what git ignores is left out.
OURS = (
    "dvc.lock",
    CHAMPION,
    LEDGER,
    "models/evaluation/**",
    "models/registry/*.dvc",
    "models/registry/.gitignore",
    "data/additions.dvc",
    "data/additions/*.dvc",
    "data/additions/.gitignore",
)

#: The line of a commit's message that makes it one of ours.
TRAILER = "Nightly-Change"

_TRIES = 5
_LOCK_PATIENCE_SECONDS = 10.0


@dataclass
class Published:
    """What became of publishing.

    Attributes:
        state: "nothing": there was nothing new; "postponed": the next call makes up for what ``reason`` prevented.
        commit: the newest commit that was made or pushed.
        pushed_to: such as "origin/main"; "" if nothing was pushed.
        notes: what a person should know or do, a line each.
    """

    state: Literal["done", "nothing", "postponed"] = "nothing"
    reason: str = ""
    commit: str | None = None
    pushed_to: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def sentence(self) -> str:
        """Say it in one line."""
        done = f"committed as {self.commit[:10]}" if self.commit else ""
        if self.pushed_to:
            done += f" and pushed to {self.pushed_to}"
        if self.state == "postponed":
            return f"{done}; the rest is postponed: {self.reason}" if done else f"postponed: {self.reason}"
        return done or "nothing new"


def publish(
    workspace: Workspace,
    mode: Mode,
    message: str,
    *,
    log: Path,
    emit: Emit,
    limit_seconds: float | None = None,
    patience_seconds: float = 0.0,
) -> Published:
    """Publish what is new in the workspace, which the caller holds, and what earlier calls had to postpone.

    Args:
        message: the commit's; "[skip ci]" is added to its first line.
        limit_seconds: for each command that talks to another machine.
        patience_seconds: how long to wait for another DVC command.
    """
    published = Published()
    if mode == "none":
        return published
    try:
        workspace.state.mkdir(exist_ok=True)
        publication = _Publication(workspace, Repository(workspace.root), published, log, emit, limit_seconds)
        publication.run(mode, message, patience_seconds)
    except (NightlyError, OSError) as reason:
        published.state, published.reason = "postponed", describe(reason)
    return published


@dataclass
class _Publication:
    """One call of ``publish``."""

    workspace: Workspace
    repository: Repository
    published: Published
    log: Path
    emit: Emit
    limit_seconds: float | None

    def run(self, mode: Mode, message: str, patience_seconds: float) -> None:
        """Do it, and keep ``published`` up to date as far as it goes."""
        branch, head = self._ready()
        if news := self._news(head):
            self._send_data(patience_seconds)
            head = self._commit(branch, head, news, message) or head
        if mode == "push":
            self._push(branch, head)

    def _ready(self) -> tuple[str, str]:
        """Return the branch that is checked out and its commit, when nobody is in the middle of anything."""
        repository = self.repository
        if what := repository.unfinished():
            raise GitFailed(f"a {what} is in progress: finish or abort it")
        self._wait_for_index()
        branch = repository.branch()
        self._finish_move(branch)
        head = repository.commit_of("HEAD")
        if head is None:
            raise GitFailed("this repository has no commit yet: make the first one")
        return branch, head

    def _wait_for_index(self) -> None:
        lock = self.repository.index_lock
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
        while lock.exists():
            if time.monotonic() > deadline:
                raise GitFailed(f"a git command is at work here, or was killed: if none is running, remove {lock}")
            time.sleep(0.2)

    # --- commit

    def _news(self, head: str) -> Blobs:
        """Return our files as they are now, where they differ from those of ``head``.

        A file that is missing is no news: a stage that failed leaves none, and nothing is to be deleted for that.
        """
        repository = self.repository
        now = repository.store_files(repository.present(f"{repository.prefix}{pattern}" for pattern in OURS))
        before = repository.blobs(head, now)
        return {path: blob for path, blob in now.items() if blob != before[path]}

    def _send_data(self, patience_seconds: float) -> None:
        try:
            self.published.notes += storage.push(
                self.workspace.root,
                log=self.log,
                emit=self.emit,
                limit_seconds=self.limit_seconds,
                patience_seconds=patience_seconds,
            )
        except NoRemote:
            self.published.notes.append("DVC has no remote storage, so the data is on this machine only")

    def _commit(self, branch: str, head: str, news: Blobs, message: str) -> str | None:
        subject, _, body = message.strip().partition("\n")
        mark = "" if "[skip ci]" in message else " [skip ci]"
        paragraphs = [f"{subject}{mark}", body.strip(), f"{TRAILER}: {secrets.token_hex(8)}"]
        text = "\n\n".join(part for part in paragraphs if part) + "\n"
        commit = self.repository.commit(head, news, Change({}, text), self._scratch)
        if commit:
            self._move(branch, head, commit, list(news))
            self.published.state, self.published.commit = "done", commit
        return commit

    # --- push

    def _push(self, branch: str, head: str) -> None:
        repository = self.repository
        upstream = repository.upstream(branch)
        if upstream is None:
            name = branch.removeprefix("refs/heads/")
            raise GitFailed(f"branch {name} has no upstream: say where it goes, once, by 'git push -u origin {name}'")
        seen = repository.commit_of(upstream.tracking)
        if seen is None or self._unpublished(seen, head):
            seen = self._bring(head, upstream)
        if not repository.is_ancestor(seen, head):
            self._follow(branch, head, seen, upstream)

    def _bring(self, head: str, upstream: Upstream) -> str:
        """Push what is unpublished; return the commit at which the upstream branch is then."""
        repository = self.repository
        seen = repository.fetch(upstream, self.log, self.limit_seconds)
        tries = 0
        while commit := self._on_top_of(seen, head):
            try:
                repository.push(commit, upstream, self.log, self.limit_seconds)
            except GitFailed:
                tries += 1
                moved = repository.fetch(upstream, self.log, self.limit_seconds)
                if moved == seen or tries == _TRIES:
                    raise
                self.emit(f"{upstream.name} has moved meanwhile: once more")
                seen = moved
            else:
                self.published.state, self.published.commit, self.published.pushed_to = "done", commit, upstream.name
                return commit
        return seen

    def _on_top_of(self, upstream: str, head: str) -> str | None:
        """Return a commit that brings what is unpublished to ``upstream``, None if there is nothing to bring."""
        unpublished = self._unpublished(upstream, head)
        others = set(self.repository.trailers(TRAILER, head, upstream)) - set(unpublished)
        if unpublished and not others and self.repository.is_ancestor(upstream, head):
            return head
        tip = upstream
        for commit in unpublished:
            files = self.repository.changes(f"{commit}^", commit)
            self._unite_ledgers(tip, files)
            tip = self.repository.commit(tip, files, self.repository.change(commit), self._scratch) or tip
        return tip if tip != upstream else None

    def _unpublished(self, upstream: str, head: str) -> list[str]:
        """Return our commits in ``head`` that ``upstream`` has under no name, oldest first."""
        there = set(self.repository.trailers(TRAILER, upstream, head).values())
        here = self.repository.trailers(TRAILER, head, upstream)
        return [commit for commit, change in here.items() if change and change not in there and self._is_ours(commit)]

    def _is_ours(self, commit: str) -> bool:
        """Say whether a commit with our trailer holds our files only. Otherwise it was amended, and is its author's."""
        if self.repository.commit_of(f"{commit}^") is None:
            return False
        patterns = [f"{self.repository.prefix}{pattern}" for pattern in OURS]
        files = self.repository.changes(f"{commit}^", commit)
        return all(blob and any(fnmatchcase(path, pattern) for pattern in patterns) for path, blob in files.items())

    def _unite_ledgers(self, commit: str, files: Blobs) -> None:
        ledger = f"{self.repository.prefix}{LEDGER}"
        theirs = self.repository.blobs(commit, [ledger])[ledger]
        if theirs and (ours := files.get(ledger)):
            united = unite_ledgers(self.repository.text(theirs), self.repository.text(ours))
            files[ledger] = self.repository.store_text(united)

    def _follow(self, branch: str, head: str, theirs: str, upstream: Upstream) -> None:
        """Bring branch, index and files from our commits to those that stand for them in ``theirs``.

        It is done if nothing of the user's is in the way. A branch that is merely behind is the user's to pull.
        """
        repository = self.repository
        commits = repository.trailers(TRAILER, head, theirs)
        champion = f"{repository.prefix}{CHAMPION}"
        obstacle = ""
        if not commits:
            return
        if not all(change and self._is_ours(commit) for commit, change in commits.items()):
            obstacle = "it has commits of your own"
        elif repository.blobs(head, [champion]) != repository.blobs(theirs, [champion]):
            obstacle = f"another champion was chosen there, and {CHAMPION} says which model is in service here"
        else:
            try:
                repository.check_out(head, theirs, rehearse=True)
                self._move(branch, head, theirs, [f"{repository.prefix}{LEDGER}"])
            except GitFailed as failure:
                obstacle = str(failure)
        if obstacle:
            name = branch.removeprefix("refs/heads/")
            self.published.notes.append(
                f"{name} was left as it is beside {upstream.name} ({obstacle}): 'git pull --rebase' when it suits you"
            )

    # --- moving the branch

    @property
    def _scratch(self) -> Path:
        return self.workspace.state / "publish.index"

    @property
    def _journal(self) -> Path:
        return self.workspace.state / "publish.json"

    def _move(self, branch: str, old: str, new: str, ours: list[str]) -> None:
        """Bring the branch, the index and, but for ``ours``, the files from commit ``old`` to ``new``."""
        repository = self.repository
        write_json(self._journal, {"branch": branch, "old": old, "new": new, "ours": ours})
        changes = repository.changes(old, new)
        after = {path: changes[path] for path in ours if changes.get(path)}
        before, staged = repository.blobs(old, after), repository.staged(after)
        repository.stage({path: blob for path, blob in after.items() if staged[path] == before[path]})
        if kept := [path for path, blob in after.items() if staged[path] not in (before[path], blob)]:
            self.published.notes.append(f"what you staged of {', '.join(kept)} stays staged")
        if len(changes) > len(after):
            self._extend_ledger(after)
            try:
                repository.check_out(old, new)
            except GitFailed:
                self._journal.unlink()
                raise
        repository.move_branch(branch, old, new)
        self._journal.unlink()

    def _extend_ledger(self, files: Blobs) -> None:
        """Add the other side's lines to the ledger here, all of them or none, which git's own checkout would not do."""
        path = f"{self.repository.prefix}{LEDGER}"
        if blob := files.get(path):
            ledger = self.repository.top / path
            here = ledger.read_text(encoding="utf-8", errors="surrogateescape") if ledger.exists() else ""
            with publish_file(ledger) as partial:
                united = unite_ledgers(self.repository.text(blob), here)
                partial.write_text(united, encoding="utf-8", errors="surrogateescape")

    def _finish_move(self, branch: str) -> None:
        """Finish what a killed call began; forget it if the branch has gone elsewhere since."""
        if not self._journal.exists():
            return
        move = read_json(self._journal)
        if move["branch"] == branch and self.repository.commit_of(branch) == move["old"]:
            self._move(branch, move["old"], move["new"], move["ours"])
        self._journal.unlink(missing_ok=True)


def unite_ledgers(theirs: str, ours: str) -> str:
    """Return the lines of both ledgers once each, in the order of time and, within it, in their own."""
    return "".join(dict.fromkeys(heapq.merge(_lines(theirs), _lines(ours), key=_time)))


def _lines(ledger: str) -> Iterable[str]:
    return [f"{line}\n" for line in ledger.split("\n") if line.strip()]


def _time(line: str) -> str:
    try:
        return json.loads(line)["time"]
    except (ValueError, KeyError, TypeError):  # torn by a crash: it stays behind the line before it
        return ""
