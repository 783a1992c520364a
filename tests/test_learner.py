import numpy as np
import pytest

from tasks.data import Split
from tasks.optimizers import make_loss
from tasks.recipe import TrainParams


def arrays(count: int) -> Split:
    images = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1).repeat(3, axis=3)
    return Split(images, np.eye(count, dtype=np.float32))


def batches(split: Split, size: int = 16, seed: int = 1, **options):
    from tasks.learner import TrainingBatches

    return TrainingBatches(split, size, seed, **options)


def order_of(found) -> list[int]:
    return [int(value) for index in range(len(found)) for value in found[index][0][0][:, 0, 0, 0]]


def test_training_batches_are_shuffled_anew_each_epoch_and_by_seed():
    found = batches(arrays(64))
    first = order_of(found)
    assert sorted(first) == list(range(64))
    assert first != list(range(64))
    found.on_epoch_end()
    second = order_of(found)
    assert second != first
    assert order_of(batches(arrays(64))) == first
    assert order_of(batches(arrays(64), seed=2)) != first
    assert order_of(batches(arrays(64), epoch=1)) == second, "a resumed run sees the epoch that it was in"


def test_a_short_last_batch_is_left_out():
    assert len(batches(arrays(50))) == 3
    assert len(order_of(batches(arrays(50)))) == 48


def test_a_resumed_epoch_goes_on_where_it_was():
    assert order_of(batches(arrays(64), start=2)) == order_of(batches(arrays(64)))[32:]


def test_parts_of_a_batch_are_the_batch():
    whole = order_of(batches(arrays(50)))
    assert order_of(batches(arrays(50), size=4, steps=12)) == whole, "and what the whole leaves out, they leave out"


def test_a_target_stays_with_its_image():
    ((images, targets),) = batches(arrays(64))[2]
    np.testing.assert_array_equal(images[:, 0, 0, 0], targets.argmax(axis=1))


def test_row_numbers_are_those_of_the_images():
    split = arrays(64)
    (rows,) = batches(split, rows_only=True)[1]
    ((images, _),) = batches(split)[1]
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(split.images[rows], images)


def test_images_in_order_fill_the_last_batch():
    from tasks.learner import ImagesInOrder

    found = ImagesInOrder(arrays(10).images, 4)
    assert len(found) == 3
    assert [int(value) for index in range(3) for value in found[index][0][:, 0, 0, 0]] == [*range(10), 9, 9]


def test_probabilities_do_not_depend_on_the_batch_size():
    import keras

    from tasks.learner import probabilities

    keras.utils.set_random_seed(1)
    images = np.random.default_rng(1).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    model = keras.Sequential(
        [keras.Input((4, 4, 3), dtype="uint8"), keras.layers.Rescaling(0.01), keras.layers.Flatten()]
    )
    model.add(keras.layers.Dense(3, activation="softmax"))
    first = probabilities(model, images, 4)
    assert first.shape == (10, 3)
    np.testing.assert_allclose(probabilities(model, images, 32), first, rtol=1e-5)


def small_learner(**options):
    import keras

    from tasks.learner import Learner

    keras.utils.set_random_seed(1)
    images = keras.Input((4, 4, 3), dtype="uint8")
    x = keras.layers.BatchNormalization(momentum=0.5)(keras.layers.Rescaling(1 / 255)(images))
    classifier = keras.Model(images, keras.layers.Dense(3, activation="softmax")(keras.layers.Flatten()(x)))
    augmentation = keras.Sequential([keras.Input((4, 4, 3), dtype="uint8"), keras.layers.Identity()])
    learner = Learner(classifier, augmentation, None, make_loss(TrainParams()), **options)
    learner.compile(optimizer=keras.optimizers.SGD(0.5), jit_compile=False)
    return learner


DATA = (
    np.random.default_rng(2).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8),
    np.eye(3, dtype=np.float32)[np.arange(8) % 3],
)


def test_the_moving_average_follows_its_formula_batch_normalization_included():
    learner = small_learner(ema_momentum=0.3)
    expected = [np.array(value) for value in learner.classifier.get_weights()]
    weights = learner.classifier.get_weights()
    for step in range(1, 5):
        momentum = min(0.3, (1 + step) / (10 + step))
        # The step averages what it finds: kernels before its update, BatchNorm's statistics after it.
        before = [np.array(value) for value in weights]
        learner.train_on_batch(DATA)
        weights = learner.classifier.get_weights()
        found = [
            after if "moving" in variable.path else earlier
            for variable, earlier, after in zip(learner.classifier.weights, before, weights, strict=True)
        ]
        expected = [momentum * old + (1 - momentum) * new for old, new in zip(expected, found, strict=True)]
    for one, other in zip(learner.weights_in_use(), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert not np.allclose(learner.weights_in_use()[0], learner.classifier.get_weights()[0])


def test_without_averages_the_weights_in_use_are_the_classifiers():
    learner = small_learner()
    for one, other in zip(learner.weights_in_use(), learner.classifier.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_loss_is_that_of_the_mixed_targets():
    import keras

    from tasks.learner import Learner
    from tasks.mixing import Mix

    plain = small_learner()
    mixing = Learner(plain.classifier, plain.augmentation, Mix(1.0, seed=3), make_loss(TrainParams()))
    mixing.compile(optimizer=keras.optimizers.SGD(0.0), jit_compile=False)
    mixed, targets = Mix(1.0, seed=3)(*DATA, training=True)
    images = np.round(np.asarray(mixed)).astype(np.uint8)
    found = np.asarray(plain.classifier(images, training=True))
    expected = -(np.asarray(targets) * np.log(found)).sum(axis=1).mean()
    assert mixing.train_on_batch(DATA)[0] == pytest.approx(expected, rel=1e-4)
    unmixed = -(DATA[1] * np.log(np.asarray(plain.classifier(DATA[0])))).sum(axis=1).mean()
    assert mixing.test_on_batch(DATA)[0] == pytest.approx(unmixed, rel=1e-4)
