"""The one adapter to git: its plumbing commands, which do exactly one thing each and ask nobody anything."""

import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flows import child
from flows.child import StageFailed
from tasks.errors import NightlyError

#: Path in the repository -> id of its content; None: the path is not there.
Blobs = dict[str, str | None]

#: Who commits where git knows nobody.
FALLBACK_NAME, FALLBACK_EMAIL = "resnet-nightly", "nightly@localhost"

#: What git's hooks and aliases hand down, and what would turn these commands to another repository.
_HANDED_DOWN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX")

#: What git keeps while a person is in the middle of something -> what that is.
_UNFINISHED = {
    "MERGE_HEAD": "merge",
    "rebase-merge": "rebase",
    "rebase-apply": "rebase",
    "CHERRY_PICK_HEAD": "cherry-pick",
    "REVERT_HEAD": "revert",
}
_FILE_MODE, _UNMERGED = "100644", "unmerged"


class GitFailed(NightlyError):
    """Git refused something, or is not in the state that it is needed in."""


@dataclass(frozen=True)
class Upstream:
    """Where a branch is pushed to: ``branch`` of ``remote``, last seen as the local reference ``tracking``."""

    remote: str
    branch: str
    tracking: str

    @property
    def name(self) -> str:
        return self.tracking.removeprefix("refs/remotes/")


@dataclass(frozen=True)
class Change:
    """A commit's author and message, for another commit that says the same."""

    author: dict[str, str]
    message: str


class Repository:
    """A working tree. Paths are relative to its top, with ``/`` between their parts.

    Attributes:
        prefix: where the folder that it was opened at lies in it, "" or with a final "/".
    """

    def __init__(self, folder: Path) -> None:
        self.top, self._identity = folder, {}
        shown = self._git("rev-parse", "--show-toplevel", "--absolute-git-dir", "--show-prefix").splitlines()
        self.top, self._git_dir, self.prefix = Path(shown[0]), Path(shown[1]), shown[2]
        self._identity = self._fallback_identity()

    # --- what there is

    def branch(self) -> str:
        """Return the full name of the branch that is checked out."""
        try:
            return self._git("symbolic-ref", "--quiet", "HEAD").strip()
        except GitFailed:
            raise GitFailed("HEAD is detached: check a branch out, so that there is one to commit to") from None

    def commit_of(self, name: str) -> str | None:
        """Return the commit that ``name`` means, None if it means none."""
        found = self._run("rev-parse", "--quiet", "--verify", f"{name}^{{commit}}")
        return found.stdout.strip() if found.returncode == 0 else None

    def unfinished(self) -> str | None:
        """Return what a person is in the middle of, None if nothing."""
        return next((what for name, what in _UNFINISHED.items() if (self._git_dir / name).exists()), None)

    @property
    def index_lock(self) -> Path:
        """The file that git holds while it writes the index."""
        return self._git_dir / "index.lock"

    def present(self, patterns: Iterable[str]) -> list[str]:
        """Return the files that match and that git tracks or would track."""
        globs = [f":(top,glob){pattern}" for pattern in patterns]
        listed = self._git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *globs)
        return [path for path in sorted(set(_split(listed))) if (self.top / path).is_file()]

    def blobs(self, commit: str, paths: Iterable[str]) -> Blobs:
        """Return the content of ``paths`` in a commit."""
        wanted = dict.fromkeys(paths)
        if wanted:
            for line in _split(self._git("ls-tree", "-r", "-z", "--full-tree", commit, "--", *wanted)):
                facts, path = line.split("\t", 1)
                wanted[path] = facts.split()[2]
        return wanted

    def staged(self, paths: Iterable[str]) -> Blobs:
        """Return the content of ``paths`` in the user's index."""
        wanted = dict.fromkeys(paths)
        if wanted:
            for line in _split(self._git("--literal-pathspecs", "ls-files", "-s", "-z", "--", *wanted)):
                facts, path = line.split("\t", 1)
                _, blob, stage = facts.split()
                wanted[path] = blob if stage == "0" else _UNMERGED
        return wanted

    def changes(self, old: str, new: str) -> Blobs:
        """Return the paths in which two commits differ, with their content in ``new``."""
        fields = _split(self._git("diff-tree", "-r", "-z", "--raw", "--no-renames", "--no-abbrev", old, new))
        blobs = (facts.split()[3] for facts in fields[::2])
        return {path: blob if int(blob, 16) else None for blob, path in zip(blobs, fields[1::2], strict=True)}

    def trailers(self, key: str, new: str, old: str) -> dict[str, str]:
        """Return the commits of ``new`` that ``old`` lacks, oldest first, with the trailer ``key`` of each, or ""."""
        form = f"--format=%H %(trailers:key={key},valueonly,separator=%x2C)"
        lines = self._git("log", "--topo-order", "--reverse", "--no-show-signature", form, f"{old}..{new}").splitlines()
        return {commit: trailer.strip() for commit, _, trailer in (line.partition(" ") for line in lines)}

    def change(self, commit: str) -> Change:
        """Return who made a commit, when, and with which words."""
        shown = self._git("log", "-1", "--no-show-signature", "--format=%an%n%ae%n%aI%n%B", commit)
        name, email, date, message = shown.split("\n", 3)
        return Change({"GIT_AUTHOR_NAME": name, "GIT_AUTHOR_EMAIL": email, "GIT_AUTHOR_DATE": date}, message)

    def is_ancestor(self, old: str, new: str) -> bool:
        """Say whether ``old`` is ``new`` or in its history."""
        return self._run("merge-base", "--is-ancestor", old, new).returncode == 0

    # --- new objects, which nobody sees before a branch leads to them

    def store_files(self, paths: list[str]) -> Blobs:
        """Store the content of files in the working tree; return it."""
        ids = self._git("hash-object", "-w", "--stdin-paths", stdin="".join(f"{path}\n" for path in paths)).split()
        return dict(zip(paths, ids, strict=True))

    def store_text(self, text: str) -> str:
        """Store ``text``; return its id."""
        return self._git("hash-object", "-w", "--stdin", stdin=text).strip()

    def text(self, blob: str) -> str:
        """Return a stored text."""
        return self._git("cat-file", "blob", blob)

    def commit(self, parent: str, files: Blobs, change: Change, scratch: Path) -> str | None:
        """Return a new commit: ``parent`` with other ``files``; None if it has just these.

        Args:
            scratch: where an index for this purpose may be written.
        """
        for left in (scratch, scratch.with_name(f"{scratch.name}.lock")):
            left.unlink(missing_ok=True)
        aside = {"GIT_INDEX_FILE": str(scratch.absolute())}
        self._git("read-tree", parent, environment=aside)
        self._git("update-index", "-z", "--add", "--index-info", stdin=_index_info(files), environment=aside)
        tree = self._git("write-tree", environment=aside).strip()
        scratch.unlink()
        if tree == self._git("rev-parse", f"{parent}^{{tree}}").strip():
            return None
        return self._git("commit-tree", tree, "-p", parent, stdin=change.message, environment=change.author).strip()

    # --- the user's index, files and branch

    def stage(self, files: Blobs) -> None:
        """Put these entries, and no others, into the user's index."""
        if files:
            self._git("update-index", "-z", "--add", "--index-info", stdin=_index_info(files))

    def check_out(self, old: str, new: str, rehearse: bool = False) -> None:
        """Bring index and files from commit ``old`` to ``new`` and keep what the user changed or staged.

        Raises:
            GitFailed: something that the user changed, staged or never added is in the way, and nothing was done.
        """
        # It compares times where it could compare content, so they are brought up to date first. Its exit code
        # only says that there are changes.
        self._run("update-index", "-q", "--refresh")
        self._git("read-tree", "-m", "-u", *(["--dry-run"] if rehearse else []), old, new)

    def move_branch(self, branch: str, old: str, new: str) -> None:
        """Let a branch lead to ``new``, provided that it still leads to ``old``."""
        self._git("update-ref", "-m", "nightly: publish", branch, new, old)

    # --- the other side

    def upstream(self, branch: str) -> Upstream | None:
        """Return where a branch is pushed to, None if that was never said."""
        form = "--format=%(upstream:remotename)%00%(upstream:remoteref)%00%(upstream)"
        found = Upstream(*self._git("for-each-ref", form, branch).rstrip("\n").split("\0"))
        return found if found.tracking else None

    def fetch(self, upstream: Upstream, log: Path, limit_seconds: float | None) -> str:
        """Return the commit at which the upstream branch is now."""
        options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--no-recurse-submodules")
        self._remote(log, limit_seconds, "fetch", *options, upstream.remote, upstream.branch)
        found = self.commit_of(upstream.tracking)
        if found is None:
            raise GitFailed(f"git fetch: {upstream.name} did not come")
        return found

    def push(self, commit: str, upstream: Upstream, log: Path, limit_seconds: float | None) -> None:
        """Let the upstream branch lead to ``commit``; never by force.

        Raises:
            GitFailed: it moved meanwhile, or the other side refuses, or can't be reached.
        """
        options = ("--porcelain", "--no-follow-tags", "--recurse-submodules=no")
        self._remote(log, limit_seconds, "push", *options, upstream.remote, f"{commit}:{upstream.branch}")

    # --- running git

    def _remote(self, log: Path, limit_seconds: float | None, *arguments: str) -> None:
        """Run a command that talks to another machine, which may take for ever, or ask for a password."""
        lines: list[str] = []
        # Supervised, it has no terminal: a question for a password is an error and no wait until morning.
        without = [part for name in _HANDED_DOWN for part in ("-u", name)]
        command = ["env", *without, "GIT_TERMINAL_PROMPT=0", "LC_ALL=C.UTF-8", "git", *arguments]
        try:
            child.run(
                command,
                name=f"git {arguments[0]}",
                root=self.top,
                log=log,
                emit=lines.append,
                limit_seconds=limit_seconds,
            )
        except StageFailed as failure:
            why = _why(lines)
            raise GitFailed(f"git {arguments[0]}: {why}" if why else str(failure)) from None

    def _git(self, *arguments: str, stdin: str | None = None, environment: dict[str, str] | None = None) -> str:
        done = self._run(*arguments, stdin=stdin, environment=environment)
        if done.returncode != 0:
            why = _why(done.stderr.splitlines()) or f"ended with exit code {done.returncode}"
            raise GitFailed(f"git {arguments[0]}: {why}")
        return done.stdout

    def _run(
        self, *arguments: str, stdin: str | None = None, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in _HANDED_DOWN}
        try:
            return subprocess.run(
                ["git", *arguments],
                cwd=self.top,
                env={**inherited, "LC_ALL": "C.UTF-8", **self._identity, **(environment or {})},
                input=stdin or "",
                capture_output=True,
                encoding="utf-8",
                errors="surrogateescape",
                check=False,
            )
        except FileNotFoundError:
            raise GitFailed("git is not installed") from None

    def _fallback_identity(self) -> dict[str, str]:
        """Return names for author and committer where none were configured; git's guesses do not count."""
        names = {}
        for role in ("AUTHOR", "COMMITTER"):
            if self._run("-c", "user.useConfigOnly=true", "var", f"GIT_{role}_IDENT").returncode != 0:
                names |= {f"GIT_{role}_NAME": FALLBACK_NAME, f"GIT_{role}_EMAIL": FALLBACK_EMAIL}
        return names


def _index_info(files: Blobs) -> str:
    return "".join(f"{_FILE_MODE} {blob}\t{path}\0" for path, blob in files.items())


def _split(listed: str) -> list[str]:
    return listed.split("\0")[:-1]


def _why(lines: list[str]) -> str:
    """Return git's reason in one line: what it says of the branch or of itself, and what the other side says."""
    refusals = [line.split("\t")[-1] for line in lines if line.startswith("!\t")]
    errors = [line for line in lines if line.startswith(("fatal: ", "error: "))]
    said = [line.removeprefix("remote: ").strip() for line in lines if line.startswith("remote: ")]
    reasons = refusals or errors or lines
    return " ".join([*reasons[:1], *(f"({line})" for line in said[:1] if line)])
