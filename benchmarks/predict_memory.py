"""The memory that a prediction takes on 10,000 and on 100,000 files, with and without a report.

``.venv/bin/python benchmarks/predict_memory.py [--source DIRECTORY_OR_TAR] [--files 10000 100000] [--model BUNDLE]``

The files are hard links to a few hundred JPEGs of 32 px, from the source if there is one, else of noise. Each run is
``python -m tasks.predict`` in a process of its own, as flows start it, with a small network, a Parquet and a CSV file.
Peaks are the kernel's figure for that process. Prints one JSON object; exits with 1 if the last folder takes more than
1.1 times the memory of the first.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from predict_folder import make_bundle, small_files

ROOT = Path(__file__).resolve().parent.parent
DIFFERENT, GOAL = 300, 1.1
#: Runs a command and tells its peak. A process inherits the peak of the one that starts it, so that one is small.
LAUNCH = """
import os, sys
child = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(child, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def make_folder(folder: Path, images: list[bytes], count: int) -> Path:
    """Fill a folder with ``count`` names of the images."""
    originals = folder.with_name(f"{folder.name}-originals")
    for place in (folder, originals):
        place.mkdir(parents=True)
    for number, data in enumerate(images):
        (originals / str(number)).write_bytes(data)
    for number in range(count):
        os.link(originals / str(number % len(images)), folder / f"IMG_{number}.jpg")
    return folder


def measure(folder: Path, model: Path, out: Path, report: bool) -> dict[str, Any]:
    """Classify a folder in a process of its own; return what that took."""
    params = out.with_suffix(".json")
    params.write_text(json.dumps({"predict": {"formats": ["parquet", "csv"], "report": report}}))
    command = [sys.executable, "-c", LAUNCH, "-m", "tasks.predict", folder, "--out", out, "--model", model]
    began = time.perf_counter()
    done = subprocess.run(
        [*map(str, command), "--params", str(params)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - began
    facts = json.loads((out / "summary.json").read_text())
    return {
        "peak_mib": round(int(done.stdout.splitlines()[-1]) / 1024, 1),
        "process_seconds": round(seconds, 3),
        "seconds": facts["seconds"],
        "first_image_seconds": facts["first_image_seconds"],
        "files_per_second": facts["images_per_second"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="directory or archive of JPEGs of 32 px")
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--model", type=Path, help="an exported bundle; a small one is made by default")
    options = parser.parse_args()
    found: dict[str, Any] = {"goal": GOAL}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        images = small_files(options.source, DIFFERENT)
        model = options.model
        if model is None:
            pixels = np.stack([cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) for data in images])
            with contextlib.redirect_stdout(sys.stderr):
                model = make_bundle(work / "model", pixels, 32, 0, "resnet20").path
        folders = {count: make_folder(work / f"{count}", images, count) for count in options.files}
        for kind in ("table", "report"):
            runs = {
                str(count): measure(folder, model.absolute(), work / f"out-{kind}-{count}", kind == "report")
                for count, folder in folders.items()
            }
            first, *_, last = (run["peak_mib"] for run in runs.values())
            found[kind] = {**runs, "ratio": round(last / first, 3)}
    print(json.dumps(found, indent=2))
    sys.exit(any(found[kind]["ratio"] > GOAL for kind in ("table", "report")))


if __name__ == "__main__":
    main()
