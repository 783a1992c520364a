import json
import zipfile
from io import BytesIO

import cv2
import numpy as np
import pytest

from tasks.drift import CHANCE, compare
from tasks.errors import NightlyError
from tasks.tally import CONFIDENCE_BINS, LOOKS, STATISTICS, Tally, image_statistics

CLASSES = ["ant", "bee", "cow", "dog", "elk"]
PRIORS = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
FEATURES = 24


def draw(count, seed, *, brightness=0.47, contrast=0.21, gray=False, priors=PRIORS, sharpness=3.0, shift=0.0):
    """Statistics, features and probabilities of images that share lightness, tint, class and sharpness.

    Features are rectified and correlated, as pooled ones are; one is never active, one in few images.
    """
    generator = np.random.default_rng(seed)
    light = generator.normal(brightness, 0.12, (count, 1))
    tint = np.zeros((count, 3)) if gray else generator.normal([0.01, 0, -0.02], 0.05, (count, 3))
    spread = np.repeat(generator.gamma(9, contrast / 9, (count, 1)), 3, axis=1)
    statistics = np.clip(np.hstack([light + tint, spread]), 0, 1).astype(np.float32)
    labels = generator.choice(len(priors), count, p=priors)
    common = np.random.default_rng(0).normal(0, 1, (len(priors) + 4, FEATURES))
    factors = np.hstack([np.eye(len(priors))[labels], generator.normal(shift, 1, (count, 4))])
    features = np.maximum(factors @ common + generator.normal(0, 0.5, (count, FEATURES)), 0)
    features[:, 0] = 0
    features[:, 1] = np.where(generator.random(count) < 0.004, 5, 0)
    logits = sharpness * np.eye(len(priors))[labels] * generator.gamma(4, 0.5, (count, 1))
    logits += generator.normal(0, 0.3, logits.shape)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return statistics, features.astype(np.float32), probabilities.astype(np.float32)


def tally(*rows):
    result = Tally()
    result.add(*rows)
    return result


def drift(count, seed=1, **change):
    return compare(tally(*draw(4000, 0)), tally(*draw(count, seed, **change)), CLASSES)


def told(report, words):
    return any(words in sentence for sentence in report.sentences)


def test_statistics_are_those_of_numpy():
    pixels = np.random.default_rng(0).integers(0, 256, (37, 23, 3), dtype=np.uint8)
    found = image_statistics(pixels)
    expected = [*(pixels / 255).mean(axis=(0, 1)), *(pixels / 255).std(axis=(0, 1))]
    assert found.dtype == np.float32
    assert found.shape == (len(STATISTICS),)
    assert found == pytest.approx(expected, abs=1e-6)
    # a view into a larger image, as a crop is
    assert image_statistics(pixels[3:30, 2:9]) == pytest.approx(image_statistics(pixels[3:30, 2:9].copy()), abs=0)


@pytest.mark.parametrize("count", [30, 50, 500, 5000])
@pytest.mark.parametrize("reference_count", [150, 5000])
def test_the_same_distribution_is_no_drift_in_99_of_100_draws(count, reference_count):
    generator = np.random.default_rng(1)
    population = draw(20_000, 0)

    def sample(size):
        chosen = generator.integers(0, 20_000, size)
        return tally(*(rows[chosen] for rows in population))

    reference = sample(reference_count)
    reports = [compare(reference, sample(count), CLASSES) for _ in range(100)]
    assert sum(report.level != "none" for report in reports) <= 1
    assert all(bool(report.sentences) == (report.level != "none") for report in reports)


@pytest.mark.parametrize("classes", [2, 100, 1000])
def test_labels_drawn_alike_are_no_drift_whatever_the_number_of_classes(classes):
    generator = np.random.default_rng(0)
    priors = generator.dirichlet(np.ones(classes))
    names = [str(i) for i in range(classes)]

    def labeled(count):
        labels = generator.choice(classes, count, p=priors)
        return tally(np.full((count, 6), 0.5), None, np.eye(classes)[labels])

    reference = labeled(3000)
    for count in (50, 500):
        reports = [compare(reference, labeled(count), names) for _ in range(100)]
        assert sum(report.level != "none" for report in reports) <= 1
        details = [report.views["classes"].details for report in reports]
        distance, expected = (np.mean([d[name] for d in details]) for name in ("distance", "noise_taken_off"))
        assert expected == pytest.approx(distance, rel=0.15)


@pytest.mark.parametrize("count", [50, 500, 5000])
@pytest.mark.parametrize(
    ("change", "view", "words"),
    [
        ({"brightness": 0.31}, "images", "The images are darker: mean brightness 0.3"),
        ({"brightness": 0.62}, "images", "The images are brighter: mean brightness 0.6"),
        ({"contrast": 0.1}, "images", "The images have less contrast: mean standard deviation 0.1"),
        ({"gray": True}, "images", "The images are gray: mean saturation 0.00 against 0.1"),
        ({"shift": 2.0}, "features", "The network sees something else: its features differ by "),
        ({"priors": PRIORS[::-1]}, "classes", "The classes are mixed differently than in validation: "),
        ({"sharpness": 1.2}, "confidence", "The model is less sure than in validation: mean confidence 0."),
    ],
)
def test_each_kind_of_drift_is_detected_and_named(change, view, words, count):
    report = drift(count, **change)
    assert report.views[view].level == report.level != "none"
    assert told(report, words), report.sentences
    assert {name for name, seen in report.views.items() if seen.level != "none"} - {view} <= {"features", "confidence"}


def test_the_effect_does_not_depend_on_the_number_of_images_and_the_noise_does():
    few, many = (drift(count, brightness=0.3, shift=1.0, priors=PRIORS[::-1], sharpness=1.5) for count in (200, 20000))
    for name in few.views:
        assert few.views[name].effect == pytest.approx(many.views[name].effect, rel=0.25)
        assert few.views[name].noise > 1.5 * many.views[name].noise


def test_a_small_difference_between_many_images_is_told_in_figures_alone():
    report = drift(20000, brightness=0.44)
    look = report.facts()["views"]["images"]["details"]["brightness"]
    assert look["effect"] == pytest.approx(-0.25, abs=0.08)
    assert abs(look["effect"]) > look["noise"]
    assert report.level == "none"
    assert report.sentences == []


def test_strong_drift_outranks_some():
    assert drift(500, brightness=0.47 - 0.6 * 0.125).level == "some"
    assert drift(500, brightness=0.47 - 1.2 * 0.125).level == "strong"


def test_standardized_differences_by_hand():
    before, now = draw(400, 0)[0].astype(float), draw(50, 1)[0].astype(float)
    rest = np.full((400, 5), 0.2)
    details = compare(tally(before, None, rest), tally(now, None, rest[:50]), CLASSES).views["images"].details
    for name, seen, reference in (
        ("green_mean", now[:, 1], before[:, 1]),
        ("brightness", now[:, :3].mean(axis=1), before[:, :3].mean(axis=1)),
        ("contrast", now[:, 3:].mean(axis=1), before[:, 3:].mean(axis=1)),
    ):
        std, variance = reference.std(ddof=1), max(seen.var(ddof=1), reference.var(ddof=1))
        assert details[name]["effect"] == pytest.approx((seen.mean() - reference.mean()) / std)
        assert details[name]["noise"] == pytest.approx(3.29 * np.sqrt(variance / 50 + std**2 / 400) / std)


def looking(*colors, count=60):
    """A tally of images around the given mean colors."""
    noise = np.random.default_rng(0).normal(0, 0.01, (count, 3))
    means = np.clip(np.array(colors)[np.arange(count) % len(colors)] + noise, 0, 1)
    return tally(np.hstack([means, np.full((count, 3), 0.2)]), None, np.full((count, 5), 0.2))


@pytest.mark.parametrize(
    ("color", "words"),
    [
        ((0.6, 0.4, 0.4), "toward red: share of red 0.43 against 0.33"),
        ((0.4, 0.6, 0.4), "toward green"),
        ((0.4, 0.4, 0.6), "toward blue"),
        ((0.2, 0.5, 0.5), "toward cyan"),
        ((0.5, 0.2, 0.5), "toward magenta"),
        ((0.5, 0.5, 0.2), "toward yellow"),
    ],
)
def test_a_color_cast_is_named_by_its_color(color, words):
    varied = looking((0.6, 0.4, 0.4), (0.4, 0.6, 0.4), (0.4, 0.4, 0.6), count=300)
    assert told(compare(varied, looking(color), CLASSES), words)


def test_darkening_is_no_loss_of_color_and_gray_is_no_cast():
    warm = [(0.6, 0.5, 0.4), (0.7, 0.4, 0.3), (0.5, 0.5, 0.45)]
    dark = compare(looking(*warm), looking(*(np.array(warm) / 3)), CLASSES)
    assert len(dark.sentences) == 1
    assert told(dark, "darker")
    gray = compare(looking(*warm), looking((0.5, 0.5, 0.5)), CLASSES)
    assert not told(gray, "lean toward")
    assert told(gray, "The colors are weaker")


def test_color_after_a_gray_reference_is_strong_without_division_by_zero():
    rows = np.full((50, 6), 0.4)
    reference = tally(rows, None, np.full((50, 5), 0.2))
    assert compare(reference, reference, CLASSES).level == "none"
    colored = tally(rows + np.array([0.1, 0, 0, 0, 0, 0]), None, np.full((50, 5), 0.2))
    report = compare(reference, colored, CLASSES)
    assert report.level == "strong"
    assert told(report, "The colors are stronger")


def test_features_that_never_vary_are_counted_and_a_rare_one_does_not_outweigh_the_rest():
    statistics, features, probabilities = draw(1000, 0)
    features[:, 1] = 0
    reference = tally(statistics, features, probabilities)
    waking = features.copy()
    waking[3, 1] = 1e-3  # one image in a thousand, next to a reference that never varied
    report = compare(reference, tally(statistics, waking, probabilities), CLASSES)
    assert report.views["features"].effect == 0
    assert report.views["features"].details["constant"] == 1
    assert report.views["features"].details["features"] == FEATURES
    # constant on both sides, and different; the squares do not sum to exactly the square of the sum
    features[:, 1], waking[:, 1] = 0.1, 0.3
    report = compare(tally(statistics, features, probabilities), tally(statistics, waking, probabilities), CLASSES)
    assert report.views["features"].effect == 0


def test_feature_distance_is_the_shift_of_independent_features():
    generator = np.random.default_rng(0)
    rest = np.full((4000, 6), 0.5), np.full((4000, 5), 0.2)
    reference = tally(rest[0], generator.normal(3, 2, (4000, 50)), rest[1])
    for count in (60, 4000):
        seen = tally(rest[0][:count], generator.normal(3 + 2 * 0.7, 2, (count, 50)), rest[1][:count])
        assert compare(reference, seen, CLASSES).views["features"].effect == pytest.approx(0.7, abs=0.05)


def labeled(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    return tally(np.full((len(labels), 6), 0.5), None, np.eye(len(counts))[labels] * 0.8 + 0.04)


def test_class_shares_by_hand():
    report = compare(labeled([20, 20, 20, 20, 20]), labeled([100, 0, 0, 0, 0]), CLASSES)
    view = report.views["classes"]
    assert view.details["distance"] == pytest.approx(0.8)
    # pooled shares 0.6 and four times 0.1; mean absolute deviation of a difference of two shares
    expected = (np.sqrt(2 / np.pi * 0.24 * 0.02) + 4 * np.sqrt(2 / np.pi * 0.09 * 0.02)) / 2
    assert view.details["noise_taken_off"] == pytest.approx(expected)
    assert view.effect == pytest.approx(np.sqrt(0.64 - expected**2))
    assert report.level == "strong"
    mixed = [s for s in report.sentences if "mixed" in s]
    assert mixed == [
        "The classes are mixed differently than in validation: "
        "ant 100.0% against 20.0%, bee 0.0% against 20.0%, cow 0.0% against 20.0%."
    ]


def test_chance_exceeds_the_allowance_for_labels_as_rarely_as_it_says():
    generator = np.random.default_rng(5)
    views = [
        compare(labeled(generator.multinomial(400, PRIORS)), labeled(generator.multinomial(60, PRIORS)), CLASSES).views[
            "classes"
        ]
        for _ in range(1000)
    ]
    assert np.mean([view.effect > view.noise for view in views]) <= CHANCE
    assert np.mean([view.effect for view in views]) < 0.1  # the distance itself is 0.17 on average


def test_confidence_is_told_with_the_share_below_half():
    rows = np.full((100, 6), 0.5)
    sure, unsure = np.full((100, 5), 0.025), np.full((100, 5), 0.1375)
    sure[:, 0] = 0.9
    unsure[:, 0] = 0.45
    unsure[:60, 0], unsure[:60, 1:] = 0.5, 0.125
    report = compare(tally(rows, None, sure), tally(rows, None, unsure), CLASSES)
    assert report.sentences == [
        "The model is less sure than in validation: mean confidence 0.48 against 0.90, "
        "and below 0.5 for 40% of the images against 0%."
    ]
    assert report.views["confidence"].effect == pytest.approx(0.42)
    back = compare(tally(rows, None, unsure), tally(rows, None, sure), CLASSES)
    assert told(back, "The model is more sure")


@pytest.mark.parametrize("count", [0, 1, 29])
def test_too_few_images_say_so_and_nothing_else(count):
    report = drift(count, brightness=0.1)
    assert report.level == "none"
    assert not report.enough
    assert report.sentences == [
        f"Too few images to tell whether the folder looks like training: {count}, and it takes 30."
    ]
    assert report.facts()["views"] == {}
    json.dumps(report.facts(), allow_nan=False)


def test_a_reference_of_few_images_tells_nothing_either():
    report = compare(tally(*draw(12, 0)), tally(*draw(500, 1)), CLASSES)
    assert report.level == "none"
    assert told(report, "Too few validation images to tell whether the folder looks like training: 12,")


def test_facts_are_plain_json_and_the_same_for_any_batch_size():
    statistics, features, probabilities = draw(500, 3, brightness=0.3)
    facts = []
    for size in (1, 7, 64, 500):
        seen = Tally()
        for start in range(0, 500, size):
            part = slice(start, start + size)
            seen.add(statistics[part], features[part], probabilities[part])
        facts.append(json.dumps(compare(tally(*draw(4000, 0)), seen, CLASSES).facts(), allow_nan=False))
    assert len(set(facts)) == 1
    views = json.loads(facts[0])["views"]
    assert list(views) == ["images", "features", "classes", "confidence"]
    assert set(views["images"]["details"]) == {*STATISTICS, *LOOKS}


def test_without_features_on_a_side_there_is_no_such_view():
    statistics, features, probabilities = draw(200, 0)
    bare = tally(statistics, None, probabilities)
    full = tally(statistics, features, probabilities)
    assert list(compare(full, bare, CLASSES).views) == ["images", "classes", "confidence"]
    assert list(compare(bare, full, CLASSES).views) == ["images", "classes", "confidence"]


def test_sums_are_those_of_the_images():
    statistics, features, probabilities = draw(40, 0)
    found = tally(statistics, features, probabilities)
    assert found.count == 40
    assert found.images[0, :6] == pytest.approx(statistics.astype(float).sum(axis=0))
    assert found.features[1] == pytest.approx((features.astype(float) ** 2).sum(axis=0))
    assert found.labels.tolist() == np.bincount(probabilities.argmax(axis=1), minlength=5).tolist()
    edges = np.linspace(0, 1, CONFIDENCE_BINS + 1)
    assert found.histogram.tolist() == np.histogram(probabilities.max(axis=1), edges)[0].tolist()
    # a probability that rounding put above 1, and one of exactly 1
    full = tally(statistics[:2], None, np.array([[1.0, 0], [0, np.nextafter(np.float32(1), np.float32(2))]]))
    assert full.histogram[-1] == 2


def shards():
    rows = draw(300, 0)
    return [tally(*(part[start : start + 100] for part in rows)) for start in (0, 100, 200)]


def merged(parts):
    result = Tally()
    for part in parts:
        result.merge(part)
    return result


def test_merging_in_order_gives_the_same_bytes_whoever_computed_what():
    once = merged(shards()).to_bytes()
    through_files = merged(Tally.from_bytes(shard.to_bytes()) for shard in shards()).to_bytes()
    with_failed_shards = merged([Tally(), *shards()[:1], Tally(), *shards()[1:]]).to_bytes()
    assert once == through_files == with_failed_shards
    whole = tally(*draw(300, 0))
    assert merged(shards()).count == whole.count
    assert merged(shards()).labels.tolist() == whole.labels.tolist()
    assert merged(shards()).features == pytest.approx(whole.features)


def test_merging_leaves_the_other_tally_alone():
    _, second, third = shards()
    before = second.to_bytes()
    total = Tally()
    total.merge(second)
    total.merge(third)
    total.add(*draw(5, 0))
    assert second.to_bytes() == before


def test_bytes_round_trip_without_date_or_pickle(tmp_path):
    original = tally(*draw(60, 0))
    data = original.to_bytes()
    assert Tally.from_bytes(data).to_bytes() == data == tally(*draw(60, 0)).to_bytes()
    with zipfile.ZipFile(BytesIO(data)) as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(BytesIO(data), allow_pickle=False) as arrays:
        assert not any(arrays[name].dtype.hasobject for name in arrays)
    original.save(tmp_path / "reference.npz")
    assert (tmp_path / "reference.npz").read_bytes() == data
    assert Tally.load(tmp_path / "reference.npz").to_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]


def test_empty_tallies_are_stored_merged_and_counted_like_others():
    empty = Tally()
    empty.add(*(part[:0] for part in draw(3, 0)))
    assert empty.count == 0
    assert Tally.from_bytes(empty.to_bytes()).to_bytes() == Tally().to_bytes()
    assert compare(empty, empty, CLASSES).level == "none"


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_and_not_counted(place, value):
    rows = list(draw(10, 0))
    rows[place][4, 1] = value
    counted = tally(*draw(10, 1))
    before = counted.to_bytes()
    name = ("image statistics", "features", "probabilities")[place]
    with pytest.raises(NightlyError, match=rf"^{name} must be finite numbers, but 1 of \d+ are not$"):
        counted.add(*rows)
    assert counted.to_bytes() == before


def test_damaged_bytes_are_one_line(tmp_path):
    data = tally(*draw(60, 0)).to_bytes()
    file = tmp_path / "reference.npz"
    other = BytesIO()
    np.savez(other, count=3)
    strange = data.replace(b"PK\1\2\x2d\3\x2d\0\0\0\0\0", b"PK\1\2\x2d\3\x2d\0\0\0\x77\0")  # method of compression
    assert strange != data
    for damaged in (b"", b"PK", data[:-9], data[: len(data) // 2], other.getvalue(), b"\0" * 400, strange):
        file.write_bytes(damaged)
        with pytest.raises(NightlyError, match=r"^\S*reference.npz: drift statistics are damaged: [^\n]+$"):
            Tally.load(file)


def test_tallies_of_different_models_do_not_mix():
    rows = draw(50, 0)
    other = tally(rows[0], rows[1][:, :9], rows[2][:, :3])
    with pytest.raises(ValueError, match="features, labels differ in shape"):
        tally(*rows).merge(other)
    with pytest.raises(ValueError, match="5 classes, but a tally of 3"):
        compare(tally(*rows), other, CLASSES)


def test_real_pixels_darkened_blurred_and_gray():
    """From pixels to words: soft random blobs, as photographs go from patch to patch."""
    generator = np.random.default_rng(0)

    def pictures(count):
        for _ in range(count):
            color = generator.uniform(60, 190, 3)
            blobs = cv2.resize(generator.normal(0, 60, (8, 8, 3)), (32, 32), interpolation=cv2.INTER_LINEAR)
            yield np.clip(color + blobs, 0, 255).astype(np.uint8)

    def seen(change):
        rows = np.stack([image_statistics(change(image)) for image in pictures(200)])
        return compare(reference, tally(rows, None, np.full((200, 5), 0.2)), CLASSES)

    rows = np.stack([image_statistics(image) for image in pictures(500)])
    reference = tally(rows, None, np.full((500, 5), 0.2))
    assert seen(lambda image: image).level == "none"
    assert told(seen(lambda image: (image * 0.6).astype(np.uint8)), "The images are darker")
    assert told(seen(lambda image: cv2.blur(image, (9, 9))), "The images have less contrast")
    gray = seen(lambda image: cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))
    assert told(gray, "The images are gray: mean saturation 0.00")
    swapped = seen(lambda image: np.ascontiguousarray(image * np.array([1.0, 0.9, 0.6])).astype(np.uint8))
    assert told(swapped, "The colors lean toward yellow")
