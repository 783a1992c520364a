"""Mixup and cutmix as distributions, on images whose pixels tell where they came from, on both backends."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

# All seeds are fixed, so a test passes or fails for good; below this, a law counts as different.
ALPHA = 1e-3
BOTH = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}
KINDS = {"mixup": {"mixup_alpha": 0.4}, "cutmix": {"cutmix_alpha": 1.0}, "both": BOTH}
each_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def mixing():
    from tasks import mixing

    return mixing


def colored(count: int, height: int = 8, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Return images in one color each, the one-hot vector of their number times 255, and this vector as target."""
    targets = np.eye(3, dtype=np.float32)[np.arange(count) % 3]
    images = np.broadcast_to(255 * targets[:, None, None, :], (count, height, width, 3))
    return images.astype(np.uint8), targets


def run(layer, images: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mixed, mixed_targets = (np.asarray(part) for part in layer(images, targets, training=True))
    assert mixed.dtype == mixed_targets.dtype == np.float32
    assert mixed.shape == images.shape
    assert mixed_targets.shape == targets.shape
    return mixed, mixed_targets


def assert_targets_are_shares_of_pixels(mixed: np.ndarray, targets: np.ndarray) -> None:
    """With the images of ``colored``, channel c over 255 is the share of class c at that pixel."""
    assert mixed.min() >= 0
    assert mixed.max() <= 255
    np.testing.assert_allclose(mixed.mean(axis=(1, 2)) / 255, targets, atol=2e-6)
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)


def fixed_beta(layer, value: float):
    """Return the layer with one weight in place of the drawn ones."""
    from keras import ops

    layer.draw_beta = lambda alpha, count: ops.full((count, 1), value, dtype="float32")
    return layer


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 3.0, 20.0])
def test_weights_follow_the_beta_distribution(mixing, alpha):
    count = 100_000
    draws = np.asarray(mixing.Mix(seed=1).draw_beta(alpha, count))[:, 0]
    law = stats.beta(alpha, alpha)
    assert draws.dtype == np.float32
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert abs(draws.mean() - 0.5) < 4 * law.std() / np.sqrt(count)
    spread = np.square(draws - 0.5)
    variance_error = np.sqrt(law.expect(lambda x: (x - 0.5) ** 4) - law.var() ** 2) / np.sqrt(count)
    assert abs(spread.mean() - law.var()) < 4 * variance_error
    # Equally likely bins; the outermost ones of a small alpha are narrower than float32 near 1.
    edges = law.ppf(np.linspace(0, 1, 21))
    edges = np.concatenate([[-1], edges[(edges > 1e-6) & (edges < 1 - 1e-6)], [2]])
    assert len(edges) > 10
    observed = np.histogram(draws, edges)[0]
    assert stats.chisquare(observed, count * np.diff(law.cdf(edges))).pvalue > ALPHA


def test_smallest_alpha_gives_numbers(mixing, monkeypatch):
    draws = np.asarray(mixing.Mix(seed=1).draw_beta(1e-3, 100_000))
    assert np.isfinite(draws).all()
    assert 0.49 < draws.mean() < 0.51
    # What a device's coarser cosine may give.
    monkeypatch.setattr(mixing.ops, "cos", mixing.ops.zeros_like)
    assert np.isfinite(np.asarray(mixing.Mix(seed=1).draw_beta(1e-3, 1000))).all()


@each_kind
def test_targets_are_the_shares_of_pixels(mixing, settings):
    layer = mixing.Mix(seed=2, **settings)
    for count in (30, 7):
        for _ in range(5):
            assert_targets_are_shares_of_pixels(*run(layer, *colored(count, 9, 7)))


def test_mixup_blends_with_one_weight_an_image(mixing):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    targets = np.eye(6, dtype=np.float32)
    mixed, shares = run(mixing.Mix(mixup_alpha=1.0, seed=3), images, targets)
    np.testing.assert_allclose(mixed, np.einsum("nm,mhwc->nhwc", shares, images), atol=1e-3)
    assert len(np.unique(np.diag(shares).round(4))) > 3


def test_weight_of_mixup_is_the_drawn_one(mixing):
    images, targets = colored(3000)
    _, shares = run(mixing.Mix(mixup_alpha=0.5, seed=4), images, targets)
    # Partners of the same color say nothing; among the others the own share has the Beta distribution.
    own = shares[np.arange(3000), np.arange(3000) % 3]
    own = own[own < 1]
    assert 1800 < len(own) < 2100
    law = stats.beta(0.5, 0.5)
    assert abs(own.mean() - 0.5) < 4 * law.std() / np.sqrt(len(own))
    assert abs(np.square(own - 0.5).mean() - law.var()) < 0.01


def test_cutmix_replaces_one_box(mixing):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 9, 12, 3), dtype=np.uint8)
    targets = np.eye(64, dtype=np.float32)
    mixed, shares = run(mixing.Mix(cutmix_alpha=1.0, seed=5), images, targets)
    boxes = 0
    for number in range(64):
        sources = np.flatnonzero(shares[number])
        partner = next((int(source) for source in sources if source != number), number)
        pasted = (mixed[number] != images[number]).any(axis=-1)
        np.testing.assert_array_equal(mixed[number][pasted], images[partner][pasted])
        if pasted.any():
            rows, columns = np.flatnonzero(pasted.any(axis=1)), np.flatnonzero(pasted.any(axis=0))
            assert pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert shares[number, partner] == pytest.approx(pasted.mean(), abs=1e-6)
            boxes += 1
    assert boxes > 50


@pytest.mark.parametrize("kept", [0.75, 0.36])
def test_boxes_have_the_drawn_area_and_a_uniform_center(mixing, kept):
    count, height, width = 20_000, 20, 30
    layer = fixed_beta(mixing.Mix(cutmix_alpha=1.0, seed=6), kept)
    boxes = 1 - np.asarray(layer.draw_weights(count, height, width))[..., 0]
    # The published formula with real numbers in place of pixels, and draws of its own.
    rng, side = np.random.default_rng(0), np.sqrt(1 - kept)
    expected = {}
    for name, size, drawn in (("rows", height, boxes.any(axis=2)), ("columns", width, boxes.any(axis=1))):
        center = rng.uniform(0, size, 200_000)
        ends = [np.clip(center + sign * side * size / 2, 0, size) for sign in (-1, 1)]
        expected[name] = (ends[1] - ends[0]).mean() / size
        assert drawn.mean() == pytest.approx(expected[name], abs=0.005)
        inside = drawn[~drawn[:, 0] & ~drawn[:, -1]]
        lengths = inside.sum(axis=1)
        assert abs(lengths - side * size).max() <= 1
        assert lengths.mean() == pytest.approx(side * size, abs=0.1)
        # Where even the longest fits, a box starts at any pixel equally often.
        starts = np.bincount(inside.argmax(axis=1), minlength=size)[1 : size - int(side * size) - 1]
        assert len(starts) > 1
        assert stats.chisquare(starts).pvalue > ALPHA
    # Rows and columns are drawn independently.
    assert boxes.mean() == pytest.approx(expected["rows"] * expected["columns"], abs=0.005)


def test_with_both_each_batch_draws_one(mixing):
    images = np.arange(8, dtype=np.uint8)[:, None, None, None] * 20 + np.zeros((8, 8, 8, 3), np.uint8)
    targets = np.eye(8, dtype=np.float32)
    layer = mixing.Mix(seed=7, **BOTH)
    kinds = Counter()
    for _ in range(200):
        mixed, _ = run(layer, images, targets)
        several_colors = [len(np.unique(image)) > 1 for image in mixed]
        new_colors = [not np.isin(image, images).all() for image in mixed]
        # Mixup makes new colors, one an image; cutmix keeps the colors, some images have two.
        assert any(several_colors) != any(new_colors)
        kinds["cutmix" if any(several_colors) else "mixup"] += 1
    assert stats.binomtest(kinds["mixup"], 200).pvalue > ALPHA


def test_partners_are_a_permutation_all_equally_likely(mixing):
    # With a weight of 0 there is nothing left but the partner.
    images, targets = colored(3, 2, 2)
    layer = fixed_beta(mixing.Mix(mixup_alpha=1.0, seed=8), 0.0)
    seen = Counter()
    for _ in range(300):
        mixed, shares = run(layer, images, targets)
        assert sorted(shares.argmax(axis=1)) == [0, 1, 2]
        np.testing.assert_array_equal(mixed[:, 0, 0] / 255, shares)
        seen[tuple(shares.argmax(axis=1))] += 1
    assert len(seen) == 6
    assert stats.chisquare(list(seen.values())).pvalue > ALPHA


@each_kind
def test_weight_of_one_leaves_every_image_alone(mixing, settings):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 6, 6, 3), dtype=np.uint8)
    targets = rng.dirichlet(np.ones(4), 16).astype(np.float32)
    layer = fixed_beta(mixing.Mix(seed=9, **settings), 1.0)
    for _ in range(4):
        mixed, mixed_targets = run(layer, images, targets)
        np.testing.assert_array_equal(mixed, images)
        np.testing.assert_allclose(mixed_targets, targets, atol=1e-7)


@each_kind
def test_outside_training_nothing_happens(mixing, settings):
    images, targets = colored(6)
    targets[4:] = 0  # padding
    layer = mixing.Mix(seed=10, **settings)
    for arguments in ({}, {"training": False}):
        same, same_targets = (np.asarray(part) for part in layer(images, targets, **arguments))
        assert same.dtype == np.uint8
        np.testing.assert_array_equal(same, images)
        np.testing.assert_array_equal(same_targets, targets)


def test_without_alphas_nothing_happens(mixing):
    images, targets = colored(6)
    same, same_targets = (np.asarray(part) for part in mixing.Mix(seed=11)(images, targets, training=True))
    assert same.dtype == np.uint8
    np.testing.assert_array_equal(same, images)
    np.testing.assert_array_equal(same_targets, targets)


@each_kind
def test_the_seed_decides(mixing, settings):
    images, targets = colored(16)
    first = mixing.Mix(seed=12, **settings)
    once, twice = run(first, images, targets), run(first, images, targets)
    again = mixing.Mix(seed=12, **settings)
    for before in (once, twice):
        for one, other in zip(before, run(again, images, targets), strict=True):
            np.testing.assert_array_equal(one, other)
    assert (once[1] != twice[1]).any()
    assert (once[1] != run(mixing.Mix(seed=13, **settings), images, targets)[1]).any()


def test_float_images_are_mixed_as_well(mixing):
    images, targets = colored(12)
    mixed = run(mixing.Mix(seed=14, **BOTH), images, targets)
    from_float = run(mixing.Mix(seed=14, **BOTH), images.astype(np.float32), targets)
    np.testing.assert_array_equal(mixed[0], from_float[0])


def test_configuration_survives_a_round_trip(mixing):
    import keras

    layer = mixing.Mix(seed=15, **BOTH)
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer), safe_mode=True)
    assert copy.get_config() == layer.get_config()
    images, targets = colored(8)
    np.testing.assert_array_equal(run(copy, images, targets)[0], run(layer, images, targets)[0])


@pytest.mark.parametrize("wrong", [{"mixup_alpha": -0.1}, {"cutmix_alpha": float("nan")}])
def test_wrong_alphas_are_refused(mixing, wrong):
    with pytest.raises(ValueError, match="must be 0 or more, but is"):
        mixing.Mix(**wrong)


def inside_a_layer(mix):
    """Return a layer that mixes in and outside training: Keras's ``predict`` turns training off for the outermost."""
    import keras

    class Inside(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.mix = mix

        def call(self, images, targets):
            return self.mix(images, targets, training=True)

    return Inside()


@each_kind
def test_mixed_precision_changes_nothing(mixing, settings):
    import keras

    images, targets = colored(30)
    soft_targets = np.random.default_rng(0).dirichlet(np.ones(3), 30).astype(np.float32)
    plain = mixing.Mix(seed=16, **settings)
    expected = [*run(plain, images, targets), *run(plain, images, soft_targets)]
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layer = inside_a_layer(mixing.Mix(seed=16, **settings))
    finally:
        keras.config.set_dtype_policy(policy)
    assert layer.compute_dtype == "bfloat16"
    # The outer layer itself would round soft targets.
    mixed = [np.asarray(part) for part in layer(images, targets)] + [*run(layer.mix, images, soft_targets)]
    for one, other in zip(expected, mixed, strict=True):
        assert other.dtype == np.float32
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@each_kind
def test_compiled_by_xla(mixing, settings):
    import keras

    images, targets = colored(60)
    inputs = keras.Input((8, 8, 3), dtype="uint8"), keras.Input((3,))
    layer = mixing.Mix(seed=17, **settings)
    mixed = inside_a_layer(layer)(*inputs)
    model = keras.Model(inputs, mixed)
    model.compile(jit_compile=True)
    out = model.predict([images, targets], batch_size=20, verbose=0)
    assert_targets_are_shares_of_pixels(*out)
    assert (out[1] != targets).any()
    # Three batches, and none like another.
    assert not np.array_equal(out[1][:20].max(axis=1), out[1][20:40].max(axis=1))

    trained = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(mixed[0])))
    trained.compile("sgd", "mse", jit_compile=True)
    before = np.array(layer.seed_generator.state)
    trained.fit([images, targets], targets, batch_size=20, epochs=1, verbose=0)
    assert (np.array(layer.seed_generator.state) != before).any()


@pytest.mark.slow
def test_elsewhere_all_of_this_on_jax_without_tensorflow():
    script = "import sys; sys.modules['tensorflow'] = None\nimport pytest\n"
    script += f"sys.exit(pytest.main(['-q', '-x', '-k', 'not elsewhere', {__file__!r}]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
