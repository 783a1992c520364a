"""What becomes of each file of the inbox: it is looked at, decoded, and compared with what is there already."""

import difflib
import hashlib
import json
import os
import re
import stat
import time
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import Field

from tasks.archives import normal_name
from tasks.files import sha256_file
from tasks.images import DecodePolicy, Status, decode
from tasks.inputs import read_file
from tasks.params import Section
from tasks.progress import progress
from tasks.sources import VERIFIED, is_side_file, read_archive, read_labels

#: How browsers and file transfer programs name what they have not finished; others hide it behind a dot.
PARTIAL_SUFFIXES = {".part", ".partial", ".crdownload", ".download", ".filepart", ".tmp"}
#: What becomes of a file; every other status sends it into quarantine.
TAKE = "take"  # it is packed
TWIN = "twin"  # another one of the same content and class is
KNOWN = "known"  # an archive of additions or the quarantine has it already
CONFLICT = "label_conflict"
#: Why one stays in the inbox.
BEING_WRITTEN = "still being written"
CHANGED = "changed or moved while they were taken in"
NOT_PLAIN = "links or special files: put the images themselves there"
NOT_READABLE = "cannot be read"
NOT_REMOVABLE = "no permission to remove them from the inbox"
NO_CLASSES_YET = "which classes there are is not known before the first data set is prepared"
#: By content, then by class: where an image is.
Places = dict[str, dict[str, str]]


class InboxParams(Section):
    """What is taken in.

    Attributes:
        classes: ``fixed`` quarantines images of a class that the model lacks; with ``grow`` they come in.
            ``prepare.expected_classes`` fixes the classes, whatever stands here.
        settle_seconds: a file that was touched more recently than this may still be written to, and is left.
    """

    classes: Literal["fixed", "grow"] = "fixed"
    settle_seconds: float = Field(60.0, ge=0)


@dataclass(frozen=True)
class File:
    """A file as it was first seen: its path in the inbox, bytes, and time in ns."""

    path: str
    size: int
    mtime: int

    def is_still(self, path: Path) -> bool:
        """Tell whether it is what stands at ``path`` now."""
        try:
            facts = path.lstat()
        except FileNotFoundError:
            return False
        return (facts.st_size, facts.st_mtime_ns) == (self.size, self.mtime)


@dataclass(frozen=True)
class Verdict:
    """What becomes of a file, and why."""

    file: File
    sha256: str
    class_name: str
    status: str
    reason: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.class_name, self.sha256

    @property
    def member(self) -> str:
        """Its name in the archive. The content is part of it, so no two archives have a name in common."""
        name = PurePosixPath(re.sub(r"[\\\x00-\x1f\x7f\ud800-\udfff]", "_", PurePosixPath(self.file.path).name))
        return f"{self.class_name}/{name.stem}-{self.sha256[:16]}{name.suffix}"


def walk(folder: Path | str, above: str = "") -> Iterator[tuple[str, os.DirEntry | None]]:
    """Yield path and entry of all that may be an image; None for the entry if it is a folder that can't be listed."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        if above:
            yield above, None
        elif not isinstance(error, FileNotFoundError):
            raise
        return
    for entry in entries:
        path = above + entry.name
        if not entry.is_dir(follow_symlinks=False):
            if not is_side_file(path):
                yield path, entry
        elif not is_side_file(f"{path}/image"):
            yield from walk(entry.path, f"{path}/")


def look(inbox: Path, settle_seconds: float) -> tuple[list[File], Counter[str]]:
    """Return the files that are ready to be taken in, and by reason how many are not."""
    files, left, now = [], Counter(), time.time()
    for path, entry in walk(inbox):
        try:
            facts = entry and entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue  # somebody took it out again
        if facts is None:
            left[NOT_READABLE] += 1
        elif not stat.S_ISREG(facts.st_mode):
            left[NOT_PLAIN] += 1
        # The change time, too: what copies a file may set back the other one. A time far ahead is a clock gone wrong.
        elif _looks_partial(path) or any(abs(now - at) < settle_seconds for at in (facts.st_mtime, facts.st_ctime)):
            left[BEING_WRITTEN] += 1
        elif not os.access(os.path.dirname(entry.path), os.W_OK | os.X_OK):
            left[NOT_REMOVABLE] += 1
        else:
            files.append(File(path, facts.st_size, facts.st_mtime_ns))
    return files, left


def _looks_partial(path: str) -> bool:
    return any(PurePosixPath(part).suffix.lower() in PARTIAL_SUFFIXES for part in path.split("/"))


def examine(
    inbox: Path,
    files: list[File],
    policy: DecodePolicy,
    params: InboxParams,
    classes: Collection[str],
    left: Counter[str],
) -> list[Verdict]:
    """Read and decode every file; ``take`` those that are good in themselves. Adds to ``left``."""
    spellings = {unicodedata.normalize("NFC", name): name for name in classes}
    growing = params.classes == "grow"

    def verdict_on(file: File) -> Verdict | None:
        path = inbox / file.path
        fetched = read_file(path, policy.max_bytes)
        if fetched.data is not None:
            sha256, decoded = hashlib.sha256(fetched.data).hexdigest(), decode(fetched.data, policy)
            status, reason = decoded.status, decoded.reason
        elif fetched.status == Status.TOO_LARGE and file.is_still(path):
            sha256, status, reason = sha256_file(path), fetched.status, fetched.reason
        else:
            return None
        class_name, objection = _class_of(file.path, spellings, growing)
        if objection:
            status, reason = objection
        return Verdict(file, sha256, class_name, TAKE if status == Status.OK else str(status), reason)

    verdicts = []
    with ThreadPoolExecutor() as pool, progress("Looking at the inbox", len(files)) as advance:
        for file, verdict in zip(files, pool.map(verdict_on, files), strict=True):
            advance(1)
            if not file.is_still(inbox / file.path):
                left[CHANGED] += 1
            elif verdict is None:
                left[NOT_READABLE] += 1
            else:
                verdicts.append(verdict)
    return verdicts


def _class_of(path: str, spellings: dict[str, str], growing: bool) -> tuple[str, tuple[str, str] | None]:
    """Return the class that a file's folder names, and status and reason if it may not come in.

    Args:
        spellings: the classes' own spellings by their composed form: some systems write é as two characters.
    """
    folder, *names = PurePosixPath(path).parts
    if len(names) != 1:
        return "", ("no_class", "images must stand in <class>/<image>")
    composed = unicodedata.normalize("NFC", folder)
    if composed in spellings:
        return spellings[composed], None
    if not growing:
        close = difflib.get_close_matches(composed, list(spellings), n=1)
        hint = f"did you mean '{close[0]}'?" if close else "inbox.classes: grow would let it in"
        return folder, ("unknown_class", f"the model has no class '{folder}'; {hint}")
    try:
        normal_name(f"{composed}/image")
    except ValueError as error:
        return folder, ("unknown_class", f"'{folder}' can't be a class: {error}")
    return composed, None


def compare(verdicts: list[Verdict], additions: Path, prepared: Path, quarantine: Path) -> list[Verdict]:
    """Settle what is there already, or under another class, or twice in the inbox."""
    wanted = {verdict.sha256 for verdict in verdicts}
    source, archived = _there(additions, prepared, wanted)
    lying: dict[tuple[str, str], Path] = {}
    disputed: Places = {}
    for facts, file in _in_quarantine(quarantine, wanted):
        lying[facts["path"], facts["sha256"]] = file
        if facts["status"] == CONFLICT:  # which is not settled as long as one of the images lies there
            disputed.setdefault(facts["sha256"], {})[facts["class"]] = str(file.relative_to(quarantine.parent))
    coming: Places = {}
    for verdict in verdicts:
        if verdict.status == TAKE:
            coming.setdefault(verdict.sha256, {}).setdefault(verdict.class_name, verdict.file.path)

    def settled(verdict: Verdict) -> tuple[str, str]:
        own, sha256, path = verdict.class_name, verdict.sha256, verdict.file.path
        status, reason = verdict.status, verdict.reason
        if status == TAKE:
            if place := archived.get(sha256, {}).get(own):
                return KNOWN, f"the same image is {place}"
            found = [places.get(sha256, {}) for places in (source, archived, disputed, coming)]
            others = [(name, place) for places in found for name, place in places.items() if name != own]
            if place := source.get(sha256, {}).get(own):
                status, reason = "duplicate", f"the same image is {place}"
            elif others:
                status, reason = CONFLICT, f"the same image stands in class '{others[0][0]}': {others[0][1]}"
            elif (first := coming[sha256][own]) != path:
                return TWIN, f"the same image is {first}"
            else:
                return TAKE, ""
        file = lying.get((path, sha256))
        if file and sha256_file(file) == sha256:
            return KNOWN, f"it lies in {file.relative_to(quarantine.parent)}"
        return status, reason

    found = [(verdict, *settled(verdict)) for verdict in verdicts]
    return [replace(verdict, status=status, reason=shown(reason)) for verdict, status, reason in found]


def _there(additions: Path, prepared: Path, wanted: set[str]) -> tuple[Places, Places]:
    """Return which of the wanted contents are in the source, as the manifest knows, and in the additions.

    Archives are read, since what is found in them is removed from the inbox; but not those that hold nothing wanted.
    """
    import pyarrow.parquet as parquet  # not for an empty inbox

    source, archived, unread = {}, {}, set()
    manifest = prepared / "manifest.parquet"
    if manifest.is_file():
        unread = set(parquet.read_table(manifest, columns=["origin"])["origin"].unique().to_pylist())
        columns = ["origin", "name", "class", "content_hash"]
        for row in parquet.read_table(manifest, columns=columns, filters=[("content_hash", "in", wanted)]).to_pylist():
            if row["origin"] == "source":
                source.setdefault(row["content_hash"], {})[row["class"]] = f"{row['name']} of the source"
            else:
                unread.discard(row["origin"])
    for archive in sorted(additions.glob("[!.]*.tar")):
        if archive.name not in unread:
            contents = {sample.name: sample.content_hash for sample in read_archive(archive, **VERIFIED)}
            for name, label in read_labels(contents).items():
                if contents[name] in wanted:
                    archived.setdefault(contents[name], {})[label.class_name] = f"{name} of {archive.name}"
    return source, archived


def _in_quarantine(quarantine: Path, wanted: set[str]) -> Iterator[tuple[dict[str, str], Path]]:
    """Yield what the records say of the wanted contents, as far as the file lies there still."""
    for record in sorted(quarantine.glob("[!.]*.jsonl")):
        for line in record.read_text(encoding="utf-8").splitlines():
            facts = json.loads(line)
            file = record.with_suffix("") / facts["path"]
            if facts["sha256"] in wanted and file.is_file():
                yield facts, file


def shown(text: str) -> str:
    """Return ``text`` as one line that any encoding of Unicode takes."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())
