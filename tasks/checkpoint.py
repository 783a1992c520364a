"""Checkpoints of one training run: two files, written in turn, so that a kill at any moment leaves a whole one."""

import contextlib
import hashlib
import json
import shutil
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.files import publish_file

#: Checkpoints of other runs (another night's data, other parameters) are of no use after this long.
KEPT_DAYS = 7
_FACTS = "facts"
_SLOTS = ("a.npz", "b.npz")


@dataclass(frozen=True)
class State:
    """All that a run needs to go on: named arrays, and facts that JSON can hold."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


def run_key(identity: Any) -> str:
    """Return 16 hex digits for whatever makes a run what it is, the source code of ``tasks`` included.

    Args:
        identity: parameters, data digest, library versions and the like, as JSON can hold them.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, allow_nan=False).encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.name.encode() + module.read_bytes())
    return digest.hexdigest()[:16]


class Checkpoints:
    """The checkpoints of the run ``key`` under ``root``; those of runs long gone are removed."""

    def __init__(self, root: Path, key: str) -> None:
        self.directory = root / key
        self.seconds_to_write = 0.0
        self._written = 0
        if not root.is_dir():
            return
        for other in root.iterdir():
            # Another run may finish and remove its own meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if other.name != key and time.time() - other.stat().st_mtime > KEPT_DAYS * 86400:
                    shutil.rmtree(other, ignore_errors=True)

    def save(self, state: State) -> None:
        """Write ``state`` over the older of the two files; the newer stays until this one is complete."""
        started = time.monotonic()
        self._written += 1
        facts = json.dumps({**state.facts, "_written": self._written}, allow_nan=False)
        arrays = {f"array:{name}": array for name, array in state.arrays.items()}
        self.directory.mkdir(parents=True, exist_ok=True)
        with publish_file(self.directory / _SLOTS[self._written % 2]) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **{_FACTS: np.frombuffer(facts.encode(), np.uint8)}, **arrays)
        self.seconds_to_write = time.monotonic() - started

    def load(self) -> State | None:
        """Return the newest state that can be read, or None if there is none."""
        newest: State | None = None
        for name in _SLOTS:
            path = self.directory / name
            if not path.is_file():
                continue
            try:
                state = _read(path)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                print(f"checkpoint {path} is damaged ({error}): not used", flush=True)
                continue
            if newest is None or state.facts["_written"] > newest.facts["_written"]:
                newest = state
        if newest:
            self._written = newest.facts["_written"]
        return newest

    def clear(self) -> None:
        """Remove them: the run is over."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _read(path: Path) -> State:
    # Opened here, because NumPy leaves a damaged file open.
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        facts = json.loads(file[_FACTS].tobytes())
        arrays = {name.removeprefix("array:"): file[name] for name in file.files if name != _FACTS}
    return State(arrays, facts)
