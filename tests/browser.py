"""What a browser makes of a page: of its text alone, and a real one, with its scripts, where there is one."""

import html.parser
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

#: The first browser found, for ``pytest.mark.parametrize``; empty where there is none.
BROWSERS = [found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))][:1]
VOID = {"meta", "img", "br", "input"}


class Page(html.parser.HTMLParser):
    """A page's elements with attributes, visible text, scripts with theirs, and figures in ``<data>`` elements.

    ``shown`` has a metric's name, value and text for each of its figures, ``figures`` value and text by name.
    """

    def __init__(self, text):
        super().__init__()
        self.source, self.text = text, ""
        self.elements, self.shown, self.scripts, self._open = [], [], [], []
        self.feed(text)
        assert not self._open, f"never closed: {self._open}"
        self.figures = {name: (value, text) for name, value, text in self.shown}

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if "data-metric" in dict(attrs):
            self.shown.append([dict(attrs)["data-metric"], dict(attrs)["value"], ""])
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if "script" in self._open:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif "style" not in self._open:
            self.text += data
        if "data" in self._open:
            self.shown[-1][2] += data

    def of(self, tag):
        return [attributes for found, attributes in self.elements if found == tag]


def opened(browser: str, file: Path, fragment: str = "") -> str:
    """Return a page's text as the browser has it once the scripts are done."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += [f"--user-data-dir={file.parent / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    command = [browser, *options, f"{file.as_uri()}#{fragment}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def with_script(text: str, code: str) -> str:
    """Return a page that runs ``code`` after its own script; its policy allows both and nothing else."""
    digest = b64encode(sha256(code.encode()).digest()).decode()
    assert text.count("script-src ") == 1
    allowed = text.replace("script-src ", f"script-src 'sha256-{digest}' ")
    return allowed.replace("</body>", f"<script>{code}</script></body>")
