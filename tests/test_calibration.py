import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.calibration import HIGHEST, LOWEST, apply_temperature, fit_temperature
from tasks.metrics import calibration_bins, calibration_error, log_loss


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def drawn(images, classes, temperature, seed=0):
    """Return probabilities of a model whose logits are ``temperature`` times too large, and targets."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (images, classes))
    honest = softmax(logits)
    targets = np.array([random.choice(classes, p=row / row.sum()) for row in honest.astype(np.float64)])
    return softmax(logits * temperature), targets


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_of_an_overconfident_or_timid_model_is_found(temperature):
    probabilities, targets = drawn(4000, 10, temperature)
    found = fit_temperature(probabilities, targets)
    assert found == pytest.approx(temperature, rel=0.05)
    scaled = apply_temperature(probabilities, found)
    error = calibration_error(calibration_bins(scaled.max(axis=1), scaled.argmax(axis=1) == targets))
    assert error < 0.03
    assert log_loss(targets, scaled) <= log_loss(targets, probabilities)


def test_what_is_applied_is_the_softmax_of_the_divided_logits():
    logits = np.random.default_rng(0).normal(0, 3, (50, 7))
    np.testing.assert_allclose(apply_temperature(softmax(logits), 2.5), softmax(logits / 2.5), atol=1e-6)


def test_one_changes_no_bit():
    probabilities = np.array([[0.5, 0.3, 0.1], [1, 0, 0]], np.float32)  # not even where they do not add up to 1
    np.testing.assert_array_equal(apply_temperature(probabilities, 1.0), probabilities)


@given(
    seed=st.integers(0, 1000),
    classes=st.sampled_from([2, 3, 10, 129, 1000]),
    temperature=st.floats(LOWEST, HIGHEST),
    rows=st.integers(1, 20),
)
def test_a_row_is_the_same_alone_and_among_others(seed, classes, temperature, rows):
    probabilities = softmax(np.random.default_rng(seed).normal(0, 5, (rows, classes)))
    together = apply_temperature(probabilities, temperature)
    by_columns = apply_temperature(np.asfortranarray(probabilities), temperature)
    alone = np.concatenate([apply_temperature(row[np.newaxis], temperature) for row in probabilities])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, by_columns)
    np.testing.assert_allclose(together.sum(axis=1), 1, atol=1e-5)
    assert together.dtype == np.float32


@pytest.mark.parametrize("temperature", [LOWEST, 0.5, 3.0, HIGHEST])
def test_zeros_and_ones_are_no_trouble(temperature):
    probabilities = np.array([[1, 0, 0], [0.5, 0.5, 0], [1e-38, 1e-40, 1]], np.float32)
    scaled = apply_temperature(probabilities, temperature)
    assert np.isfinite(scaled).all()
    np.testing.assert_array_equal(scaled.argmax(axis=1), [0, 0, 2])
    assert scaled[1, 0] == scaled[1, 1]


def test_few_images_that_are_all_right_do_not_make_the_model_certain():
    probabilities = np.tile(np.array([0.8, 0.1, 0.1], np.float32), (5, 1))
    found = fit_temperature(probabilities, np.zeros(5, int))
    assert 0.4 < found < 1
    many = fit_temperature(np.tile(probabilities, (100, 1)), np.zeros(500, int))
    assert LOWEST < many < found, "five hundred right ones say more than five"


def test_one_image_that_is_wrong_does_not_make_the_model_clueless():
    found = fit_temperature(np.array([[0.99, 0.01]], np.float32), np.array([1]))
    assert 1 < found < 6


def test_certain_rows_have_no_temperature():
    assert fit_temperature(np.eye(3, dtype=np.float32), np.arange(3)) == 1.0
    assert fit_temperature(np.zeros((0, 3), np.float32), np.zeros(0, int)) == 1.0
    assert fit_temperature(np.eye(2, dtype=np.float32), np.array([1, 0])) <= HIGHEST
    assert fit_temperature(np.full((2, 2), np.nan, np.float32), np.array([1, 0])) == 1.0, "what diverged has none"


@given(seed=st.integers(0, 10_000), images=st.integers(1, 40), scale=st.floats(0.1, 60))
def test_the_log_loss_is_never_higher_than_before(seed, images, scale):
    random = np.random.default_rng(seed)
    probabilities, targets = softmax(random.normal(0, scale, (images, 4))), random.integers(0, 4, images)
    found = fit_temperature(probabilities, targets)
    assert LOWEST <= found <= HIGHEST

    def loss(temperature):
        logits = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float32).tiny)) / temperature
        return (np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(images), targets]).sum()

    assert loss(found) <= loss(1.0) + 1e-9
