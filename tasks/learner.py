"""What is trained: augmentation, mixing and the classifier in one compiled step, and the batches it eats.

Imports Keras at its top, so import it inside functions only.
"""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from tasks.data import Split


class Learner(keras.Model):
    """From (images, targets) to the loss; everything between raw pixels and the loss is inside the compiled step.

    Inputs are uint8 (B, H, W, 3) images and float32 (B, C) one-hot targets; with ``resident`` data they are
    int32 (B,) row numbers, and the pixels never leave the device. Mixing changes images and targets alike, so
    the targets are an input, and the mixed ones an output that the loss is computed on.

    ``ema_momentum`` keeps a moving average of all of the classifier's weights, BatchNorm's statistics included:
    averaged kernels under statistics of the raw ones would not fit each other. Early on the momentum is
    min(ema_momentum, (1 + n) / (10 + n)) after n updates, as in tf.train.ExponentialMovingAverage.
    """

    def __init__(
        self,
        classifier: Any,
        augmentation: Any,
        mix: Any | None,
        criterion: Any,
        *,
        ema_momentum: float | None = None,
        resident: Split | None = None,
    ) -> None:
        # Under mixed precision a float32 target must not be cast on its way through.
        super().__init__(name="learner", dtype="float32", autocast=False)
        self.classifier = classifier
        self.augmentation = augmentation
        self.mix = mix
        self.criterion = criterion
        self.accuracy = keras.metrics.CategoricalAccuracy(name="accuracy")
        self.store = self._keep_on_device(resident) if resident else []
        self.ema_momentum = ema_momentum
        self.averages = []
        if ema_momentum is not None:
            self.updates = self.add_weight(name="ema_updates", shape=(), initializer="zeros", trainable=False)
            for number, variable in enumerate(classifier.weights):
                average = self.add_weight(
                    name=f"ema_{number}", shape=variable.shape, dtype="float32", trainable=False, initializer="zeros"
                )
                # A copy: on JAX the two would share a buffer, which cannot be given away twice.
                average.assign(ops.convert_to_numpy(variable))
                self.averages.append(average)

    def call(self, inputs: Any, training: bool | None = None) -> dict[str, Any]:
        if self.store:
            images, targets = (ops.take(kept, inputs, axis=0) for kept in self.store)
        else:
            images, targets = inputs
        if training:
            images = self.augmentation(images, training=True)
            if self.mix is not None:
                mixed, targets = self.mix(images, targets, training=True)
                # Back to whole levels: the classifier sees the very dtype that it will see in service.
                images = ops.cast(ops.round(mixed), "uint8")
        probabilities = self.classifier(images, training=training)
        if training and self.averages:
            self._average()
        return {"probabilities": probabilities, "targets": targets}

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        return self.criterion(y_pred["targets"], y_pred["probabilities"])

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        self.accuracy.update_state(y_pred["targets"], y_pred["probabilities"])
        return self.get_metrics_result()

    def state_variables(self) -> list[Any]:
        """Return every variable that a run must keep: weights, averages, seeds; not the images on the device."""
        kept = {id(variable) for variable in self.store}
        return [variable for variable in self.variables if id(variable) not in kept]

    def weights_in_use(self) -> list[np.ndarray]:
        """Return the classifier's weights that are validated and saved: the averages where there are any."""
        variables = self.averages or self.classifier.weights
        return [np.array(ops.convert_to_numpy(variable)) for variable in variables]

    def _average(self) -> None:
        count = self.updates + 1.0
        momentum = ops.minimum(self.ema_momentum, (1.0 + count) / (10.0 + count))
        self.updates.assign(count)
        for average, variable in zip(self.averages, self.classifier.weights, strict=True):
            value = ops.stop_gradient(ops.cast(variable.value, "float32"))
            average.assign(average + (1.0 - momentum) * (value - average))

    def _keep_on_device(self, resident: Split) -> list[Any]:
        kept = []
        for name, array in (("images", resident.images), ("targets", resident.targets)):
            variable = self.add_weight(
                name=f"resident_{name}", shape=array.shape, dtype=str(array.dtype), trainable=False, initializer="zeros"
            )
            variable.assign(np.asarray(array))
            kept.append(variable)
        return kept


class TrainingBatches(keras.utils.PyDataset):
    """Shuffled batches of one size; each epoch's order is a function of seed and epoch alone.

    A short last batch is left out: its shape would be compiled a second time.

    Args:
        start: batches of each epoch to leave out: a resumed run has already seen them.
        steps: batches of a whole epoch; as many as there are whole ones if None.
        rows_only: give row numbers instead of pixels.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        *,
        epoch: int = 0,
        start: int = 0,
        steps: int | None = None,
        rows_only: bool = False,
    ) -> None:
        super().__init__()
        self._split = split
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = epoch
        self._start = start
        self._rows_only = rows_only
        self._steps = len(split.images) // batch_size if steps is None else steps
        self._order = self._shuffled()

    def __len__(self) -> int:
        return self._steps - self._start

    def __getitem__(self, index: int) -> tuple[Any]:
        first = (self._start + index) * self._batch_size
        rows = self._order[first : first + self._batch_size]
        if self._rows_only:
            return (rows,)
        return ((self._split.images[rows], self._split.targets[rows]),)

    def on_epoch_end(self) -> None:
        self._epoch += 1
        self._order = self._shuffled()

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng([self._seed, self._epoch]).permutation(len(self._split.images)).astype(np.int32)


class ImagesInOrder(keras.utils.PyDataset):
    """All images of a split in order, in batches of one size; the last is filled up with its last image."""

    def __init__(self, images: np.ndarray, batch_size: int) -> None:
        super().__init__()
        self._images = images
        self._batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._images) / self._batch_size)

    def __getitem__(self, index: int) -> tuple[Any]:
        rows = np.arange(index * self._batch_size, (index + 1) * self._batch_size)
        return (self._images[np.minimum(rows, len(self._images) - 1)],)


def mean_loss(criterion: Any, targets: np.ndarray, found: np.ndarray) -> float:
    """Return the mean over (N, C) targets and probabilities; calling a Keras loss divides it among the devices."""
    return float(ops.mean(criterion.call(ops.convert_to_tensor(targets), ops.convert_to_tensor(found))))


def probabilities(classifier: Any, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Return float32 (N, C) probabilities for uint8 (N, H, W, 3) images."""
    found = classifier.predict(ImagesInOrder(images, batch_size), verbose=0)
    return np.asarray(found[: len(images)], np.float32)
