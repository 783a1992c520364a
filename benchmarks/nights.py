"""A week of nights on real digits: each with its verdict, its time, and whether git, DVC and the ledger agree then.

The first model learns from 200 images. Then 900 more come into the inbox (promoted, if they help), 900 with wrong
labels (to be held), nothing, a rollback, nothing again, and the wrong ones are taken out. One JSON object at the end;
exits with 1 if a night ended otherwise than expected, or if git, DVC, the ledger and ``nightly history`` disagree.
"""

import argparse
import io
import json
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scratch import Scratch, Server

from tasks.images import encode_png

TEST_IMAGES, FIRST_IMAGES, NEW_IMAGES = 400, 200, 900
SECTIONS = {
    "download": {"source": "folder", "path": "digits.tar"},
    "model": {"backbone": "resnet20", "doublings": 0, "batch_normalization_momentum": 0.9},
    "prepare": {
        "decode": {"size": 16},
        "normalization": "standardize",
        "validation_fraction": 0.25,
        "minimum_images_per_class": 5,
    },
    "augment": {"flip_horizontal": False, "shift_pixels": 2, "eraser": {"p": 0}},
    "train": {"epochs": 12, "batch_size": 32, "optimizer": "adam", "learning_rate": 0.003, "schedule": "cosine"},
    "retrain": {"accuracy_floor": 0.5, "publish": "push"},
    "export": {"int8": False},
}


def digits() -> list[tuple[str, np.ndarray]]:
    """Return (class, uint8 (8, 8) image) of the 1,797 handwritten digits, in an order that is always the same."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    return [(str(found.target[at]), np.uint8(found.images[at] * 255 / 16)) for at in order]


def write_source(archive: Path, images: list[tuple[str, np.ndarray]]) -> None:
    with tarfile.open(archive, "w") as tar:
        for number, (label, pixels) in enumerate(images):
            data = encode_png(pixels)
            split = "test" if number < TEST_IMAGES else "train"
            info = tarfile.TarInfo(f"{split}/{label}/{number}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def drop(inbox: Path, images: list[tuple[str, np.ndarray]], name: str) -> None:
    for number, (label, pixels) in enumerate(images):
        path = inbox / label / f"{name}-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(pixels))


def mislabeled(images: list[tuple[str, np.ndarray]]) -> list[tuple[str, np.ndarray]]:
    """Return the images moved by a pixel, each under the label of another digit.

    Moved, so that they are no copies, and in a way that augmentation moves the others, too: a network tells any other
    mark from the digit, learns that marked ones have other labels, and is none the worse for it.
    """
    return [(str((int(label) + 3) % 10), np.roll(pixels, 1, axis=1)) for label, pixels in images]


class Week:
    """Nights in one workspace, and what is found after each."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch, self.events = scratch, []

    def night(self, what: str, expected: str) -> None:
        began = time.monotonic()
        log = self.scratch.folder / f"night-{len(self.events) + 1}.log"
        code = self.scratch.start("nightly", "retrain", log=log).wait()
        self.note(what, expected, {"exit_code": code, "seconds": round(time.monotonic() - began, 1)})

    def roll_back(self) -> None:
        print(self.scratch.run("nightly", "rollback"), file=sys.stderr)
        self.note("nightly rollback", "rollback", {})

    def note(self, what: str, expected: str, facts: dict[str, Any]) -> None:
        root = self.scratch.root
        ledger = [json.loads(line) for line in (root / "models" / "ledger.jsonl").read_text().splitlines()]
        nights = sorted((root / ".nightly" / "nights").glob("2*.html"))
        champion = self.scratch.json("models", "champion.json")["id"]
        event = {
            "what": what,
            "expected": expected,
            **facts,
            "champion": champion,
            "ledger_lines": len(ledger),
            "last_decision": f"{ledger[-1]['action']} {ledger[-1]['id']}: {'; '.join(ledger[-1]['reasons'])}",
            "pages": len(nights),
            "history_names_the_champion": f"in service: {champion}" in self.scratch.run("nightly", "history"),
            "commit": self.scratch.git("log", "-1", "--format=%s").strip(),
            "ahead_of_upstream": int(self.scratch.git("rev-list", "--count", "@{upstream}..").strip()),
            "changed_files": self.scratch.git("status", "--porcelain").split(),
            "dvc_status": self.scratch.run("dvc", "status").strip(),
        }
        event["problems"] = list(self.problems(event))
        self.events.append(event)
        print(json.dumps(event, indent=2), file=sys.stderr, flush=True)

    def problems(self, event: dict[str, Any]) -> Iterator[str]:
        """Yield what is not as it must be."""
        expected, lines = event["expected"], self.events[-1]["ledger_lines"] if self.events else 0
        decides = expected in ("promote", "hold", "rollback")
        if event.get("exit_code", 0):
            yield "the night did not end well"
        if event["ledger_lines"] != lines + decides:
            yield f"the ledger has {event['ledger_lines']} lines, and had {lines}"
        if decides and not event["last_decision"].startswith(f"{expected} "):
            yield f"the decision was {event['last_decision']}"
        if expected in ("promote", "rollback") and f" {event['champion']}: " not in event["last_decision"]:
            yield f"{event['champion']} is in service"
        if expected == "hold" and event["champion"] != self.events[-1]["champion"]:
            yield "the model in service is another one than before"
        if not event["history_names_the_champion"]:
            yield "nightly history names another model"
        # A rollback is a person's act, which the next night publishes.
        if expected != "rollback" and (event["ahead_of_upstream"] or event["changed_files"]):
            yield f"git: {event['ahead_of_upstream']} commits ahead, changed: {event['changed_files']}"
        if "up to date" not in event["dvc_status"]:
            yield f"dvc status: {event['dvc_status']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="for the workspace, which is kept; a temporary one otherwise")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="nights-"))
    scratch = Scratch(folder / "week", tiny=False)
    images = digits()
    new = images[TEST_IMAGES + FIRST_IMAGES :][:NEW_IMAGES]
    write_source(scratch.root / "digits.tar", images[: TEST_IMAGES + FIRST_IMAGES])
    for section, values in SECTIONS.items():
        scratch.edit(section, **values)
    scratch.root.joinpath(".gitignore").open("a").write("/digits.tar\n")
    scratch.commit("digits, few of them")
    scratch.git("push", "--quiet")
    server = Server(scratch)
    week, inbox = Week(scratch), scratch.root / "data" / "inbox"
    try:
        week.night("the first night, 200 images", "promote")
        drop(inbox, new, "new")
        week.night("900 new images in the inbox", "promote")
        drop(inbox, mislabeled(new), "wrong")
        week.night("900 images with wrong labels in the inbox", "hold")
        week.night("nothing new", "skipped")
        week.roll_back()
        # Held once more, for other reasons: against another champion.
        week.night("nothing new after the rollback", "hold")
        wrong = max((scratch.root / "data" / "additions").glob("*.dvc"))
        wrong.with_suffix("").unlink()
        wrong.unlink()
        scratch.commit("without the wrong labels")
        scratch.git("push", "--quiet")
        week.night("the archive with the wrong labels removed", "hold")  # of the model that was rolled back
    finally:
        server.stop()
        if not arguments.folder:
            shutil.rmtree(folder)
    print(json.dumps({"nights": week.events}, indent=2))
    sys.exit(any(event["problems"] for event in week.events))


if __name__ == "__main__":
    main()
