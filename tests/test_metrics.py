import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from tasks import metrics

# Four images, three classes; the last image is taken for class 0.
TARGETS = np.array([0, 1, 2, 2])
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.25, 0.5, 0.25], [0.0, 0.2, 0.8], [0.6, 0.3, 0.1]], np.float32)


def random_case(seed, count=200, classes=7):
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.ones(classes), count)
    return generator.integers(0, classes, count), probabilities


def test_accuracy_of_three_in_four():
    assert metrics.accuracy(TARGETS, metrics.predicted_labels(PROBABILITIES)) == 0.75
    assert metrics.accuracy([], []) == 0.0


def test_top_k_error_counts_the_true_class_beyond_the_k_best():
    assert metrics.top_k_error(TARGETS, PROBABILITIES, k=1) == 0.25
    assert metrics.top_k_error(TARGETS, PROBABILITIES, k=2) == 0.25
    assert metrics.top_k_error(TARGETS, PROBABILITIES, k=3) == 0.0


def test_top_k_error_ranks_equals_as_argmax_does():
    flat = np.full((3, 3), 1 / 3)
    assert metrics.top_k_error([0, 1, 2], flat, k=1) == pytest.approx(2 / 3)
    assert metrics.top_k_error([0, 1, 2], flat, k=2) == pytest.approx(1 / 3)


@pytest.mark.parametrize("classes", [2, 5])
def test_top_5_error_is_zero_by_definition_with_five_classes_or_fewer(classes):
    targets, probabilities = random_case(1, classes=classes)
    assert metrics.top_k_error(targets, probabilities) == 0.0


def test_top_5_error_equals_scikit_learn():
    targets, probabilities = random_case(2, classes=9)
    expected = 1 - reference.top_k_accuracy_score(targets, probabilities, k=5, labels=range(9))
    assert metrics.top_k_error(targets, probabilities) == pytest.approx(expected, abs=1e-12)


def test_confusion_matrix_has_truth_in_rows():
    matrix = metrics.confusion_matrix(TARGETS, [0, 1, 2, 0], 4)
    assert matrix.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]


def test_class_scores_of_a_tiny_matrix_and_of_empty_classes():
    scores = metrics.class_scores(np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]))
    assert scores.precision.tolist() == [0.5, 1.0, 1.0, 0.0]
    assert scores.recall.tolist() == [1.0, 1.0, 0.5, 0.0]
    assert scores.f1 == pytest.approx([2 / 3, 1.0, 2 / 3, 0.0])
    assert scores.images.tolist() == [1, 1, 2, 0]
    assert metrics.macro_f1(scores) == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 6).flatmap(
        lambda c: st.tuples(st.just(c), st.lists(st.tuples(st.integers(0, c - 1), st.integers(0, c - 1)), min_size=1))
    )
)
def test_matrix_and_scores_equal_scikit_learn(case):
    classes, pairs = case
    targets, labels = np.array(pairs).T
    matrix = metrics.confusion_matrix(targets, labels, classes)
    np.testing.assert_array_equal(matrix, reference.confusion_matrix(targets, labels, labels=list(range(classes))))
    precision, recall, f1, images = reference.precision_recall_fscore_support(
        targets, labels, labels=list(range(classes)), zero_division=0
    )
    scores = metrics.class_scores(matrix)
    np.testing.assert_allclose(scores.precision, precision, atol=1e-12)
    np.testing.assert_allclose(scores.recall, recall, atol=1e-12)
    np.testing.assert_allclose(scores.f1, f1, atol=1e-12)
    np.testing.assert_array_equal(scores.images, images)


def test_log_loss_of_known_probabilities():
    assert metrics.log_loss([0, 1], [[0.5, 0.5], [0.75, 0.25]]) == pytest.approx(math.log(8) / 2)
    assert metrics.log_loss([0], [[0.0, 1.0]]) == pytest.approx(-math.log(1e-7))
    assert metrics.log_loss([1], [[0.0, 1.0]]) == 0.0


def test_log_loss_equals_scikit_learn():
    targets, probabilities = random_case(3)
    expected = reference.log_loss(targets, probabilities, labels=range(7))
    assert metrics.log_loss(targets, probabilities) == pytest.approx(expected, abs=1e-12)


def test_log_loss_sums_in_double_precision():
    single = np.full((1_000_000, 2), [0.9, 0.1], np.float32)
    expected = -math.log(float(np.float32(0.9)))
    assert metrics.log_loss(np.zeros(1_000_000, np.int64), single) == pytest.approx(expected, abs=1e-12)


def test_calibration_bins_are_open_below_and_closed_above():
    bins = metrics.calibration_bins([0.0, 0.5, 0.5000001, 1.0], [False, True, False, True], bin_count=2)
    assert [(b.lower, b.upper) for b in bins] == [(0.0, 0.5), (0.5, 1.0)]
    assert [(b.images, b.correct) for b in bins] == [(2, 1), (2, 1)]
    assert bins[0].confidence == 0.25
    assert bins[0].accuracy == 0.5


def test_a_float32_confidence_above_one_stays_in_the_last_bin():
    bins = metrics.calibration_bins(np.array([1.0000001], np.float32), [True])
    assert [b.images for b in bins] == [0] * 14 + [1]


def test_calibration_error_of_a_hand_made_case():
    # Bin (0.4, 0.6]: two at 0.5, both right, gap 0.5. Bin (0.8, 1]: two at 0.9, one right, gap 0.4.
    bins = metrics.calibration_bins([0.5, 0.5, 0.9, 0.9], [True, True, True, False], bin_count=5)
    assert metrics.calibration_error(bins) == pytest.approx(0.45)
    assert [b.images for b in bins] == [0, 0, 2, 0, 2]


def test_calibration_error_equals_the_definition_written_as_a_loop():
    targets, probabilities = random_case(4, count=500, classes=3)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    expected = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert metrics.calibration_error(metrics.calibration_bins(confidence, correct)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_gives_the_published_values(successes, trials, low, high):
    assert metrics.wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_at_its_ends():
    assert metrics.wilson_interval(20, 20)[1] == 1.0
    assert metrics.wilson_interval(0, 20)[0] == 0.0
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)
    wide, narrow = metrics.wilson_interval(90, 100, 0.99), metrics.wilson_interval(90, 100, 0.9)
    assert wide[0] < narrow[0] < 0.9 < narrow[1] < wide[1]


def test_agreement_and_max_difference():
    other = PROBABILITIES.copy()
    other[0] = [0.2, 0.7, 0.1]
    assert metrics.agreement(PROBABILITIES, other) == 0.75
    assert metrics.max_difference(PROBABILITIES, other) == pytest.approx(0.5)
    assert metrics.agreement(PROBABILITIES, PROBABILITIES) == 1.0
    assert metrics.max_difference(PROBABILITIES, PROBABILITIES) == 0.0


def test_bootstrap_intervals_are_those_of_images_drawn_with_replacement(monkeypatch):
    monkeypatch.setattr(metrics, "_COUNTS", 10_000)  # so that the draws take several rounds
    targets, probabilities = random_case(3, count=80, classes=3)
    found = metrics.bootstrap_intervals(targets, probabilities, bin_count=5, level=0.9)
    random = np.random.default_rng(1)
    drawn = []
    for _ in range(1000):
        chosen = random.integers(80, size=80)
        own, labels = targets[chosen], probabilities[chosen].argmax(axis=1)
        bins = metrics.calibration_bins(probabilities[chosen].max(axis=1), labels == own, 5)
        scores = metrics.class_scores(metrics.confusion_matrix(own, labels, 3))
        drawn.append(
            [metrics.macro_f1(scores), metrics.log_loss(own, probabilities[chosen]), metrics.calibration_error(bins)]
        )
    low, middle, high = np.quantile(drawn, [0.05, 0.5, 0.95], axis=0)
    np.testing.assert_allclose(found["log_loss"], (low[1], high[1]), atol=0.1 * (high[1] - low[1]))
    scores = metrics.class_scores(metrics.confusion_matrix(targets, probabilities.argmax(axis=1), 3))
    shifted = np.array([low[0], high[0]]) + metrics.macro_f1(scores) - middle[0]
    np.testing.assert_allclose(found["macro_f1"], shifted, atol=0.1 * (high[0] - low[0]))
    bins = metrics.calibration_bins(probabilities.max(axis=1), probabilities.argmax(axis=1) == targets, 5)
    own = metrics.calibration_error(bins)
    mirrored = 2 * own - high[2], 2 * own - low[2]
    np.testing.assert_allclose(found["calibration_error"], mirrored, atol=0.1 * (high[2] - low[2]))


def test_a_bootstrap_interval_holds_the_figure_and_stays_within_its_range():
    for seed in range(5):
        targets, probabilities = random_case(seed, count=6, classes=3)
        for bin_count in (2, 15):
            found = metrics.bootstrap_intervals(targets, probabilities, bin_count)
            right = probabilities.argmax(axis=1) == targets
            own = metrics.calibration_error(metrics.calibration_bins(probabilities.max(axis=1), right, bin_count))
            low, high = found["calibration_error"]
            assert 0 <= low <= own + 1e-12
            assert own <= high + 1e-12
            scores = metrics.class_scores(metrics.confusion_matrix(targets, probabilities.argmax(axis=1), 3))
            low, high = found["macro_f1"]
            assert 0 <= low <= metrics.macro_f1(scores) + 1e-12
            assert metrics.macro_f1(scores) <= high + 1e-12 <= 1 + 1e-12


def test_the_interval_of_macro_f1_holds_it_with_a_thousand_classes_of_two_images():
    random = np.random.default_rng(0)
    targets = np.repeat(np.arange(1000), 2)
    labels = np.where(random.random(2000) < 0.7, targets, random.integers(1000, size=2000))
    probabilities = np.full((2000, 1000), 0.0004)
    probabilities[np.arange(2000), labels] = 0.6
    own = metrics.macro_f1(metrics.class_scores(metrics.confusion_matrix(targets, labels, 1000)))
    low, high = metrics.bootstrap_intervals(targets, probabilities)["macro_f1"]
    assert low < own < high


def test_images_that_are_all_alike_leave_no_doubt():
    found = metrics.bootstrap_intervals(np.zeros(50, int), np.tile([0.75, 0.25], (50, 1)))
    assert found["macro_f1"] == (1.0, 1.0)
    np.testing.assert_allclose(found["log_loss"], [math.log(4 / 3)] * 2)
    np.testing.assert_allclose(found["calibration_error"], [0.25, 0.25])
