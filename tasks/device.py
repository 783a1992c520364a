"""The accelerator behind Keras, whichever backend runs it."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tasks.errors import NightlyError


@dataclass(frozen=True)
class Device:
    """Where Keras computes: ``kind`` is ``"gpu"`` or ``"cpu"``, ``count`` the number of GPUs (0 on a CPU)."""

    backend: str
    kind: str
    name: str
    count: int


def prepare_device(require_gpu: bool = False) -> Device:
    """Import Keras, let GPU memory grow as needed, and say where computation happens.

    Raises:
        NightlyError: ``require_gpu`` is set and the backend sees no GPU. A missing driver would otherwise
            train on the CPU all night without a word.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with _quiet_stderr():
        import keras

    backend = keras.backend.backend()
    names = _tensorflow_gpus() if backend == "tensorflow" else _jax_gpus()
    if require_gpu and not names:
        raise NightlyError(
            f"train.require_gpu is true, but {backend} sees no GPU: check 'nvidia-smi' and that the 'gpu' extra is "
            "installed, or set train.require_gpu to false"
        )
    if names:
        return Device(backend, "gpu", names[0], len(names))
    return Device(backend, "cpu", _cpu_name(), 0)


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hold back what TensorFlow's C++ code prints while it is imported; show it if the import fails.

    These lines come before any log level counts, six for every stage of every night.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(saved, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _tensorflow_gpus() -> list[str]:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus]


def _jax_gpus() -> list[str]:
    import jax

    return [device.device_kind for device in jax.devices() if device.platform == "gpu"]


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        model = "CPU"
    return f"{model}, {os.cpu_count()} cores"


def gpu_present() -> bool:
    """Tell whether a GPU can be used, without importing a deep-learning library."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/kfd")
