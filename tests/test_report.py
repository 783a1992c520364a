import hashlib
import io
import re
from base64 import b64decode, b64encode

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tasks import charts
from tasks.confusions import MATRIX_CLASSES
from tasks.datacard import render_data_card
from tasks.evaluate import EvaluateParams, summarize
from tasks.metrics import calibration_bins
from tasks.pages import thumbnail, thumbnail_edge
from tasks.report import Picture, ReportData, render_report
from tasks.rival import Rival
from tests.browser import BROWSERS, Page, opened, with_script

LIMIT_BYTES = 3_000_000
HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2, 3],
        "loss": [2.0, 1.0, 0.5],
        "accuracy": [0.3, 0.6, 0.8],
        "val_loss": [1.8, 1.1, 0.7],
        "val_accuracy": [0.35, 0.5, 0.75],
        "learning_rate": [0.001, 0.001, 0.0005],
        "seconds": [3.0, 2.0, 2.0],
    }
)
FACTS = {
    "created": "2025-11-23T15:45:01+00:00",
    "parameters": {"train": {"epochs": 3, "optimizer": "adam", "weights": None, "rates": [0.1, 0.2]}},
    "data_digest": "5f" * 32,
    "libraries": {"keras": "3.12.0"},
    "training": {"seconds": 97.3, "kept_epoch": 3},
    "decode": {"size": 8},
    "normalization": {"mode": "unit"},
    "engines": {"keras-float32": {"offered": True, "images_per_second": 1854.8}},
    "limits": {"minimum_agreement": 0.995, "maximum_loss": 0.003},
    "machine": {"processor": "EPYC", "cores": 2},
}
DATA = {
    "source": {"source": "folder", "file": "images.tar", "sha256": "7e" * 32},
    "decode": {"size": 8},
    "counts": {"train": 12345, "validation": 678, "test": 300},
    "left_out": {"truncated": 4, "label_conflict": 2},
    "near_duplicates": {"pairs": 9, "across_splits": 3},
}
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "🦊 & {{ 7*7 }}", "plain"]


class Images:
    """As many random pictures as one likes, in no memory."""

    def __init__(self, count, size):
        self.shape = (count, size, size, 3)

    def __getitem__(self, index):
        return np.random.default_rng(index).integers(0, 256, self.shape[1:], np.uint8)


def report_data(
    classes=None, count=300, size=8, quality=2.0, pictures=4, threshold=0.5, temperature=1.0, absent=0, **changes
):
    """What a report shows of random predictions; the last ``absent`` classes have no test images."""
    classes = classes or [f"class {i}" for i in range(7)]
    random = np.random.default_rng(0)
    targets = random.integers(0, len(classes) - absent, count)
    scores = random.normal(size=(count, len(classes))) + quality * np.eye(len(classes))[targets]
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    engines = {"keras-float32": probabilities, "openvino-bfloat16": probabilities.round(2)}
    found = summarize(
        engines,
        targets,
        classes,
        EvaluateParams(pictures=pictures),
        model_id="abc123",
        test_digest="d1",
        threshold=threshold,
        temperature=temperature,
    )
    found.predictions["name"] = [f"{classes[target]}/{i}.png" for i, target in enumerate(targets)]

    def picture(index):
        pixels = random.integers(0, 256, (size, size, 3), np.uint8)
        return Picture(index, pixels, classes[1], [(classes[0], 0.9), (classes[1], 0.05)], f"{classes[0]}/{index}.png")

    values = {
        "metrics": found.metrics,
        "classes": classes,
        "matrix": found.matrix,
        "predictions": found.predictions,
        "images": Images(count, size),
        "bins": found.bins,
        "raw_bins": found.raw_bins,
        "mistakes": [picture(i) for i in found.mistakes],
        "hits": [picture(i) for i in found.hits],
        "history": HISTORY,
        "facts": FACTS,
        "data": DATA,
        "class_counts": {name: {"train": 5000 + i, "test": 7} for i, name in enumerate(classes)},
        "reference": "keras-float32",
    }
    return ReportData(**{**values, **changes})


RIVAL_METRICS = {"accuracy": 0.7, "top1_error": 0.3, "log_loss": 0.987, "per_class": {}}
COMPARISON = {
    "gain": 0.0123,
    "test_images": 300,
    "now_right": 1017,
    "now_wrong": 894,
    "p": 0.0521,
    "interval": [-0.0012, 0.0268],
    "classes": [{"name": "class 2", "change": -0.034}],
}


def rival(**changes):
    return Rival("old987", **{"metrics": RIVAL_METRICS, "comparison": COMPARISON, **changes})


def flat(metrics, prefix=""):
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield from flat(dict(enumerate(value)), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_every_figure_is_that_of_the_json_files_and_is_shown_as_it_is():
    data = report_data(temperature=1.3, rival=rival())
    shown = Page(render_report(data)).shown
    known = {name: DATA[name] for name in ("counts", "left_out", "near_duplicates")}
    champion = {name: value for name, value in RIVAL_METRICS.items() if name != "per_class"}
    comparison = {name: value for name, value in COMPARISON.items() if name not in ("classes", "test_images")}
    speeds = {"engines": {"keras-float32": {"images_per_second": 1854.8}}}
    everything = {**data.metrics, "data": known, "champion": champion, "comparison": comparison, "bundle": speeds}
    expected = {name: value for name, value in flat(everything) if not isinstance(value, str | bool)}
    assert {name for name, _, _ in shown} == expected.keys()
    for name, value, text in shown:
        assert float(value) == expected[name], name
        scale = 100 if text.endswith("%") or name.startswith(("comparison.gain", "comparison.interval")) else 1
        digits = text.rstrip("%").replace(",", "")
        decimals = len(digits.partition(".")[2]) if "e" not in digits else 9
        assert float(digits) / scale == pytest.approx(expected[name], abs=0.51 * 10**-decimals / scale), name


@pytest.mark.parametrize("classes", [None, HOSTILE, [f"c{i}" for i in range(MATRIX_CLASSES + 1)]])
def test_the_report_loads_nothing_and_runs_its_own_script_alone(classes):
    text = render_report(report_data(classes, temperature=1.3, rival=rival()))
    page = Page(text)
    assert not re.search(
        r"https?:|//[a-z]|url\((?!data:)|@import", re.sub(r"data:image/[a-z]+;base64,[\w+/=]+", "data:", text)
    )
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/png").startswith("data:image/png")
        assert attributes.get("href", "#").startswith("#")
    assert [tag for tag, _ in page.elements].count("script") == 1
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL).group(1)
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(attributes for _, attributes in page.elements if attributes.get("http-equiv"))
    expected = f"default-src 'none'; script-src 'sha256-{digest}'; img-src data:; style-src 'unsafe-inline'"
    assert policy["content"] == expected


def test_every_link_within_the_page_leads_somewhere():
    for classes in (None, [f"c{i}" for i in range(MATRIX_CLASSES + 1)]):
        page = Page(render_report(report_data(classes, rival=rival())))
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        links = {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"}
        assert len(ids) == len(set(ids))
        assert links <= set(ids)
        assert any(link.startswith("cell-") for link in links)


def test_hostile_class_names_are_shown_as_text():
    page = Page(render_report(report_data(HOSTILE, quality=0.5)))
    for name in HOSTILE:
        assert page.text.count(name) >= 3, name


def test_the_matrix_has_a_cell_per_pair_until_it_becomes_a_picture():
    small, large = (report_data([f"c{i}" for i in range(n)], count=500) for n in (MATRIX_CLASSES, MATRIX_CLASSES + 1))
    small_cells = [a for tag, a in Page(render_report(small)).elements if a.get("class", "").startswith("cell")]
    assert len(small_cells) == MATRIX_CLASSES**2
    page = Page(render_report(large))
    assert not [a for tag, a in page.elements if a.get("class", "").startswith("cell")]
    source = next(a["src"] for tag, a in page.elements if a.get("class") == "heat")
    picture = np.asarray(Image.open(io.BytesIO(b64decode(source.partition(",")[2]))))
    shares = large.matrix / large.matrix.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(picture[..., 3] / 255, shares**0.4, atol=0.005)


def test_the_matrix_shows_counts_and_row_shares():
    data = report_data(["a", "b"], count=40, quality=1.0)
    text = render_report(data)
    rows = re.findall(r'<td class="cell[^>]*><a href="[^"]*">(\d+)<small>([\d%<]+)</small>', text)
    shares = data.matrix / data.matrix.sum(axis=1, keepdims=True)
    assert [(int(count), share) for count, share in rows] == [
        (int(c), f"{s:.0%}") for c, s in zip(data.matrix.ravel(), shares.ravel(), strict=True)
    ]


def test_the_commonest_confusions_come_first_with_their_share_of_the_class():
    matrix = np.array([[8, 2, 0], [5, 4, 1], [0, 0, 9]])
    table = render_report(report_data(["a", "b", "c"], matrix=matrix)).partition("Commonest confusions")[2]
    body = table.partition("<tbody>")[2].partition("</tbody>")[0]
    cells = [re.findall(r">([^<\n]+)<", row) for row in body.split("</tr>")[:-1]]
    assert cells == [["b", "a", "5", "50.0%"], ["a", "b", "2", "20.0%"], ["b", "c", "1", "10.0%"]]


@pytest.mark.parametrize(("classes", "size"), [(10, 32), (30, 64), (100, 64), (1000, 64)])
def test_the_report_of_ten_thousand_images_is_light(classes, size):
    data = report_data([f"class {i}" for i in range(classes)], count=10_000, size=size, pictures=64)
    assert len(data.mistakes) == len(data.hits) == 64
    assert len(render_report(data).encode()) < LIMIT_BYTES


def test_a_picture_shows_its_most_probable_classes_and_a_heat_map_beside_it():
    heat = np.full((8, 8, 3), 77, np.uint8)
    pictures = [
        Picture(3, np.zeros((8, 8, 3), np.uint8), "class 1", [("class 0", 0.75), ("class 1", 0.25)], heat=heat),
        Picture(4, np.zeros((8, 8, 3), np.uint8), "class 1", [("class 0", 0.6), ("class 1", 0.4)]),
    ]
    text = render_report(report_data(mistakes=pictures, hits=[]))
    shown = re.findall(r'class="([a-z ]*)"><bdi>class (\d)</bdi><span>([\d.]+)%.*?width:([\d.]+)%', text)
    assert shown == [
        *((" first", "0", "75.0", "75.00"), ("true", "1", "25.0", "25.00")),
        *((" first", "0", "60.0", "60.00"), ("true", "1", "40.0", "40.00")),
    ]
    first, beside, second = re.findall(r'<img src="([^"]*)" alt="(?:Test image|What)', text)
    assert first == second
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(b64decode(beside.partition(",")[2])))), heat)


def test_the_model_in_service_stands_beside_this_one():
    text = Page(render_report(report_data(rival=rival()))).text
    assert "old987 was in service when this was evaluated" in text
    assert "Recall fell most in class 2 (-3.40)." in text
    other = Page(render_report(report_data(rival=rival(comparison=None, obstacle="it saw another test set")))).text
    assert "The figures do not compare: it saw another test set" in other
    assert "70.00%" in other
    assert "McNemar" not in other
    missing = Page(render_report(report_data(rival=rival(metrics={}, comparison=None, obstacle="it is gone")))).text
    assert "its figures were not at hand: it is gone" in missing
    unknown = Page(render_report(report_data(rival=Rival(None, {}, obstacle="champion.json is damaged")))).text
    assert "Which model was in service when this was evaluated is not known: champion.json is damaged." in unknown
    assert "None" not in unknown.partition("Beside the model in service")[2].partition("What it learned from")[0]
    assert "Beside the model in service" not in Page(render_report(report_data())).text


def test_how_many_of_no_accepted_images_are_right_is_not_said():
    old = {"accepted": 0.5, "accepted_accuracy": 0.75}
    none, some = (report_data(threshold=threshold, rival=rival(metrics=old)) for threshold in (0.999, 0.5))
    assert none.metrics["accepted"] == 0
    page = Page(render_report(none))
    assert "have a confidence of 99.9% or more\n" in page.text
    assert "Right among the accepted" not in page.text
    assert not [name for name in page.figures if "accepted_accuracy" in name]
    other = report_data(rival=rival(metrics={"accepted": 0.0, "accepted_accuracy": 0.0}))
    assert "Right among the accepted" not in Page(render_report(other)).text
    assert "Right among the accepted" in Page(render_report(some)).text


@pytest.mark.parametrize(("classes", "there"), [(5, False), (6, True)])
def test_where_top_5_error_is_zero_by_definition_it_has_no_interval_and_is_not_compared(classes, there):
    metrics = {"top5_error": 0.0, "per_class": dict.fromkeys("abcdef"[:classes])}
    page = Page(render_report(report_data(list("abcdef"[:classes]), rival=rival(metrics=metrics))))
    assert ("zero by definition: there are only 5 classes" in page.text) is not there
    assert "top5_error" in page.figures
    for name in ("intervals.top5_error.0", "intervals.top5_error.1", "champion.top5_error"):
        assert (name in page.figures) is there


def test_a_difference_is_for_the_better_or_the_worse_by_what_the_figure_is():
    old = {"accuracy": 0.0, "top1_error": 0.0, "log_loss": 99.0, "accepted": 0.1, "accepted_accuracy": 1.0}
    page = (
        render_report(report_data(rival=rival(metrics=old)))
        .partition('<table class="duel">')[2]
        .partition("</table>")[0]
    )
    words = [re.findall(r"better|worse(?=<)", row) for row in page.split("<tr>")[2:]]
    assert words == [["better"], ["worse"], ["better"], [], ["worse"]]


def test_a_temperature_shows_the_diagram_before_and_after_it():
    before, after = (render_report(report_data(temperature=t)) for t in (1.0, 1.3))
    assert before.count('aria-label="Accuracy over confidence') == 1
    assert after.count('aria-label="Accuracy over confidence') == 2
    assert "on the validation split no temperature improved them." in " ".join(Page(before).text.split())
    data = report_data(temperature=1.3)
    for bins in (data.bins, data.raw_bins):
        fullest = max(bins, key=lambda b: b.images)
        assert f"{fullest.correct:,} of {fullest.images:,} right" in after


def test_the_report_counts_the_data_it_was_trained_on():
    text = render_report(report_data(["a", "b"])).partition('id="data"')[2]
    assert re.search(r"<dt>Left out</dt><dd[^>]*>6</dd>", text)
    assert "At the time, data/card.html showed samples" in text
    assert "4 truncated, 2 label conflict" in re.sub(r"<[^>]*>", "", text)
    counts = [re.findall(r">([^<\n]+)</(?:bdi|td)>", row) for row in text.partition("<tbody>")[2].split("</tr>")[:2]]
    assert counts == [["a", "5,000", "0", "7"], ["b", "5,001", "0", "7"]]


def test_curves_tell_their_values_at_each_epoch_and_at_so_many_places_at_most():
    many = [charts.Series("a", [(x, 0.5) for x in range(1, 1001)], "ink")]
    assert charts.line_chart(many, "x").count('class="at"') <= charts.READOUTS
    pair = [charts.Series("training", [(1, 0.25), (2, float("nan"))], "ink"), charts.Series("val", [(2, 0.125)], "ink")]
    told = re.findall(r">(epoch [^<]*)<", charts.line_chart(pair, "x", charts.round_percent))
    assert told == ["epoch 1: training 25%", "epoch 2: val 12.5%"]


def test_a_flawless_model_without_history_or_threshold_has_a_report():
    data = report_data(["a", "b"], quality=50.0, threshold=None, history=pd.DataFrame(), hits=[])
    text = Page(render_report(data)).text
    assert "No test image got a wrong label" in text
    assert "zero by definition: there are only 2 classes" in text
    for absent in ("Accepted", "How it was trained", "Pictures worth a look", "threshold"):
        assert absent not in text


def test_a_class_without_images_shows_dashes_instead_of_scores():
    data = report_data(["a", "b", "c"], absent=1)
    assert data.metrics["per_class"]["c"]["images"] == 0
    row = re.search(r"<bdi>c</bdi></th>.*?</tr>", render_report(data), re.DOTALL).group()
    assert row.count("–") == 3


def test_parameters_and_digests_stand_in_the_record():
    text = Page(render_report(report_data())).text
    for word in ("optimizer", "adam", "0.1, 0.2", "5f" * 32, "3.12.0", "97 seconds", "23 November 2025, 15:45 UTC"):
        assert word in text, word


def test_the_same_data_gives_the_same_page():
    assert render_report(report_data()) == render_report(report_data())


def test_ticks_are_round_and_cover_the_range():
    assert charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(0.952, 0.987) == [0.95, 0.96, 0.97, 0.98, 0.99]
    assert charts.ticks(3, 3)[0] <= 3 <= charts.ticks(3, 3)[-1]
    assert charts.ticks(0, 0)[-1] > 0


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (999, "999"),
        (1_000, "1k"),
        (12_345, "12.3k"),
        (999_499, "999k"),
        (999_600, "1M"),
        (40_551_040, "40.6M"),
        (999_500_000, "1G"),
        (1_196_163_072, "1.2G"),
        (19_628_048_384, "19.6G"),
        (2e12, "2T"),
    ],
)
def test_a_count_is_written_in_the_unit_that_its_rounded_value_has(count, text):
    assert charts.compact(count) == text


def test_a_line_has_gaps_where_values_are_missing_and_one_value_is_a_dot():
    gap = charts.line_chart([charts.Series("a", [(1, 1.0), (2, float("nan")), (3, 2.0), (4, 1.0)], "ink")], "x")
    assert re.search(r'd="M[\d.]+ [\d.]+M[\d.]+ [\d.]+L[\d.]+ [\d.]+"', gap)
    dot = charts.line_chart([charts.Series("a", [(1, 0.5)], "ink")], "x").partition('<g class="at">')[0]
    assert dot.count("<circle") == 1
    assert charts.line_chart([charts.Series("a", [(1, float("nan"))], "ink")], "x") == ""


def test_curves_that_end_on_the_same_value_are_drawn_one_above_the_other():
    same = [charts.Series(name, [(1, 0.5), (2, 1.0)], "ink") for name in ("training", "validation")]
    chart = charts.line_chart(same, "x")
    assert chart.index(">training<") < chart.index(">validation<")


def test_nearby_axis_labels_of_shares_differ():
    chart = charts.line_chart([charts.Series("a", [(1, 0.985), (2, 0.99)], "ink")], "x", y_text=charts.round_percent)
    labels = re.findall(r'text-anchor="end">([^<]*)<', chart)
    assert len(labels) >= 5
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("low", "high", "first"), [(0.2, 0.3, "0%"), (0.86, 0.92, "40%"), (0.95, 0.98, "80%"), (0.9985, 1.0, "99%")]
)
def test_the_interval_is_drawn_on_a_scale_that_shows_it(low, high, first):
    chart = charts.interval_chart((low + high) / 2, low, high)
    assert f'text-anchor="start">{first}<' in chart
    left, width = (float(re.search(rf'<rect [^>]*{name}="([\d.]+)"', chart).group(1)) for name in ("x", "width"))
    assert left >= 0
    assert left + width <= charts.WIDTH
    assert width > 10


def test_reliability_bars_end_at_the_accuracy():
    bins = calibration_bins([0.95] * 4, [True, True, True, False], bin_count=10)
    chart = charts.reliability_diagram(bins, None)
    (height,) = re.findall(r'<rect [^>]*height="([\d.]+)"', chart)
    full = 330 - charts.TOP - charts.BOTTOM
    assert float(height) == pytest.approx(0.75 * full, abs=0.06)
    assert "3 of 4 right" in chart


def test_thumbnails_keep_small_pictures_exactly_and_shrink_large_ones():
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    for source, edge, shape in ((pixels, 112, (8, 8, 3)), (np.zeros((300, 200, 3), np.uint8), 60, (60, 40, 3))):
        back = np.asarray(Image.open(io.BytesIO(b64decode(thumbnail(source, edge).partition(",")[2]))))
        assert back.shape == shape
        np.testing.assert_array_equal(back, source if shape == source.shape else 0)
    assert thumbnail_edge(1) == 112
    assert thumbnail_edge(1000) ** 2 * 1000 <= 300_000


@pytest.mark.slow
@pytest.mark.parametrize("browser", BROWSERS)
class TestInABrowser:
    """What the script makes of the page, where there is a browser to run it."""

    __test__ = bool(BROWSERS)

    def panels_shown(self, browser, folder, do="", fragment=""):
        """Return the ids of the panels that one sees, and of the links that are said to be open."""
        tell = 'for (const p of document.querySelectorAll(".panel")) p.dataset.shown = getComputedStyle(p).display;'
        text = render_report(report_data(["a", "b", "c"], count=29))
        (folder / "report.html").write_text(with_script(text, do + tell), encoding="utf-8")
        page = Page(opened(browser, folder / "report.html", fragment))
        panels = [attributes for attributes in page.of("div") if "data-shown" in attributes]
        assert len(panels) > 3
        expanded = {link["href"] for link in page.of("a") if link.get("aria-expanded") == "true"}
        return [panel["id"] for panel in panels if panel["data-shown"] != "none"], expanded

    def test_the_address_of_a_cell_opens_its_panel_and_no_other(self, browser, tmp_path):
        assert self.panels_shown(browser, tmp_path) == ([], set())
        assert self.panels_shown(browser, tmp_path, fragment="cell-1-0") == (["cell-1-0"], {"#cell-1-0"})

    def test_a_cell_opens_its_panel_closes_the_others_and_closes_it_again(self, browser, tmp_path):
        click = "document.querySelector(\"a[href='#cell-0-0']\").click();"
        assert self.panels_shown(browser, tmp_path, click, "cell-1-0") == (["cell-0-0"], {"#cell-0-0"})
        assert self.panels_shown(browser, tmp_path, click * 2, "cell-1-0") == ([], set())
        assert self.panels_shown(browser, tmp_path, "document.querySelector('.back').click();", "cell-1-0")[0] == []

    @pytest.mark.parametrize(
        ("columns", "key", "order"),
        [
            ([1], "images", "descending"),
            ([1, 1], "images", "ascending"),
            ([3], "recall", "descending"),
            ([1, 0], "", ""),
        ],
    )
    def test_a_table_is_sorted_by_the_column_that_is_clicked(self, browser, tmp_path, columns, key, order):
        data = report_data(["b", "c", "a"], count=3_000, quality=0.5)
        scores, expected = data.metrics["per_class"], data.classes
        assert min(score["images"] for score in scores.values()) < 1000 < max(s["images"] for s in scores.values())
        heads = 'document.querySelectorAll("#classes thead th")'
        clicks = "".join(f"{heads}[{column}].click();" for column in columns)
        (tmp_path / "report.html").write_text(with_script(render_report(data), clicks), encoding="utf-8")
        table = opened(browser, tmp_path / "report.html").partition('id="classes"')[2].partition("</tbody>")[0]
        if key:
            expected = sorted(expected, key=lambda name: scores[name][key], reverse=order == "descending")
        assert re.findall(r'<th scope="row"><bdi>(\w)</bdi>', table) == expected
        assert re.findall(r'aria-sort="(\w+)"', table) == ([order] if order else [])


def card(names, size=8, samples=10):
    random = np.random.default_rng(0)
    rows = [
        {
            "name": f"{name}/{i}.png",
            "class": name,
            "split": split,
            "status": "ok",
            "reason": "",
            "width": 8,
            "height": 8,
        }
        for k, name in enumerate(names)
        for i, split in enumerate(["train"] * (6 + k % 3) + ["validation"] * 2 + ["test"])
    ]
    rows[0] |= {"status": "label_conflict", "reason": "same content in a, b"}
    rows[7] |= {"status": "truncated", "reason": "the file ends after 212 bytes", "width": 0, "height": 0}
    rows[8] |= {"status": "truncated", "reason": "the file ends after 99 bytes"}
    manifest = pd.DataFrame(rows)
    used = manifest[manifest["status"] == "ok"]
    summary = {
        "source": {"source": "folder", "file": "images.tar"},
        "decode": {"size": size, "resize": "squash"},
        "normalization": {
            "mode": "standardize",
            "mean": [1.0, 2.0, 3.0],
            "std": [4.0, 5.0, 6.0],
            "channel_order": "BGR",
        },
        "counts": {split: int((used["split"] == split).sum()) for split in ("train", "validation", "test")},
        "near_duplicates": {"pairs": 1, "across_splits": 1, "first": [["x/1.png", "y/2.png"]]},
        "data_digest": "5f" * 32,
        "test_digest": "3c" * 32,
    }
    images = {name: [random.integers(0, 256, (size, size, 3), np.uint8) for _ in range(samples)] for name in names}
    return summary, render_data_card(summary, manifest, images)


def test_the_card_counts_what_the_manifest_holds():
    summary, text = card(["a", "b", "c"])
    figures = {name: int(value) for name, (value, _) in Page(text).figures.items()}
    assert figures == {
        **{f"counts.{split}": count for split, count in summary["counts"].items()},
        "left_out": 3,
        "left_out.truncated": 2,
        "left_out.label conflict": 1,
    }
    assert re.search(r"<bdi>c</bdi>.*?>11<.*?>8<.*?>2<.*?>1<", text, re.DOTALL)
    assert "the file ends after 212 bytes" in text
    assert "RGB into BGR" in text
    assert "every image is 8 × 8 pixels" in text


def test_the_card_escapes_names_and_loads_nothing():
    _, text = card(HOSTILE)
    page = Page(text)
    for name in HOSTILE:
        assert page.text.count(name) >= 2
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.elements}
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.elements if tag == "img")


def test_the_card_of_many_classes_of_photographs_is_light():
    _, text = card([f"class {i}" for i in range(1000)], size=48)
    assert len(text.encode()) < LIMIT_BYTES
    assert "The first 40 of 1,000 classes" in text
