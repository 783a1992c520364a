"""What the tools round the work cost when there is nothing to do, as one JSON object.

Run it in a workspace that is up to date: ``.venv/bin/python benchmarks/pipeline.py [RUNS]``.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "dvc_repro_seconds": ["dvc", "repro"],
    "dvc_version_seconds": ["dvc", "--version"],  # the limit: DVC's own start
    "nightly_help_seconds": ["nightly", "--help"],
    "nightly_retrain_seconds": ["nightly", "retrain"],
}


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Return the wall-clock seconds of one run of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    status = subprocess.run(["dvc", "status"], env=environment, check=True, capture_output=True, text=True).stdout
    if "up to date" not in status:
        sys.exit("error: this workspace is not up to date; run 'dvc repro' first")
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_number in range(runs + 1):
        for name, command in COMMANDS.items():
            took = seconds(command, environment)
            if round_number:  # the first round warms the caches
                times[name].append(took)
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    print(json.dumps({**medians, "runs": runs, "cores": os.cpu_count()}, indent=2))


if __name__ == "__main__":
    main()
