"""How large the report of 10,000 test images is, how fast it opens in a browser, and what it loads from elsewhere.

``.venv/bin/python benchmarks/report_page.py [--images 10000] [--runs 9] [--browser chromium]``

The predictions are made up, of ten classes, 83 % of them right; the pictures are of 32 px and noise, which no format
makes smaller. Headless Chromium opens the report and an empty page in turns and makes a screenshot of each, once it has
loaded. The seconds are those that the report takes longer, so without the browser's own start. Requests are the page's
in the browser's network log; a page that asks for a picture is opened, too, so that 0 means something.

Prints one JSON object; exits with 1 if the report makes a request or takes more than 2 s. Without a browser it is only
made and weighed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from tasks.heat import overlay
from tasks.report import ReportData, render_report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.browser import BROWSERS
from tests.test_report import report_data

GOAL_SECONDS = 2.0
CLASSES, SIZE, PICTURES, QUALITY = 10, 32, 24, 2.6
EMPTY = "<!doctype html><title>empty</title>"
ASKING = f"{EMPTY}<img src='http://127.0.0.1:9/picture.png'>"


def make_data(images: int) -> ReportData:
    """Return what the report shows: made-up predictions, and pictures with heat maps as an evaluation adds them."""
    classes = [f"class {i}" for i in range(CLASSES)]
    data = report_data(classes, count=images, size=SIZE, quality=QUALITY, pictures=PICTURES)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    heat = np.exp(-2 * (x**2 + y**2)).astype(np.float32)
    mistakes, hits = (
        [replace(picture, heat=overlay(picture.pixels, heat)) for picture in pictures]
        for pictures in (data.mistakes, data.hits)
    )
    return replace(data, mistakes=mistakes, hits=hits)


def seconds(browser: str, page: Path, *options: str) -> float:
    """Open a page until it has been painted; return how long that took, the browser's start and end included."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1280,1000"]
    # The browser's own requests are none of the page's, and lead nowhere.
    command += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", *options]
    command += [f"--user-data-dir={page.parent / 'profile'}", f"--screenshot={page.with_suffix('.png')}"]
    began = time.perf_counter()
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
    return time.perf_counter() - began


def requests(browser: str, page: Path) -> int:
    """Return how many requests a page makes to anything but itself."""
    log = page.with_suffix(".json")
    seconds(browser, page, f"--log-net-log={log}")
    asked = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # What the browser wants for itself has no origin; a page that is a file has one, which is null.
    return len({p["url"] for p in asked if p.get("url", "").startswith("http") and p.get("initiator") == "null"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--browser", default=BROWSERS[0] if BROWSERS else None)
    options = parser.parse_args()
    data = make_data(options.images)
    text = render_report(data)
    facts = {"test_images": options.images, "accuracy": data.metrics["accuracy"], "bytes": len(text.encode())}
    if not options.browser:
        print(json.dumps({**facts, "browser": None}, indent=2))
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        report, empty, asking = (Path(name) / f"{page}.html" for page in ("report", "empty", "asking"))
        for page, content in ((report, text), (empty, EMPTY), (asking, ASKING)):
            page.write_text(content, encoding="utf-8")
        if not requests(options.browser, asking):
            sys.exit("error: the network log does not show the request of a page that makes one")
        facts["requests"] = requests(options.browser, report)
        runs = [[seconds(options.browser, page) for page in (report, empty)] for _ in range(options.runs)]
    longer = sorted(round(with_report - without, 3) for with_report, without in runs)
    facts |= {"seconds": statistics.median(longer), "least": longer[0], "most": longer[-1], "goal": GOAL_SECONDS}
    print(json.dumps(facts, indent=2))
    sys.exit(facts["requests"] > 0 or facts["seconds"] > GOAL_SECONDS)


if __name__ == "__main__":
    main()
