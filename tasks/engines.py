"""The ways to run a model: Keras, or OpenVINO in float32 or bfloat16; the same pixels in, the same rows out."""

import abc
import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks.bundle import Bundle, load_keras_model
from tasks.errors import NightlyError
from tasks.params import nearest

REFERENCE = "keras-float32"
OPENVINO_PRECISIONS = {"openvino-float32": "f32", "openvino-bfloat16": "bf16"}
ENGINES = [REFERENCE, *OPENVINO_PRECISIONS]
DEFAULT_BATCH_SIZE = 32


class Engine(abc.ABC):
    """A loaded model. Every batch it computes has the same shape: short ones are padded, the padding cut off.

    A fixed shape is compiled once, and keeps one image's result independent of how many came with it.
    """

    name: str
    batch_size: int

    @abc.abstractmethod
    def outputs(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield what the model gives for each uint8 (n, H, W, 3) batch, n <= batch_size, in order.

        float32 (n, C) probabilities, before temperature scaling, and float32 (n, F) pooled features, None where the
        model has but one output: bundles older than the second one, and extractors, whose one output is features.
        """

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the first of the ``outputs`` alone."""
        for first, _ in self.outputs(batches):
            yield first

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return float32 (N, C) probabilities for uint8 (N, H, W, 3) images, memory-mapped ones too."""
        starts = range(0, len(images), self.batch_size)
        parts = list(self.stream(images[start : start + self.batch_size] for start in starts))
        if not parts:
            raise NightlyError(f"engine {self.name}: there must be at least one image, but there is none")
        return np.concatenate(parts)

    def _padded(self, batch: np.ndarray) -> np.ndarray:
        if len(batch) > self.batch_size:
            raise ValueError(f"a batch may hold {self.batch_size} images, but holds {len(batch)}")
        missing = self.batch_size - len(batch)
        if not missing:
            return np.ascontiguousarray(batch)
        return np.ascontiguousarray(np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)]))


class KerasEngine(Engine):
    """A Keras model with one or two outputs, on the backend's device."""

    name = REFERENCE

    def __init__(self, model: Any, batch_size: int) -> None:
        self.batch_size = batch_size
        self._model = model

    def outputs(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        for batch in batches:
            found = self._model.predict_on_batch(self._padded(batch))
            first, *rest = found if isinstance(found, list) else [found]
            yield _rows(first, len(batch)), _rows(rest[0], len(batch)) if rest else None


class OpenVINOEngine(Engine):
    """An OpenVINO model on the CPU, several batches in flight.

    Args:
        model: an ``openvino.Model`` with one uint8 (N, H, W, 3) input, whose N is set to ``batch_size``, and one or
            two outputs.
    """

    def __init__(self, model: Any, name: str, batch_size: int) -> None:
        openvino = import_openvino()
        if name == "openvino-bfloat16" and not supports_bfloat16():
            raise NightlyError("precision bfloat16 needs a processor with bfloat16 instructions; float32 works here")
        self.name = name
        self.batch_size = batch_size
        _, *image_shape = model.inputs[0].partial_shape
        model.reshape([batch_size, *image_shape])
        options = {"INFERENCE_PRECISION_HINT": OPENVINO_PRECISIONS[name], "PERFORMANCE_HINT": "THROUGHPUT"}
        self._compiled = openvino.Core().compile_model(model, "CPU", options)
        self._parallel = self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")

    def outputs(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        free = [self._compiled.create_infer_request() for _ in range(self._parallel)]
        running: deque = deque()

        def oldest() -> tuple[np.ndarray, np.ndarray | None]:
            request, count, _ = running.popleft()
            request.wait()
            first, *rest = (_rows(tensor.data, count) for tensor in request.output_tensors)
            free.append(request)
            return first, rest[0] if rest else None

        for batch in batches:
            if not free:
                yield oldest()
            request = free.pop()
            padded = self._padded(batch)
            request.start_async(padded, share_inputs=True)
            running.append((request, len(batch), padded))  # keeps the shared input alive
        while running:
            yield oldest()


def _rows(values: Any, count: int) -> np.ndarray:
    """Return a copy of the first ``count`` rows as float32."""
    return np.array(values[:count], np.float32)


def with_features(classifier: Any) -> Any:
    """Return a Keras model that gives a classifier's probabilities and the float32 (N, F) features below its head.

    These are the means over all positions, for a classifier that flattens them, too. One without a layer ``pool`` is
    returned as it is.
    """
    import keras

    pool = next((layer for layer in classifier.layers if layer.name == "pool"), None)
    if pool is None:
        return classifier
    flat = isinstance(pool, keras.layers.Flatten)
    features = keras.layers.GlobalAveragePooling2D(name="features")(pool.input) if flat else pool.output
    return keras.Model(classifier.input, [classifier.output, features], name=classifier.name)


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would report every import over the network, unasked.

    Where the package is missing OpenVINO, and NNCF with it, put a stub in its place. It has to be missing before
    either is imported, and Keras's export imports OpenVINO too.
    """
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    return openvino


def read_openvino(file: Path) -> Any:
    """Return the ``openvino.Model`` in an ``.xml`` file and the ``.bin`` beside it."""
    return import_openvino().Core().read_model(file)


def supports_bfloat16() -> bool:
    """Tell whether this processor computes in bfloat16."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def open_engine(bundle: Bundle, name: str, *, batch_size: int | None = None) -> Engine:
    """Load the bundle's model into engine ``name``.

    Raises:
        NightlyError: no such engine, or this bundle or machine does not have it.
    """
    batch_size = batch_size or DEFAULT_BATCH_SIZE
    if name == REFERENCE:
        from tasks.device import prepare_device

        prepare_device()
        return KerasEngine(with_features(load_keras_model(bundle)), batch_size)
    if name in OPENVINO_PRECISIONS:
        if not bundle.openvino_file.is_file():
            raise NightlyError(f"{bundle.path} has no OpenVINO engine: the export stage writes it")
        return OpenVINOEngine(read_openvino(bundle.openvino_file), name, batch_size)
    raise NightlyError(f"engine '{name}' is unknown, {nearest(name, ENGINES)}")


def batched(items: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Stack single uint8 (H, W, 3) images into batches of at most ``batch_size``."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, batch_size)):
        yield np.stack(group)
