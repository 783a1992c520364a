"""The random eraser against the published loop and against brute force: its law, its fill, its bounds."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chi2_contingency, chisquare

from tests.chance import ALPHA, noise, run


def black(count: int, height: int, width: int) -> np.ndarray:
    return np.zeros((count, height, width, 3), np.uint8)


def rectangles(masks: np.ndarray) -> np.ndarray:
    """Return (height, width, top, left) of every non-empty mask, which must be a full rectangle."""
    found = []
    for mask in masks[masks.any(axis=(1, 2))]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        assert box.size == mask.sum()
        found.append((len(rows), len(columns), rows[0], columns[0]))
    return np.array(found)


def rejection_sampler(count: int, height: int, width: int, seed: int, **bounds: float) -> np.ndarray:
    """The published loop, one image at a time: (height, width, top, left) of accepted rectangles."""
    b = {"s_l": 0.02, "s_h": 0.4, "r_1": 0.3, "r_2": 1 / 0.3, **bounds}
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        s = rng.uniform(b["s_l"], b["s_h"]) * height * width
        r = rng.uniform(b["r_1"], b["r_2"])
        w, h = int(np.sqrt(s / r)), int(np.sqrt(s * r))
        left, top = rng.integers(0, width), rng.integers(0, height)
        if left + w <= width and top + h <= height:
            found.append((h, w, top, left))
    return np.array(found)


def two_sample_p(a: np.ndarray, b: np.ndarray) -> float:
    """Return the chi-square p-value that two samples of integers share a law; rare values are pooled."""
    edges = np.unique(np.quantile(np.concatenate([a, b]), np.linspace(0, 1, 25)))
    edges = np.append(edges[:-1], edges[-1] + 1)
    table = np.array([np.histogram(a, edges)[0], np.histogram(b, edges)[0]])
    return chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_p_is_the_share_of_images_erased(layers, p):
    count = 20_000
    # At 20 % of 8 x 8 pixels no rectangle is empty.
    out = run(layers.RandomErasing(p=p, s_l=0.2, v_l=255, seed=2), black(count, 8, 8))
    erased = out.any(axis=(1, 2, 3)).sum()
    assert abs(erased - count * p) <= 4 * np.sqrt(count * p * (1 - p))


def test_exactly_a_rectangle_changes_in_all_channels(layers):
    images = noise(300, 16, 12) // 2
    out = run(layers.RandomErasing(p=1.0, v_l=200, v_h=200, seed=3), images)
    changed = out != images
    assert (changed.all(axis=-1) == changed.any(axis=-1)).all()
    assert (out[changed] == 200).all()
    found = rectangles(changed.any(axis=-1))
    assert len(found) > 290
    # Each image has a rectangle of its own.
    assert len({tuple(one) for one in found}) > 200


BOUNDS = {
    "published": {},
    "notebook-small": {"s_h": 0.1},
    "flat": {"s_l": 0.1, "s_h": 0.9, "r_1": 0.2, "r_2": 0.9},
}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 40)])
def test_law_is_the_rejection_samplers(layers, height, width, bounds):
    count = 12_000
    layer = layers.RandomErasing(p=1.0, v_l=255, seed=7, **bounds)
    masks = [run(layer, black(2000, height, width)).any(axis=-1) for _ in range(count // 2000)]
    ours = rectangles(np.concatenate(masks))
    theirs = rejection_sampler(count, height, width, seed=70, **bounds)
    assert len(ours) == count

    def features(found: np.ndarray) -> dict[str, np.ndarray]:
        h, w, top, left = found.T
        return {
            "height": h,
            "width": w,
            "area": h * w,
            "aspect": (1000 * h / w).astype(int),
            "top": top,
            "left": left,
            "room below": height - h - top,
            "room to the right": width - w - left,
            "corner": top * width + left,
        }

    mine, other = features(ours), features(theirs)
    p_values = {name: two_sample_p(mine[name], other[name]) for name in mine}
    assert min(p_values.values()) > ALPHA / len(p_values), p_values


def test_positions_are_uniform_given_the_size(layers):
    layer = layers.RandomErasing(p=1.0, s_l=0.25, s_h=0.25, r_1=1.0, r_2=1.0, v_l=255, seed=8)
    found = rectangles(run(layer, black(5000, 8, 8)).any(axis=-1))
    assert {tuple(size) for size in found[:, :2]} == {(4, 4)}
    seen = Counter(map(tuple, found[:, 2:]))
    assert len(seen) == 25
    assert chisquare(list(seen.values())).pvalue > ALPHA


@pytest.mark.parametrize("p", [1.0, 0.5])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (13, 30)])
def test_drawn_sizes_follow_the_table_whether_or_not_all_are_erased(layers, height, width, p):
    count = 200_000
    layer = layers.RandomErasing(p=p, seed=9)
    layer.build((None, height, width, 3))
    top, left, h, w = (np.asarray(side)[:, 0] for side in layer.draw_rectangles(count, height, width))
    seen = np.zeros((height + 1, width + 1))
    np.add.at(seen, (h, np.where(h > 0, w, 0)), 1)
    expected = count * p * layers.rectangle_law(height, width, 0.02, 0.4, 0.3, 1 / 0.3)
    # Height 0: an empty rectangle, or an image that is not erased.
    expected[0] = [count * (1 - p) + expected[0].sum(), *[0] * width]
    assert not seen[expected == 0].any()
    common = expected >= 5
    observed = np.append(seen[common], seen[~common].sum() + 1e-9)
    wanted = np.append(expected[common], expected[~common].sum() + 1e-9)
    assert chisquare(observed, wanted).pvalue > ALPHA
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    assert top.max() < height
    assert left.max() < width


def brute_force_law(height, width, s_l, s_h, r_1, r_2) -> np.ndarray:
    """Enumerate a fine grid of (s, r), and for each size every corner that the sampler may try."""
    steps_s = 1 if s_l == s_h else 1200 if r_1 < r_2 else 100_000
    steps_r = 1 if r_1 == r_2 else 1200 if s_l < s_h else 100_000
    s = np.linspace(s_l, s_h, 2 * steps_s + 1)[1::2, None] * height * width
    r = np.linspace(r_1, r_2, 2 * steps_r + 1)[None, 1::2]
    h, w = np.sqrt(s * r).astype(int), np.sqrt(s / r).astype(int)
    law = np.zeros((height + 1, width + 1))
    for i, j in np.ndindex(law.shape):
        corners = [(top, left) for top in range(height) for left in range(width)]
        fitting = [corner for corner in corners if corner[0] + i <= height and corner[1] + j <= width]
        law[i, j] = ((h == i) & (w == j)).sum() * len(fitting) / len(corners)
    return law / law.sum()


@pytest.mark.parametrize(
    ("size", "bounds"),
    [
        ((4, 3), (0.02, 0.4, 0.3, 1 / 0.3)),
        ((2, 2), (0.02, 1.0, 0.3, 1 / 0.3)),
        ((5, 5), (0.1, 0.9, 0.2, 0.8)),
        ((3, 6), (0.5, 0.5, 0.3, 3.0)),
        ((6, 4), (0.05, 0.6, 1.5, 1.5)),
        ((6, 6), (0.25, 0.25, 1.0, 1.0)),
    ],
    ids=["tiny", "empty-sides", "flat", "one-area", "one-aspect", "one-size"],
)
def test_table_equals_brute_force(layers, size, bounds):
    law = layers.rectangle_law(*size, *bounds)
    assert law.shape == (size[0] + 1, size[1] + 1)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(law, brute_force_law(*size, *bounds), atol=5e-4)


def test_empty_rectangles_keep_their_share(layers):
    # On 8 x 8 pixels the published bounds give h = 0 or w = 0 now and then: accepted, and nothing is erased.
    law = layers.rectangle_law(8, 8, 0.02, 0.4, 0.3, 1 / 0.3)
    empty = law[0].sum() + law[1:, 0].sum()
    assert 0.03 < empty < 0.1
    out = run(layers.RandomErasing(p=1.0, v_l=255, seed=10), black(20_000, 8, 8))
    untouched = (~out.any(axis=(1, 2, 3))).mean()
    assert abs(untouched - empty) <= 4 * np.sqrt(empty / 20_000)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((0, 0.4, 0.3, 3), "0 < s_l <= s_h <= 1 must hold"),
        ((0.5, 0.4, 0.3, 3), "0 < s_l <= s_h <= 1 must hold"),
        ((0.1, 0.4, 0, 3), "0 < r_1 <= r_2 must hold"),
        ((0.9, 1.0, 4, 5), "no rectangle fits into an image of 8 x 8 pixels"),
        ((0.9, 0.9, 4, 4), "no rectangle fits into an image of 8 x 8 pixels"),
    ],
)
def test_bounds_that_cannot_work_are_refused(layers, bounds, message):
    with pytest.raises(ValueError, match=message):
        layers.rectangle_law(8, 8, *bounds)


@pytest.mark.parametrize("wrong", [{"p": 1.5}, {"p": -0.1}, {"v_l": 9, "v_h": 8}, {"v_h": 256}])
def test_eraser_refuses_wrong_numbers(layers, wrong):
    with pytest.raises(ValueError, match="but"):
        layers.RandomErasing(**wrong)


def test_fill_is_one_gray_per_image_rounded_and_within_its_bounds(layers):
    arguments = {"p": 1.0, "s_l": 0.2, "s_h": 0.3, "seed": 11}
    out = run(layers.RandomErasing(v_l=50, v_h=54, **arguments), black(8000, 8, 8))
    assert all(len(np.unique(image)) == 2 for image in out)
    values, counts = np.unique(out.max(axis=(1, 2, 3)), return_counts=True)
    assert values.tolist() == [50, 51, 52, 53, 54]
    # A uniform float rounded to the nearest integer: half a share for the two ends.
    assert chisquare(counts, 8000 * np.array([1, 2, 2, 2, 1]) / 8).pvalue > ALPHA


def test_pixel_level_fills_with_independent_noise(layers):
    arguments = {"p": 1.0, "s_l": 0.2, "s_h": 0.3, "pixel_level": True, "seed": 12}
    out = run(layers.RandomErasing(v_l=100, v_h=108, **arguments), black(400, 16, 16))
    pixels = out[out.any(axis=-1)]
    values, counts = np.unique(pixels, return_counts=True)
    assert values.tolist() == list(range(100, 109))
    assert chisquare(counts, counts.sum() * np.array([1, *[2] * 7, 1]) / 16).pvalue > ALPHA
    assert abs(np.corrcoef(pixels.T.astype(float))[np.triu_indices(3, 1)]).max() < 0.05
    neighbors = out[:, :, :-1, 0].astype(float), out[:, :, 1:, 0].astype(float)
    inside = (neighbors[0] > 0) & (neighbors[1] > 0)
    assert abs(np.corrcoef(neighbors[0][inside], neighbors[1][inside])[0, 1]) < 0.05


def test_eraser_keeps_to_the_image_size_it_was_built_for(layers):
    layer = layers.RandomErasing(seed=0)
    run(layer, noise(2, 8, 8))
    with pytest.raises(ValueError, match="incompatible"):
        layer(noise(2, 16, 16), training=True)
