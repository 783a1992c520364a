"""The ways to run a bundle's model: Keras, or OpenVINO in float32 or bfloat16; same pixels in, probabilities out."""

import abc
import itertools
from collections import deque
from collections.abc import Iterable, Iterator

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
    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield float32 (n, C) probabilities for each uint8 (n, H, W, 3) batch, n <= batch_size, in order."""

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
        return np.ascontiguousarray(np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)]))


class KerasEngine(Engine):
    """The bundle's Keras model on the backend's device."""

    name = REFERENCE

    def __init__(self, bundle: Bundle, batch_size: int) -> None:
        from tasks.device import prepare_device

        prepare_device()
        self.batch_size = batch_size
        self._model = load_keras_model(bundle)

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for batch in batches:
            yield np.asarray(self._model.predict_on_batch(self._padded(batch)), np.float32)[: len(batch)]


class OpenVINOEngine(Engine):
    """The exported OpenVINO model on the CPU, several batches in flight."""

    def __init__(self, bundle: Bundle, name: str, batch_size: int) -> None:
        import openvino

        if not bundle.openvino_file.is_file():
            raise NightlyError(f"{bundle.path} has no OpenVINO engine: the export stage writes it")
        self.name = name
        self.batch_size = batch_size
        core = openvino.Core()
        if name == "openvino-bfloat16" and not supports_bfloat16():
            raise NightlyError("precision bfloat16 needs a processor with bfloat16 instructions; float32 works here")
        model = core.read_model(bundle.openvino_file)
        size = bundle.decode.size
        model.reshape([batch_size, size, size, 3])
        options = {"INFERENCE_PRECISION_HINT": OPENVINO_PRECISIONS[name], "PERFORMANCE_HINT": "THROUGHPUT"}
        self._compiled = core.compile_model(model, "CPU", options)
        self._parallel = self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        free = [self._compiled.create_infer_request() for _ in range(self._parallel)]
        running: deque = deque()

        def oldest() -> np.ndarray:
            request, count, _ = running.popleft()
            request.wait()
            result = request.get_output_tensor(0).data[:count].astype(np.float32)
            free.append(request)
            return result

        for batch in batches:
            if not free:
                yield oldest()
            request = free.pop()
            padded = self._padded(batch)
            request.start_async(padded, share_inputs=True)
            running.append((request, len(batch), padded))  # keeps the shared input alive
        while running:
            yield oldest()


def supports_bfloat16() -> bool:
    """Tell whether this processor computes in bfloat16."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def open_engine(bundle: Bundle, name: str, *, batch_size: int | None = None) -> Engine:
    """Load the bundle's model into engine ``name``.

    Raises:
        NightlyError: no such engine, or this bundle or machine does not have it.
    """
    batch_size = batch_size or DEFAULT_BATCH_SIZE
    if name == REFERENCE:
        return KerasEngine(bundle, batch_size)
    if name in OPENVINO_PRECISIONS:
        return OpenVINOEngine(bundle, name, batch_size)
    raise NightlyError(f"engine '{name}' is unknown, {nearest(name, ENGINES)}")


def batched(items: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Stack single uint8 (H, W, 3) images into batches of at most ``batch_size``."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, batch_size)):
        yield np.stack(group)
