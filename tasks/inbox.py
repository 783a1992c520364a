"""New labeled images: out of the inbox, into one immutable archive of additions or into quarantine.

What is not packed is quarantined, never deleted: bad files, images of unknown classes, contradicting labels, copies of
the source's images. A file is removed only when its bytes were just read out of an archive or of the quarantine. That
is all it takes to survive a kill at any moment, without a journal: what a killed call had packed and not yet removed,
the next one finds in the archive.
"""

import argparse
import errno
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tasks.archives import read_members, write_tar
from tasks.errors import NightlyError, run_main
from tasks.files import partial_path, read_json, sha256_file, sync, tidy_up, write_json, write_text
from tasks.images import DecodePolicy
from tasks.inputs import read_file
from tasks.params import read_section
from tasks.progress import progress
from tasks.registry import champion_id, champion_path
from tasks.sources import VERIFIED
from tasks.vetting import (
    CHANGED,
    KNOWN,
    NO_CLASSES_YET,
    TAKE,
    TWIN,
    InboxParams,
    Verdict,
    compare,
    examine,
    look,
    shown,
    walk,
)

#: An archive's name before it is complete and its digest is known.
UNNAMED = "intake"
EXAMPLES = 10


@dataclass(frozen=True)
class Intake:
    """What one call did, in JSON's types.

    Attributes:
        archive: file name of the new archive, and ``digest`` its SHA-256; None if nothing came in.
        taken: images in it, by class.
        known: files removed because an archive, this one included, or the quarantine has them already.
        record: name of the list of quarantined and known files, in the quarantine; None if there are none.
        quarantined: files that went there, by status, and ``examples``: the first of them with their reasons.
        left: files that stay in the inbox, by reason.
    """

    archive: str | None = None
    digest: str | None = None
    taken: dict[str, int] = field(default_factory=dict)
    known: int = 0
    record: str | None = None
    quarantined: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """Return what happened in words."""
        said = []
        if self.archive:
            said.append(f"Took in {_counted(self.taken, 'image')}, packed as {self.archive}.")
        if self.quarantined:
            said.append(f"Quarantined {_counted(self.quarantined, 'file')}, listed in {self.record}.")
        if self.known:
            said.append(
                f"Removed {self.known:,} that had been taken in or quarantined already, listed in {self.record}."
            )
        if self.left:
            said.append(f"Left {_counted(self.left, 'file')} for the next time.")
        return said or ["The inbox is empty."]


def is_waiting(inbox: Path, additions: Path) -> bool:
    """Tell in milliseconds whether ``take_in`` would find anything to do."""
    leftovers = additions.glob(f".{UNNAMED}.partial-*")
    return any(True for _ in leftovers) or any(True for _ in walk(inbox))


def known_classes(prepared: Path, models: Path, expected: Collection[str] | None = None) -> list[str] | None:
    """Return the class names there are; None before there is a data set or a model.

    A run that was killed while it prepared leaves no data set. Then the classes are those of the model in service.
    """
    if expected is not None:
        return list(expected)
    if (prepared / "classes.json").is_file():
        return read_json(prepared / "classes.json")
    return read_json(champion_path(models) / "bundle.json")["classes"] if champion_id(models) else None


def take_in(
    inbox: Path,
    additions: Path,
    quarantine: Path,
    params: InboxParams,
    *,
    prepared: Path,
    classes: Collection[str] | None,
    decode_policy: DecodePolicy,
    batch: str | None = None,
) -> Intake:
    """Pack the good images of the inbox into one archive of additions, and quarantine the rest.

    Only one call at a time, but people may add files meanwhile.

    Args:
        inbox: ``<class>/<image>``. Hidden files and usual companions of images stay there and are not mentioned.
        additions: receives ``<batch>-<first digits of its SHA-256>.tar`` with ``<class>/<name>-<digest>.<suffix>``.
        quarantine: receives files at ``<record's stem>/<path in the inbox>``, so that one command moves them back, and
            the record ``<batch>.jsonl``: ``path, status, reason, bytes, sha256`` of each of them and of each that was
            known. It is written first: after a kill it may name files that were moved by the next call only.
        prepared: the prepare stage's output, whose manifest says what the source holds; may be absent.
        classes: the class names there are, None if nobody knows.
        batch: by default the time, UTC.

    Raises:
        NightlyError: an archive of additions is damaged, or the new one was read back otherwise than written.
    """
    tidy_up(additions / UNNAMED)
    files, left = look(inbox, params.settle_seconds)
    if classes is None and params.classes == "fixed":
        left[NO_CLASSES_YET] += len(files)
        files = []
    if not files:
        return Intake(left=dict(+left))
    batch = batch or f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    verdicts = examine(inbox, files, decode_policy, params, classes or (), left)
    verdicts = compare(verdicts, additions, prepared, quarantine)
    archive, digest, packed = _pack(inbox, additions, batch, [one for one in verdicts if one.status == TAKE])
    record = _write_record(quarantine, batch, [one for one in verdicts if one.status != TAKE])
    # From here on files leave the inbox. A person may have put another one in place of the one that was looked at; the
    # moment between this last look and the removal is the only one that remains.
    quarantined, examples, known = Counter(), [], 0
    for verdict in verdicts:
        path = inbox / verdict.file.path
        packed_now = verdict.status in (TAKE, TWIN)
        if (packed_now and verdict.key not in packed) or not verdict.file.is_still(path):
            left[CHANGED] += 1
        elif packed_now or verdict.status == KNOWN:
            path.unlink()
            known += verdict.status != TAKE
        else:
            _move(inbox, quarantine / Path(record).stem, verdict.file.path)
            quarantined[verdict.status] += 1
            examples.append(shown(f"{verdict.file.path}: {verdict.reason}"))
    return Intake(
        archive=archive,
        digest=digest,
        taken=dict(sorted(Counter(class_name for class_name, _ in packed).items())),
        known=known,
        record=record if known or quarantined else None,
        quarantined=dict(quarantined),
        examples=examples[:EXAMPLES],
        left=dict(left),
    )


def _pack(
    inbox: Path, additions: Path, batch: str, chosen: list[Verdict]
) -> tuple[str | None, str | None, set[tuple[str, str]]]:
    """Publish an archive of the chosen files, read back and compared; without those that have changed meanwhile.

    Returns:
        Its name, its SHA-256, and class and content of every image in it; None and nothing if there are none.
    """
    if not chosen:
        return None, None, set()
    packed: dict[str, Verdict] = {}

    def members() -> Iterator[tuple[str, bytes]]:
        with progress("Packing", len(chosen)) as advance:
            for verdict in sorted(chosen, key=lambda one: one.member):
                data = read_file(inbox / verdict.file.path, verdict.file.size).data
                if data is not None and hashlib.sha256(data).hexdigest() == verdict.sha256:
                    packed[verdict.member] = verdict
                    yield verdict.member, data
                advance(1)

    additions.mkdir(parents=True, exist_ok=True)
    partial = partial_path(additions / UNNAMED)
    try:
        write_tar(partial, members())
        if not packed:
            return None, None, set()
        sync(partial)
        written = {name: verdict.sha256 for name, verdict in packed.items()}
        found = {name: hashlib.sha256(data).hexdigest() for name, data in read_members(partial, **VERIFIED)}
        if found != written:
            raise NightlyError(
                f"{partial} was read back otherwise than written, the inbox stays: check disk and memory"
            )
        digest = sha256_file(partial)
        archive = additions / f"{batch}-{digest[:12]}.tar"
        partial.rename(archive)
        sync(additions)
    finally:
        partial.unlink(missing_ok=True)
    return archive.name, digest, {verdict.key for verdict in packed.values()}


def _write_record(quarantine: Path, batch: str, verdicts: list[Verdict]) -> str:
    """Write down what leaves the inbox otherwise than by being packed; return the record's file name."""
    for left in quarantine.glob(".*.partial-*"):
        left.unlink()  # of a killed call
    names = itertools.chain([batch], (f"{batch}-{number}" for number in itertools.count(2)))
    stem = next(name for name in names if not (quarantine / f"{name}.jsonl").exists())
    lines = [
        {
            "path": verdict.file.path,
            "class": verdict.class_name,
            "status": verdict.status,
            "reason": verdict.reason,
            "bytes": verdict.file.size,
            "sha256": verdict.sha256,
        }
        for verdict in verdicts
    ]
    if lines:
        # In ASCII: a name may be no UTF-8.
        write_text(quarantine / f"{stem}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return f"{stem}.jsonl"


def _move(inbox: Path, folder: Path, path: str) -> None:
    """Move a file of the inbox below ``folder``, by way of a whole copy if they are on two file systems."""
    place = folder / path
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        (inbox / path).rename(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = partial_path(folder)
        shutil.copyfile(inbox / path, partial)
        sync(partial)
        partial.rename(place)
        sync(place.parent)
        (inbox / path).unlink()


def _counted(counts: dict[str, int], unit: str) -> str:
    total = sum(counts.values())
    parts = ", ".join(f"{name.replace('_', ' ')}: {count:,}" for name, count in counts.items())
    return f"{total:,} {unit}{'s' * (total != 1)} ({parts})"


def main() -> None:
    from tasks.prepare import PrepareParams  # with pandas, which the flow that asks is_waiting need not load

    parser = argparse.ArgumentParser(description=take_in.__doc__.splitlines()[0])
    for name in ("inbox", "additions", "quarantine", "prepared", "models", "report"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--batch")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = parser.parse_args()
    params = read_section(args.params, "inbox", InboxParams)
    preparing = read_section(args.params, "prepare", PrepareParams)
    if preparing.expected_classes is not None:
        params = params.changed(classes="fixed")
    intake = take_in(
        args.inbox,
        args.additions,
        args.quarantine,
        params,
        prepared=args.prepared,
        classes=known_classes(args.prepared, args.models, preparing.expected_classes),
        decode_policy=preparing.decode,
        batch=args.batch,
    )
    write_json(args.report, asdict(intake))
    print("\n".join(intake.sentences()))


if __name__ == "__main__":
    run_main(main)
