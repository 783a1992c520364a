"""The ways to run a model: Keras, or OpenVINO in float32, bfloat16 or int8; the same pixels in, the same rows out."""

import abc
import itertools
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks.bundle import Bundle, load_keras_model
from tasks.errors import NightlyError
from tasks.params import nearest

REFERENCE = "keras-float32"
#: From the slowest to the fastest on a processor with instructions for all.
OPENVINO_ENGINES = ["openvino-float32", "openvino-bfloat16", "openvino-int8"]
ENGINES = [REFERENCE, *OPENVINO_ENGINES]
#: ResNet50 at 256 px on two Zen 5 cores, images/s for batches of 4, 8, 16, 32: float32 43, 42, 41, 38, bfloat16 95, 91,
#: 85, 79; int8, by processor time, 151, 155, 152, 150. At 64 px, by processor time: float32 551, 628, 663, 691,
#: bfloat16 1176, 1300, 1356, 1443, int8 2025, 2285, 2423, 2507. (ResNet20 at 32 px gains 5% from 8 to 32.)
CPU_BATCH = 8
KERAS_BATCH = 32


class Engine(abc.ABC):
    """A loaded model. Every batch it computes has the same shape: short ones are padded, the padding cut off.

    A fixed shape is compiled once, and keeps one image's result, to the last bit, independent of how many came with it.
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

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the ``outputs`` for all of uint8 (N, H, W, 3) images, memory-mapped ones too."""
        starts = range(0, len(images), self.batch_size)
        parts = list(self.outputs(images[start : start + self.batch_size] for start in starts))
        if not parts:
            raise NightlyError(f"engine {self.name}: there must be at least one image, but there is none")
        first, second = zip(*parts, strict=True)
        return np.concatenate(first), None if second[0] is None else np.concatenate(second)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return the first of what ``run`` returns."""
        return self.run(images)[0]

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
    """An OpenVINO model on the CPU, several batches of ``CPU_BATCH`` in flight.

    The batch is nobody's choice, so that a result is no matter of how the images were batched. (On Zen 5 rows were the
    same bits whatever the batch, the place in it, the streams and their threads; no document promises that.)

    Args:
        model: an ``openvino.Model`` with one uint8 (N, H, W, 3) input and one or two outputs; N is set.
        name: one of ``OPENVINO_ENGINES``. A quantized model computes what it leaves in floating point in bfloat16
            where the processor can.
    """

    batch_size = CPU_BATCH

    def __init__(self, model: Any, name: str) -> None:
        openvino = import_openvino()
        if name == "openvino-bfloat16" and not supports_bfloat16():
            raise NightlyError("precision bfloat16 needs a processor with bfloat16 instructions; float32 works here")
        self.name = name
        _, *image_shape = model.inputs[0].partial_shape
        model.reshape([CPU_BATCH, *image_shape])
        # Converted bilinear upsampling leaves the batch size among the outputs, a scalar.
        self._outputs = [index for index, output in enumerate(model.outputs) if len(output.partial_shape) == 2]
        precision = "f32" if name == "openvino-float32" or not supports_bfloat16() else "bf16"
        options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "THROUGHPUT"}
        self._compiled = openvino.Core().compile_model(model, "CPU", options)
        # Two batches for each stream, the second for when the first is done: 4% faster for ResNet50, 15% for ResNet20.
        self._parallel = 2 * self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")

    def outputs(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        free = [self._compiled.create_infer_request() for _ in range(self._parallel)]
        running: deque = deque()

        def oldest() -> tuple[np.ndarray, np.ndarray | None]:
            request, count, _ = running.popleft()
            request.wait()
            first, *rest = (_rows(request.get_output_tensor(index).data, count) for index in self._outputs)
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


def write_openvino(model: Any, destination: Path) -> None:
    """Convert a Keras model to OpenVINO's format: ``destination``, an ``.xml`` file, and a ``.bin`` beside it."""
    import_openvino()
    import keras

    destination.parent.mkdir(parents=True, exist_ok=True)
    if keras.backend.backend() in ("tensorflow", "openvino"):
        model.export(str(destination), format="openvino", verbose=False)
        return
    # From JAX Keras would go through TensorFlow, which need not be installed. Its OpenVINO backend needs neither,
    # but a process has one backend, chosen when Keras is imported.
    code = "import sys; from tasks.engines import convert; convert(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "model.keras")
        model.save(saved)
        command = [sys.executable, "-W", "ignore", "-c", code, str(saved), str(destination)]
        environment = {**os.environ, "KERAS_BACKEND": "openvino"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NightlyError(f"{model.name} cannot be converted to OpenVINO: {reason}")


def convert(model_file: str, destination: str) -> None:
    """Convert a saved Keras model by the backend of this process."""
    import_openvino()
    import keras

    import tasks.layers  # noqa: F401  registers the layers that the file names

    write_openvino(keras.saving.load_model(model_file, compile=False, safe_mode=True), Path(destination))


def read_openvino(file: Path) -> Any:
    """Return the ``openvino.Model`` in an ``.xml`` file and the ``.bin`` beside it."""
    return import_openvino().Core().read_model(file)


def supports_bfloat16() -> bool:
    """Tell whether this processor computes in bfloat16."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def open_engine(bundle: Bundle, name: str, *, batch_size: int | None = None) -> Engine:
    """Load the bundle's model into engine ``name``; ``batch_size`` is for Keras alone, see ``OpenVINOEngine``.

    Raises:
        NightlyError: no such engine, or this bundle or machine does not have it.
    """
    if name == REFERENCE:
        from tasks.device import prepare_device

        prepare_device()
        return KerasEngine(with_features(load_keras_model(bundle)), batch_size or KERAS_BATCH)
    if name not in OPENVINO_ENGINES:
        raise NightlyError(f"engine '{name}' is unknown, {nearest(name, ENGINES)}")
    file = bundle.engine_file(name)
    if not file.is_file():
        raise NightlyError(f"{bundle.path} has no engine {name}: the export stage writes it")
    return OpenVINOEngine(read_openvino(file), name)


def batched(items: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Stack single uint8 (H, W, 3) images into batches of at most ``batch_size``."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, batch_size)):
        yield np.stack(group)
