"""The probe recipe: a head trained on the frozen backbone's features, which are computed once."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.classifier import ModelParams, split_at_pool
from tasks.data import Split
from tasks.device import prepare_device
from tasks.errors import NightlyError
from tasks.features import FeatureSource
from tasks.optimizers import make_loss, make_optimizer
from tasks.progress import progress
from tasks.recipe import TrainParams

#: Parameters of the head, and of how weights get into the backbone; the features are the same whatever they are.
NOT_OF_THE_FEATURES = {
    "weights",
    "weights_sha256",
    "head_units",
    "head_batch_normalization",
    "dropout",
    "batch_normalization_momentum",
}
#: A feature's standard deviation counts as at least this share of the features' mean one: dividing by less would
#: blow up what is constant in training but for rounding.
LEAST_DEVIATION = 1e-2
VALIDATION_BATCH = 1024
#: A step takes no longer than what Keras does around it.
STEPS_PER_EXECUTION = 8
#: Rows whose mean and variance are computed at once.
CHUNK = 4096

#: float32 (N, F) features and (N, C) one-hot targets, memory-mapped or not.
Table = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class HeadOutcome:
    """The history of a head's training, and the row of the epoch whose weights it has now."""

    rows: list[dict[str, float]]
    kept: dict[str, float]


@dataclass(frozen=True)
class ProbeOutcome:
    """What a probe leaves besides the trained classifier.

    Attributes:
        rows: the history, as fine-tuning writes it; ``kept`` is the row of the epoch that was kept.
        seconds: by part: ``build`` (converting and compiling the backbone), ``features``, ``head``.
        engine: what computed the features.
        images: whose features the head was trained and validated on; ``computed`` did not come from the cache.
    """

    rows: list[dict[str, float]]
    kept: dict[str, float]
    seconds: dict[str, float]
    engine: str
    images: int
    computed: int


def probe(
    classifier: Any,
    training: Split,
    validation: Split,
    augmented: Path,
    cache: Path,
    params: TrainParams,
    model: ModelParams,
    *,
    trained_head: bool = False,
) -> ProbeOutcome:
    """Train the classifier's head on the features of the training split and of its augmented copies.

    Args:
        classifier: from ``tasks.classifier.build_classifier``, in float32; its head is trained in place.
        augmented: the augment stage's output, with ``images.npy`` and ``targets.npy`` if it wrote copies.
        cache: the features' cache.
        model: what the classifier was built from.
        trained_head: the head's weights mean something already: start from what they compute.

    Raises:
        NightlyError: the copies are not of this training split, the features do not fit the disk or are not
            finite, or the head's training diverges.
        Interrupted: by a signal; the same call goes on from the features computed so far.
    """
    copies = load_copies(augmented, training)
    extractor, head = split_at_pool(classifier)
    normalize = classifier.get_layer("normalize")
    source = FeatureSource(
        extractor,
        cache,
        identity={
            **model.model_dump(mode="json", exclude=NOT_OF_THE_FEATURES),
            "normalization": [normalize.mean, normalize.std, normalize.reverse_channels],
        },
        precision=params.probe.precision,
        calibration=training.images,
        seed=params.seed,
    )
    named = [(training, "training"), (validation, "validation")]
    if copies is not None:
        named.append((copies, "augmented"))
    tables = {name: (source.features(split.images, name), split.targets) for split, name in named}
    held_out = tables.pop("validation")
    began = time.monotonic()
    outcome = train_head(head, list(tables.values()), held_out, params, trained_head=trained_head)
    seconds = {**source.seconds, "head": time.monotonic() - began}
    images = sum(len(split.images) for split, _ in named)
    return ProbeOutcome(outcome.rows, outcome.kept, seconds, source.engine, images, source.computed)


def load_copies(augmented: Path, training: Split) -> Split | None:
    """Map the augment stage's copies of the training split into memory; None if it wrote none.

    Raises:
        NightlyError: they are not copies of this split.
    """
    file = augmented / "images.npy"
    if not file.is_file():
        return None
    copies = Split(np.load(file, mmap_mode="r"), np.load(augmented / "targets.npy", mmap_mode="r"))
    rounds, rest = divmod(len(copies.images), len(training.images))
    fits = not rest and copies.images.shape[1:] == training.images.shape[1:]
    if not fits or not np.array_equal(copies.targets, np.tile(training.targets, (rounds, 1))):
        raise NightlyError(
            f"{file} holds {len(copies.images):,} images that are no copies of the {len(training.images):,} training "
            "images: run the augment stage again ('dvc repro augment')"
        )
    return copies


def train_head(
    head: Any, training: Sequence[Table], validation: Table, params: TrainParams, *, trained_head: bool = False
) -> HeadOutcome:
    """Train ``head``, a Keras model from features to probabilities, in place.

    Pooled features are badly scaled for Adam: all of them positive, their means many times their deviations. So
    it trains on standardized ones, and mean and deviation are then folded into the first layer, whose input is
    raw features in the saved model. If that is a BatchNormalization, it standardizes by itself.

    ``params.probe`` has its own epochs, batch size, learning rate (Adam) and weight decay, the latter of
    standardized features' weights; schedule, loss, label smoothing, seed, early stopping and which epoch to keep
    are those of ``params``.

    Args:
        training: tables that together are the training set, each row seen once an epoch.
        trained_head: start from what the head computes now, instead of taking its weights for a fresh start.

    Raises:
        NightlyError: the loss is not finite.
    """
    import keras

    settings = params.probe
    # Warm-up is for weights that have something to lose; the head starts at random.
    own = {name: getattr(settings, name) for name in ("epochs", "learning_rate", "weight_decay")}
    fixed = {"optimizer": "adam", "warmup_epochs": 0, "low_resolution_epochs": 0, "head_learning_rate": None}
    count = sum(len(features) for features, _ in training)
    batch_size = min(settings.batch_size, count)
    steps = count // batch_size

    first = head.layers[1]
    foldable = isinstance(first, keras.layers.Dense) and first.use_bias
    width = training[0][0].shape[1]
    mean, deviation = (
        _moments([features for features, _ in training]) if foldable else (np.zeros(width), np.ones(width))
    )
    if foldable and trained_head:
        fold(first, -mean / deviation, 1 / deviation)

    head.compile(
        optimizer=make_optimizer(params.changed(**own, **fixed), steps),
        loss=make_loss(params),
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
        # A few dense layers: XLA costs more time than it saves, but JAX has nothing else.
        jit_compile=keras.backend.backend() == "jax" or prepare_device().kind == "gpu",
        steps_per_execution=min(STEPS_PER_EXECUTION, steps),
    )
    with progress("Training the head", settings.epochs * steps, "steps") as advance:
        history = _history(params, batch_size * steps, advance)
        head.fit(
            _batches(training, mean, deviation, batch_size, params.seed),
            validation_data=_batches([validation], mean, deviation, VALIDATION_BATCH, None),
            epochs=settings.epochs,
            shuffle=False,
            verbose=0,
            callbacks=[history],
        )
    if params.keep == "best":
        head.set_weights(history.best_weights)
    if foldable:
        fold(first, mean, deviation)
    return HeadOutcome(
        history.rows, history.rows[(history.best_epoch if params.keep == "best" else len(history.rows)) - 1]
    )


def fold(dense: Any, mean: np.ndarray, deviation: np.ndarray) -> None:
    """Let a Dense layer compute from ``x`` what it computed from ``(x - mean) / deviation``."""
    kernel, bias = dense.get_weights()
    scaled = kernel / np.asarray(deviation, np.float64)[:, np.newaxis]
    dense.set_weights([scaled.astype(kernel.dtype), (bias - mean @ scaled).astype(bias.dtype)])


def _moments(tables: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 mean and standard deviation of each column over all tables, the latter with a lower bound."""
    count, width = sum(map(len, tables)), tables[0].shape[1]
    # Around the first row, so that the squares of large means do not drown small deviations.
    origin = np.asarray(tables[0][0], np.float64)
    total, squares = np.zeros(width), np.zeros(width)
    for table in tables:
        for start in range(0, len(table), CHUNK):
            rows = table[start : start + CHUNK] - origin
            total += rows.sum(axis=0)
            squares += np.einsum("nf,nf->f", rows, rows)
    variance = np.maximum(squares / count - (total / count) ** 2, 0)
    deviation = np.sqrt(variance)
    least = LEAST_DEVIATION * deviation.mean()
    return origin + total / count, np.maximum(deviation, least) if least else np.ones(width)


def _batches(
    tables: Sequence[Table], mean: np.ndarray, deviation: np.ndarray, batch_size: int, seed: int | None
) -> Any:
    """Return a Keras ``PyDataset`` of standardized features and targets.

    With a ``seed`` every epoch has its own order, a function of seed and epoch alone, and a short last batch is
    left out (its shape would be compiled a second time); without one the order stays and all rows come.
    """
    import keras

    offsets = np.cumsum([0, *(len(features) for features, _ in tables)])
    count = int(offsets[-1])
    shift, scale = mean.astype(np.float32), (1 / deviation).astype(np.float32)

    class Batches(keras.utils.PyDataset):
        def __init__(self) -> None:
            super().__init__()
            self.epoch = 0
            self.order = self._order()

        def _order(self) -> np.ndarray:
            return np.arange(count) if seed is None else np.random.default_rng([seed, self.epoch]).permutation(count)

        def __len__(self) -> int:
            return count // batch_size if seed is not None else -(-count // batch_size)

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            # In the order of the file, which is one pass over it, and within a batch means nothing.
            chosen = np.sort(self.order[index * batch_size : (index + 1) * batch_size])
            ends = np.searchsorted(chosen, offsets)
            # Everything in place: fresh memory for a batch of wide features costs ten times the arithmetic.
            features = np.empty((len(chosen), len(mean)), np.float32)
            targets = np.empty((len(chosen), tables[0][1].shape[1]), np.float32)
            for table, offset, start, end in zip(tables, offsets, ends, ends[1:], strict=False):
                for column, out in zip(table, (features, targets), strict=True):
                    np.take(column, chosen[start:end] - offset, axis=0, out=out[start:end], mode="clip")
            features -= shift
            features *= scale
            return features, targets

        def on_epoch_end(self) -> None:
            self.epoch += 1
            self.order = self._order()

    return Batches()


def _history(params: TrainParams, images_per_epoch: int, advance: Any) -> Any:
    """Return a Keras callback that keeps the history and the best weights, and stops a diverging or idle run."""
    import keras

    epochs = params.probe.epochs

    class History(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[dict[str, float]] = []
            self.best_epoch = 0
            self.best_loss = float("inf")
            self.best_weights: list[np.ndarray] = []

        def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
            self.began = time.monotonic()
            self.shown = -1

        def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
            advance(batch - self.shown)
            self.shown = batch

        def on_test_begin(self, logs: dict | None = None) -> None:
            # Validation is not training: the epoch's speed counts training steps alone.
            self.seconds = time.monotonic() - self.began

        def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
            number, rate = epoch + 1, float(self.model.optimizer.learning_rate)
            measured = {name: float(logs[name]) for name in ("loss", "accuracy", "val_loss", "val_accuracy")}
            if not np.isfinite(list(measured.values())).all():
                raise NightlyError(
                    f"training the head diverged in epoch {number}: loss {measured['loss']}, validation loss "
                    f"{measured['val_loss']}, at learning rate {rate:.3g}. Lower train.probe.learning_rate"
                )
            self.rows.append(
                {
                    "epoch": number,
                    **{name: round(value, 6) for name, value in measured.items()},
                    "learning_rate": rate,
                    "seconds": round(self.seconds, 2),
                }
            )
            print(
                f"epoch {number}/{epochs}: loss {measured['loss']:.4f}, accuracy {measured['accuracy']:.4f}, "
                f"validation loss {measured['val_loss']:.4f}, accuracy {measured['val_accuracy']:.4f}, "
                f"{self.seconds:.1f} s, {images_per_epoch / self.seconds:,.0f} images/s",
                flush=True,
            )
            if measured["val_loss"] < self.best_loss:
                self.best_loss, self.best_epoch = measured["val_loss"], number
                self.best_weights = self.model.get_weights()
            elif params.early_stopping_epochs and number - self.best_epoch >= params.early_stopping_epochs:
                self.model.stop_training = True

    return History()
