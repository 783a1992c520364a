import base64
import gzip
import hashlib
import html
import io
import json
import re
import tracemalloc
import urllib.parse
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tasks import gallery
from tasks.gallery import write_gallery
from tasks.rows import SCHEMA
from tests.browser import BROWSERS, Page, opened

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FAILED = ["empty", "not_an_image", "unsupported", "truncated", "too_large", "unreadable", "vanished"]
HOSTILE = [
    "</script><script>alert(1)</script>.jpg",
    '"><img src=x onerror=alert(1)>.jpg',
    "emoji 🦊/new\nline 'quoted' \"twice\".jpg",
    "javascript:alert(1)",
    "<img src=x onerror=document.body.id='owned'>{{ 7*7 }} & &amp; <b>.jpg",
    "right-to-left \u202egpj.exe",
]
SUMMARY = {
    "source": "photos/</title><script>alert(2)</script>",
    "model_id": "ab12cd34",
    "engine": "openvino-int8",
    "engine_reason": "no GPU is present",
    "threshold": 0.7,
    "seconds": 512.3,
    "images_per_second": 195.2,
    "finished": "2026-03-01T23:10:00+00:00",
    "temperature": 1.31,
    "drift": {
        "level": "none",
        "enough": True,
        "images": 1_960,
        "sentences": [],
        "views": {"features": {"effect": 0.021, "noise": 0.2, "level": "none", "details": {"largest": 0.5}}},
    },
}


def fake_rows(count=2_000, classes=CLASSES, part=1_000, failing=0.02, names=HOSTILE):
    """Yield a made-up prediction part by part: every status, odd names first, confidences as a good model has them."""
    random = np.random.default_rng(0)
    for start in range(0, count, part):
        columns = {name: [] for name in SCHEMA.names}
        for index in range(start, min(start + part, count)):
            target = int(random.integers(len(classes)))
            path = names[index] if index < len(names) else f"{classes[target]}/IMG_{index:06d}.jpg"
            row = {"path": path, "accepted": False, "model_id": "ab12cd34", "bytes": int(random.integers(9e3, 6e4))}
            if random.random() < failing:
                row["status"] = FAILED[int(random.integers(len(FAILED)))]
                row["reason"] = f"made up at {index} <i>"
            else:
                best = min(1 - 0.9 * random.beta(0.4, 3), 1.0)
                others = [classes[(target + step) % len(classes)] for step in (1, 2)]
                row |= {"status": "ok", "reason": "", "width": 500, "height": 400, "label": classes[target]}
                row |= {"labels": [classes[target], *others], "confidence": best, "accepted": best >= 0.7}
                row["probabilities"] = [best, min(best, 1 - best) * 0.8, min(best, 1 - best) * 0.1]
            for name, values in columns.items():
                values.append(row.get(name))
        yield pa.table(columns, schema=SCHEMA)


def picture(path):
    """Return a smooth picture of the size of a photograph, or None for every hundredth file."""
    random = np.random.default_rng(list(path.encode()))
    if random.random() < 0.01:
        return None
    blots = Image.fromarray(random.integers(0, 256, (12, 15, 3), np.uint8))
    return np.asarray(blots.resize((150, 120), Image.Resampling.BICUBIC))


def relative(path):
    """Return the address of a file beside the page."""
    return "../photos/" + urllib.parse.quote(path)


class GalleryPage(Page):
    """The page with the rows that travel with it."""

    @property
    def counts(self):
        return {name: int(value) for name, (value, _) in self.figures.items()}

    def rows(self):
        """Return the columns of all rows, unpacked."""
        blocks = [text for attributes, text in self.scripts if attributes.get("class") == "block"]
        columns = {}
        for block in blocks:
            for name, values in json.loads(gzip.decompress(base64.b64decode(block))).items():
                columns.setdefault(name, []).extend(values)
        return columns

    def cards(self):
        """Return the rows that have a card, in the order of the page."""
        return [int(attributes["data-row"]) for attributes in self.of("figure") if "data-row" in attributes]


def written(tmp_path, rows=None, summary=SUMMARY, thumbnail=picture, link=relative):
    """Return the page's text and what it holds."""
    destination = tmp_path / "gallery.html"
    write_gallery(destination, fake_rows() if rows is None else rows, summary, thumbnail, link)
    text = destination.read_text(encoding="utf-8")
    return text, GalleryPage(text)


@pytest.fixture(scope="module")
def table():
    return pa.concat_tables(fake_rows()).to_pydict()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    written(folder)
    return folder / "gallery.html"


@pytest.fixture(scope="module")
def page(file):
    return GalleryPage(file.read_text(encoding="utf-8"))


def test_the_figures_count_the_rows(page, table):
    failed = {f"statuses.{status}": count for status, count in Counter(table["status"]).items() if status != "ok"}
    labels = {f"labels.{label}": count for label, count in Counter(table["label"]).items() if label}
    accepted = sum(table["accepted"])
    assert page.counts == {"classified": table["status"].count("ok"), "accepted": accepted, **failed, **labels}
    assert len(failed) == len(FAILED)


def test_every_row_travels_with_the_page_in_order(page, table):
    rows = page.rows()
    names = json.loads(next(text for attributes, text in page.scripts if attributes.get("id") == "names"))
    assert rows["names"][::2] == table["path"]
    links = zip(table["path"], table["status"], strict=True)
    assert rows["names"][1::2] == [None if status == "vanished" else relative(path) for path, status in links]
    assert [names["classes"][code] for code in rows["labels"]] == table["label"]
    assert [names["statuses"][code] for code in rows["statuses"]] == table["status"]
    assert rows["reasons"] == [reason or "" for reason in table["reason"]]
    assert rows["accepted"] == table["accepted"]
    for name in ("width", "height", "bytes"):
        assert rows[name] == table[name]
    for millionths, confidence in zip(rows["confidences"], table["confidence"], strict=True):
        assert millionths == (-1 if confidence is None else round(confidence * 1e6))


def test_the_histogram_counts_what_its_links_select(page):
    bars = re.findall(r'<a href="#([^"]*)"><title>[^:]*: ([\d,]+)</title>', page.source)
    sure = page.rows()["confidences"]
    counted = 0
    for filters, count in bars:
        chosen = {name: int(value) * 10_000 for name, value in urllib.parse.parse_qsl(filters.replace("&amp;", "&"))}
        inside = sum(chosen["from"] <= value < chosen.get("below", 2_000_000) for value in sure)
        assert int(count.replace(",", "")) == inside
        counted += inside
    assert counted == sum(value >= 0 for value in sure)


def test_each_class_shows_its_least_confident_images_first_and_some_others(page, table):
    cards = page.cards()
    by_class = {}
    for row in cards:
        by_class.setdefault(table["label"][row], []).append(row)
    assert [table["label"][row] for row in cards] == [name for name in by_class for _ in by_class[name]]
    counts = Counter(table["label"])
    assert list(by_class) == sorted(CLASSES, key=lambda name: -counts[name])
    for name, rows in by_class.items():
        confidence = [round(table["confidence"][row], 6) for row in rows]
        of_class = sorted(
            round(c, 6) for c, label in zip(table["confidence"], table["label"], strict=True) if label == name
        )
        assert len(set(rows)) == gallery.LEAST + gallery.DRAWN
        assert confidence == sorted(confidence)
        assert confidence[: gallery.LEAST] == of_class[: gallery.LEAST]
        assert confidence[-1] > of_class[len(of_class) // 2]


def test_how_rows_come_in_parts_makes_no_difference(page, tmp_path):
    whole = pa.concat_tables(fake_rows())
    for parts in ([whole], [whole.slice(start, 77) for start in range(0, len(whole), 77)]):
        other = written(tmp_path, parts)[1]
        assert other.rows() == page.rows()
        assert other.cards() == page.cards()
        assert other.counts == page.counts


@pytest.mark.parametrize("classes", [100, 1_000, 2_500])
def test_pictures_are_few_however_many_classes_there_are(tmp_path, classes):
    asked = []

    def thumbnail(path):
        asked.append(path)
        return np.zeros((9, 9, 3), np.uint8)

    rows = fake_rows(6_000, [f"class {i}" for i in range(classes)], names=[])
    _, page = written(tmp_path, rows, thumbnail=thumbnail)
    cards = page.cards()
    assert len(asked) == len(set(asked)) == len(set(cards)) == len(cards)
    assert min(classes, 950) <= len(cards) <= gallery.MOST_PICTURES


def test_thumbnails_are_small_and_what_is_gone_is_told(tmp_path):
    def thumbnail(path):
        return None if path.endswith("7.jpg") else np.full((300, 200, 3), 128, np.uint8)

    _, page = written(tmp_path, fake_rows(300), thumbnail=thumbnail)
    sources = [attributes["src"] for attributes in page.of("img")]
    gone = page.text.count("no picture")
    assert gone > 0
    assert len(sources) + gone == len(page.cards())
    for source in sources:
        opened = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,"))))
        assert opened.size == (64, 96)
        assert np.abs(np.asarray(opened).astype(int) - 128).max() <= 2


def test_only_the_pages_own_script_can_run_and_nothing_is_loaded(tmp_path):
    text, page = written(tmp_path, fake_rows(400, classes=HOSTILE, failing=0.2))
    run = [code for attributes, code in page.scripts if "type" not in attributes]
    assert len(run) == 1
    digest = base64.b64encode(hashlib.sha256(run[0].encode()).digest()).decode()
    policy = next(attributes["content"] for attributes in page.of("meta") if attributes.get("http-equiv"))
    assert policy == f"default-src 'none'; script-src 'sha256-{digest}'; img-src data:; style-src 'unsafe-inline'"
    assert {attributes["type"] for attributes, _ in page.scripts if "type" in attributes} == {
        "application/json",
        "text/plain",
    }
    assert not re.search(r"https?:|url\(|@import", re.sub(r"[\w+/=]{200,}", "", text))
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/webp").startswith("data:image/webp")
        assert attributes.get("href", "#").startswith(("#", "../photos/")), tag


def test_hostile_names_are_shown_as_text(tmp_path):
    _, page = written(tmp_path, fake_rows(60, classes=HOSTILE, failing=0))
    for name in [*HOSTILE, SUMMARY["source"]]:
        assert name in page.text, name
    assert "<i>" in written(tmp_path, fake_rows(60, failing=1))[1].text


def test_failures_are_listed_by_status_with_their_reasons(tmp_path):
    rows = pa.concat_tables(fake_rows(400, failing=0.5, names=[]))
    table = rows.to_pydict()
    _, page = written(tmp_path, [rows])
    section = re.sub(r"\s+", " ", page.text.partition("These files have a row each")[2].partition("All files")[0])
    links = {attributes["href"] for attributes in page.of("a")}
    for status, count in Counter(table["status"]).items():
        of_status = [row for row, other in enumerate(table["status"]) if other == status]
        for place, row in enumerate(of_status):
            listed = status != "ok" and place < gallery.FAILURES
            assert (f"{table['path'][row]}{table['reason'][row]}" in section) == listed
        if status != "ok":
            assert count > gallery.FAILURES
            assert f"#status={status}" in links
    vanished = [table["path"][row] for row, status in enumerate(table["status"]) if status == "vanished"]
    assert not {relative(path) for path in vanished} & links


def test_drift_is_told_in_its_own_words_or_calmly_or_not_at_all(tmp_path):
    calm = "look like the ones that the model was trained on"
    strong = {"level": "strong", "sentences": ["Darker than <training>.", "No frogs."]}
    for drift, sentences, calmly in (
        (SUMMARY["drift"], [], True),
        (strong, strong["sentences"], False),
        (None, [], False),
    ):
        text, page = written(tmp_path, fake_rows(50), {**SUMMARY, "drift": drift})
        assert all(sentence in page.text for sentence in sentences)
        assert (calm in page.text) == calmly
        assert text.count('class="warning strong"') == len(sentences)


def test_the_header_and_the_record_tell_how_it_was_done(page):
    for words in (
        "model ab12cd34",
        "openvino-int8",
        "1 March 2026, 23:10 UTC",
        "2,000 files",
        "in 9 minutes",
        "195 images/s",
    ):
        assert words in page.text
    for words in ("no GPU is present", "temperature", "1.31", "features.effect", "0.021", "accepted from 70.0%"):
        assert words in page.text
    assert "details" not in page.text


def test_no_rows_no_summary_no_images_and_no_threshold_have_a_page(tmp_path):
    _, page = written(tmp_path, [], {})
    assert page.counts == {"classified": 0}
    _, page = written(tmp_path, fake_rows(20, failing=0), {"threshold": 0.0, "drift": None}, link=lambda path: None)
    assert "every file could be read" in page.text
    assert "accepted" not in page.counts
    assert not [attributes for attributes in page.of("a") if not attributes["href"].startswith("#")]
    _, page = written(tmp_path, fake_rows(20, failing=1), {"source": "x"})
    assert page.counts["classified"] == 0
    assert not page.cards()


def test_probabilities_of_all_classes_do_not_swell_the_page(tmp_path):
    rows = pa.concat_tables(fake_rows(300, names=[]))
    many = [
        None if labels is None else [*labels, *(f"other {i}" for i in range(500))]
        for labels in rows["labels"].to_pylist()
    ]
    shares = [None if labels is None else [0.5] * len(labels) for labels in many]
    for name, values in (("labels", many), ("probabilities", shares)):
        index = SCHEMA.get_field_index(name)
        rows = rows.set_column(index, SCHEMA.field(index), pa.array(values, SCHEMA.field(index).type))
    text, page = written(tmp_path, [rows])
    assert "other 1" in page.text
    assert "other 2" not in page.text
    assert len(text) < 1e6


@pytest.mark.slow
def test_a_hundred_thousand_rows_make_a_light_page_in_little_memory(tmp_path):
    parts = list(fake_rows(100_000, part=5_000))
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    tracemalloc.start()
    text, page = written(tmp_path, parts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(page.rows()["labels"]) == 100_000
    assert len(text) < 6e6
    assert peak < 100e6
    assert pool.bytes_allocated() - before < 20e6


@pytest.mark.slow
@pytest.mark.parametrize("browser", BROWSERS)
class TestInABrowser:
    """What the script makes of the page, where there is a browser to run it."""

    __test__ = bool(BROWSERS)

    @staticmethod
    def opened(browser, file, state):
        """Return the page as the browser has it once the script is done."""
        return GalleryPage(opened(browser, file, urllib.parse.urlencode(state)))

    @staticmethod
    def listed(page):
        """Return the paths in the table of all files, and what is said of how many there are."""
        body = page.source.partition('<table id="rows"')[2].partition("</table>")[0].partition("<tbody>")[2]
        paths = [html.unescape(path) for path in re.findall(r'<bdi class="code">([^<]*)</bdi>', body)]
        return paths, re.search(r'<output id="count">([^<]*)<', page.source).group(1)

    def test_shows_all_files_a_page_at_a_time(self, browser, file, table):
        for number in (1, 3):
            paths, count = self.listed(self.opened(browser, file, {"page": number}))
            assert paths == table["path"][(number - 1) * 100 : number * 100]
            assert count == "2,000 files"

    def test_selects_what_the_address_says(self, browser, file, table):
        page = self.opened(browser, file, {"class": "cat", "below": 60, "sort": "confidence"})
        doubtful = [
            r for r, c in enumerate(table["confidence"]) if c is not None and c < 0.6 and table["label"][r] == "cat"
        ]
        assert len(doubtful) > 3
        doubtful.sort(key=lambda row: table["confidence"][row])
        paths, count = self.listed(page)
        assert paths == [table["path"][row] for row in doubtful]
        assert count == f"{len(doubtful)} of 2,000 files"
        cards = [attributes for attributes in page.of("figure") if "data-row" in attributes]
        assert [int(card["data-row"]) for card in cards if "hidden" not in card] == doubtful[: gallery.LEAST]
        sections = [attributes for attributes in page.of("details") if "hidden" not in attributes]
        assert len(sections) == 1

    def test_finds_failures_and_hostile_names(self, browser, file, table):
        failures = [path for path, status in zip(table["path"], table["status"], strict=True) if status != "ok"]
        assert self.listed(self.opened(browser, file, {"status": "failed", "sort": "-path"}))[0] == failures[::-1]
        page = self.opened(browser, file, {"text": "<"})
        assert self.listed(page)[0] == [name for name in HOSTILE if "<" in name]
        assert not [attributes for attributes in page.of("body") if attributes.get("id")]
