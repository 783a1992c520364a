"""The probe recipe: a head trained on features, folded back into a model that takes raw pixels."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tasks.probe
from tasks.augment import augment
from tasks.augmentation import AugmentParams, EraserParams
from tasks.classifier import ModelParams, build_classifier, split_at_pool
from tasks.data import Split, load_split
from tasks.errors import NightlyError
from tasks.files import read_json
from tasks.probe import fold, load_copies, probe, train_head
from tasks.recipe import ProbeParams, TrainParams

WIDTH, CLASSES = 32, 4
COLUMNS = ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds"]


def table(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features as a random backbone gives them: means many times their deviations, scales apart by thousands."""
    generator = np.random.default_rng(0)
    centers = generator.normal(0, 0.8, (CLASSES, WIDTH))
    scales = 10 ** generator.uniform(-3, 0, WIDTH)
    generator = np.random.default_rng([seed, count])
    labels = generator.integers(0, CLASSES, count)
    features = (generator.normal(size=(count, WIDTH)) + centers[labels] + 5) * scales
    return features.astype(np.float32), np.eye(CLASSES, dtype=np.float32)[labels]


def make_head(units: tuple[int, ...] = (), normalization: bool = False, dropout: float = 0.0, seed: int = 0):
    import keras
    from keras import layers

    keras.utils.set_random_seed(seed)
    x = features = keras.Input((WIDTH,))
    for width in units:
        x = layers.BatchNormalization(momentum=0.9)(x) if normalization else x
        x = layers.Dropout(dropout)(layers.Dense(width, activation="relu")(x))
    x = layers.BatchNormalization(momentum=0.9)(x) if normalization else x
    return keras.Model(features, layers.Dense(CLASSES, activation="softmax")(x))


def settings(epochs: int = 12, **values) -> TrainParams:
    own = {name: values.pop(name) for name in ProbeParams.model_fields if name in values}
    return TrainParams(probe={"epochs": epochs, "batch_size": 32, "learning_rate": 0.01, **own}, **values)


def measured(head, data) -> tuple[float, float]:
    features, targets = data
    found = np.asarray(head.predict_on_batch(features))
    loss = -np.log((found * targets).sum(axis=1)).mean()
    return float(loss), float((found.argmax(axis=1) == targets.argmax(axis=1)).mean())


def test_folding_is_exact_and_can_be_undone():
    import keras

    generator = np.random.default_rng(0)
    deviation = 10 ** generator.uniform(-3, 1, WIDTH)
    mean = generator.uniform(-5, 5, WIDTH) * deviation
    dense = keras.layers.Dense(7)
    dense.build((None, WIDTH))
    before = dense.get_weights()
    raw = (generator.normal(size=(50, WIDTH)) * deviation + mean).astype(np.float32)
    expected = np.asarray(dense((raw - mean) / deviation))
    fold(dense, mean, deviation)
    np.testing.assert_allclose(np.asarray(dense(raw)), expected, atol=1e-5)
    fold(dense, -mean / deviation, 1 / deviation)
    for now, then in zip(dense.get_weights(), before, strict=True):
        np.testing.assert_allclose(now, then, atol=1e-6)


def test_moments_are_those_of_all_tables_whatever_their_mean():
    generator = np.random.default_rng(0)
    rows = (generator.normal(size=(10_000, 3)) * [0.01, 1, 100] + [1000, -5, 0]).astype(np.float32)
    mean, deviation = tasks.probe._moments([rows[:7000], rows[7000:]])
    np.testing.assert_allclose(mean, rows.mean(axis=0, dtype=np.float64), atol=1e-6)
    np.testing.assert_allclose(deviation[1:], rows.std(axis=0, dtype=np.float64)[1:], rtol=1e-6)
    # The first one hardly varies beside the others: it has the lower bound, a hundredth of the mean deviation.
    np.testing.assert_allclose(deviation[0], 0.01 * rows.std(axis=0, dtype=np.float64).mean(), rtol=1e-6)


def test_constant_features_are_left_as_they_are():
    mean, deviation = tasks.probe._moments([np.full((5, 3), 7, np.float32)])
    np.testing.assert_array_equal(mean, 7)
    np.testing.assert_array_equal(deviation, 1)


@pytest.mark.parametrize(
    "head",
    [{}, {"units": (16,), "dropout": 0.2}, {"units": (16,), "normalization": True}, {"normalization": True}],
    ids=["softmax", "hidden", "hidden and normalized", "normalized"],
)
def test_a_head_learns_badly_scaled_features_and_takes_raw_ones(head):
    training, validation = table(800), table(200, seed=1)
    trained = make_head(**head)
    outcome = train_head(trained, [training], validation, settings())
    assert list(outcome.rows[0]) == COLUMNS
    assert [row["epoch"] for row in outcome.rows] == list(range(1, 13))
    assert outcome.kept["val_accuracy"] > 0.9
    assert outcome.kept == min(outcome.rows, key=lambda row: row["val_loss"])
    loss, accuracy = measured(trained, validation)
    assert loss == pytest.approx(outcome.kept["val_loss"], abs=1e-5)
    assert accuracy == pytest.approx(outcome.kept["val_accuracy"], abs=1e-6)


def test_without_standardization_it_would_not_learn(monkeypatch):
    training, validation = table(800), table(200, seed=1)
    monkeypatch.setattr(tasks.probe, "_moments", lambda tables: (np.zeros(WIDTH), np.ones(WIDTH)))
    assert train_head(make_head(), [training], validation, settings()).kept["val_accuracy"] < 0.8


def test_several_tables_are_one_training_set():
    features, targets = table(600)
    parts = [(features[:100], targets[:100]), (features[100:450], targets[100:450]), (features[450:], targets[450:])]
    whole, split = make_head(), make_head()
    params = settings(epochs=2)
    first = train_head(whole, [(features, targets)], table(100, seed=1), params)
    second = train_head(split, parts, table(100, seed=1), params)
    for one, other in zip(whole.get_weights(), split.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert first.kept["val_loss"] == pytest.approx(second.kept["val_loss"], abs=1e-4)


def test_an_epoch_sees_each_row_once_in_an_order_of_its_own():
    count = 64
    features = np.arange(count, dtype=np.float32)[:, np.newaxis]
    tables = [(features[:40], features[:40]), (features[40:], features[40:])]
    batches = tasks.probe._batches(tables, np.zeros(1), np.ones(1), 16, 1)
    epochs = []
    for _ in range(2):
        epochs.append([sorted(batches[index][0].ravel()) for index in range(len(batches))])
        assert sorted(row for batch in epochs[-1] for row in batch) == list(range(count))
        batches.on_epoch_end()
    assert epochs[0] != epochs[1]
    again = tasks.probe._batches(tables, np.zeros(1), np.ones(1), 16, 1)
    assert [sorted(again[index][0].ravel()) for index in range(4)] == epochs[0]
    x, y = batches[0]
    np.testing.assert_array_equal(x, y)
    held_out = tasks.probe._batches(tables, np.ones(1), np.full(1, 2.0), 48, None)
    np.testing.assert_array_equal(np.concatenate([held_out[0][0], held_out[1][0]]), (features - 1) / 2)


def test_the_same_seed_gives_the_same_head():
    training, validation = table(300), table(100, seed=1)
    weights = []
    for seed in (3, 3, 4):
        head = make_head()
        train_head(head, [training], validation, settings(epochs=2, seed=seed))
        weights.append(head.get_weights()[0])
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


def test_the_last_epoch_is_kept_if_asked_for():
    training, validation = table(60), table(200, seed=1)
    params = {"epochs": 20, "learning_rate": 0.05, "schedule": "constant"}
    best, last = make_head(units=(64,)), make_head(units=(64,))
    kept_best = train_head(best, [training], validation, settings(**params)).kept
    outcome = train_head(last, [training], validation, settings(keep="last", **params))
    assert outcome.kept == outcome.rows[-1]
    assert kept_best["epoch"] < 20
    assert measured(last, validation)[0] == pytest.approx(outcome.kept["val_loss"], abs=1e-4)
    assert measured(best, validation)[0] == pytest.approx(kept_best["val_loss"], abs=1e-4)


def test_it_stops_early_if_asked_for():
    params = settings(epochs=60, learning_rate=0.05, schedule="constant", early_stopping_epochs=3)
    outcome = train_head(make_head(units=(64,)), [table(60)], table(200, seed=1), params)
    assert len(outcome.rows) == outcome.kept["epoch"] + 3 < 60


def test_a_trained_head_goes_on_from_what_it_computes():
    training, validation = table(400), table(100, seed=1)
    head = make_head()
    train_head(head, [training], validation, settings())
    before = np.asarray(head.predict_on_batch(validation[0]))
    still = settings(epochs=1, learning_rate=1e-9)
    train_head(head, [training], validation, still, trained_head=True)
    np.testing.assert_allclose(np.asarray(head.predict_on_batch(validation[0])), before, atol=1e-4)


def test_a_batch_larger_than_the_data_is_cut_to_it():
    outcome = train_head(make_head(), [table(20)], table(10, seed=1), settings(epochs=2, batch_size=4096))
    assert len(outcome.rows) == 2


def test_divergence_is_one_clear_line():
    features, targets = table(100)
    with pytest.raises(
        NightlyError, match=r"diverged in epoch 1: loss nan, .*at learning rate .*Lower train\.probe\.learning_rate"
    ):
        train_head(make_head(), [(features, targets * np.nan)], (features, targets), settings())


@pytest.fixture
def splits(prepared):
    return load_split(prepared, "train"), load_split(prepared, "validation")


def make_classifier(prepared: Path, model: ModelParams, seed: int = 1):
    import keras

    keras.utils.set_random_seed(seed)
    facts, classes = read_json(prepared / "prepared.json"), read_json(prepared / "classes.json")
    return build_classifier(model, 8, len(classes), facts["normalization"], frozen=True)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_backbone")
def test_a_probe_trains_the_whole_classifier_and_computes_features_once(prepared, augmented, splits, tmp_path):
    training, validation = splits
    model, params = ModelParams(), settings(epochs=40, precision="float32")
    classifier = make_classifier(prepared, model)
    backbone = [np.array(weight) for weight in split_at_pool(classifier)[0].get_weights()]
    outcome = probe(classifier, training, validation, augmented, tmp_path, params, model)
    assert outcome.kept["val_accuracy"] > 0.9
    images, targets = np.asarray(validation.images), np.asarray(validation.targets)
    found = np.asarray(classifier.predict_on_batch(images))
    assert (found.argmax(1) == targets.argmax(1)).mean() == pytest.approx(outcome.kept["val_accuracy"], abs=0.02)
    for now, then in zip(split_at_pool(classifier)[0].get_weights(), backbone, strict=True):
        np.testing.assert_array_equal(now, then)
    assert outcome.images == outcome.computed == len(training.images) + len(validation.images)
    assert set(outcome.seconds) == {"build", "features", "head"}

    other = model.changed(head_units=(16,), dropout=0.1, batch_normalization_momentum=0.5)
    again = probe(make_classifier(prepared, other), training, validation, augmented, tmp_path, params, other)
    assert (again.computed, again.seconds["build"]) == (0, 0.0)
    upsampled = model.changed(interpolation="bilinear")
    anew = probe(make_classifier(prepared, upsampled), training, validation, augmented, tmp_path, params, upsampled)
    assert anew.computed == outcome.images


@pytest.mark.usefixtures("tiny_backbone")
def test_a_probe_trains_on_the_copies_too(prepared, splits, tmp_path):
    training, validation = splits
    wanted = AugmentParams(copies=2, eraser=EraserParams(p=0.5))
    augment(prepared, tmp_path / "augmented", tmp_path / "preview.png", wanted)
    model, params = ModelParams(), settings(epochs=2, precision="float32")
    classifier = make_classifier(prepared, model)
    seen = []
    real = tasks.probe.train_head

    def watching(head, tables, *rest, **options):
        seen.extend(tables)
        return real(head, tables, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.probe, "train_head", watching)
        outcome = probe(classifier, training, validation, tmp_path / "augmented", tmp_path / "cache", params, model)
    (features, targets), (copies, copied_targets) = seen
    count = len(training.images)
    assert (len(features), len(copies)) == (count, 2 * count)
    np.testing.assert_array_equal(copied_targets, np.tile(targets, (2, 1)))
    extractor, _ = split_at_pool(classifier)
    pixels = np.load(tmp_path / "augmented" / "images.npy")
    np.testing.assert_allclose(copies, np.asarray(extractor.predict_on_batch(pixels)), atol=1e-4)
    assert outcome.images == outcome.computed == 3 * count + len(validation.images)


def test_copies_of_other_data_are_refused(prepared, splits, tmp_path):
    training, _ = splits
    augment(prepared, tmp_path / "augmented", tmp_path / "preview.png", AugmentParams(copies=1))
    assert load_copies(tmp_path / "augmented", training) is not None
    fewer = Split(training.images[1:], training.targets[1:])
    turned = Split(training.images, training.targets[::-1])
    for other in (fewer, turned):
        with pytest.raises(NightlyError, match=r"are no copies of the \d+ training images: run the augment stage"):
            load_copies(tmp_path / "augmented", other)


UNDER_JAX = """
import sys
sys.modules["tensorflow"] = None
from pathlib import Path
from tests.conftest import small_network
from tests.test_probe import make_classifier, settings
from tasks.augment import augment
from tasks.augmentation import AugmentParams
from tasks.classifier import ModelParams
from tasks.data import load_split
from tasks.probe import probe

prepared, out = Path(sys.argv[1]), Path(sys.argv[2])
augment(prepared, out / "augmented", out / "preview.png", AugmentParams(copies=1))
model = ModelParams(head_units=(16,), dropout=0.1)
splits = [load_split(prepared, name) for name in ("train", "validation")]
for precision in ("float32", "int8"):
    with small_network():
        classifier = make_classifier(prepared, model)
        params = settings(epochs=20, precision=precision)
        outcome = probe(classifier, *splits, out / "augmented", out / "cache", params, model)
    print(outcome.engine, outcome.kept["val_accuracy"] > 0.9)
"""


@pytest.mark.slow
def test_a_probe_on_jax_without_tensorflow(prepared, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNDER_JAX, str(prepared), str(tmp_path)],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OpenVINO in float32 True" in done.stdout
    assert "OpenVINO in int8 True" in done.stdout
