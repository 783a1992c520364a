"""The accelerator behind Keras, whichever backend runs it."""

import ctypes
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tasks.errors import Interrupted, NightlyError
from tasks.files import read_json, write_json

DRIVER = Path("/proc/driver/nvidia/version")
CPU = Path("/proc/cpuinfo")

#: Makes XLA's kernels for GPUs add in a fixed order. Read once, when XLA starts.
_DETERMINISTIC_XLA = "--xla_gpu_deterministic_ops=true"

#: Set in the environment, GPUs are used without waiting for a turn; children of a process that has its turn get it.
GPU_SHARED = "NIGHTLY_GPU_SHARED"
#: The GPUs that this process keeps from others, until it ends.
_held: list[FileLock] = []

#: Of mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Device:
    """Where Keras computes.

    Attributes:
        backend: Keras's, ``tensorflow`` or ``jax``.
        kind: ``gpu`` or ``cpu``.
        name: the hardware's, for people.
        count: how many of them share each batch: GPUs, or the virtual devices that a CPU was divided into.
        driver: version of NVIDIA's driver, None without one.
        memory_bytes: of one GPU, None on a CPU or if it can't be told.
        fast_bfloat16: it computes in bfloat16 faster than in float32: a GPU's Tensor cores since Ampere, a CPU's AMX.
            (A CPU with AVX512-BF16 alone has the instructions but gains nothing by them in training.)
    """

    backend: str
    kind: str
    name: str
    count: int
    driver: str | None = None
    memory_bytes: int | None = None
    fast_bfloat16: bool = False


def prepare_device(require_gpu: bool = False, *, deterministic: bool = False, only_look: bool = False) -> Device:
    """Import Keras, let GPU memory grow as needed, and say where computation happens.

    Where that is a GPU, wait until no other process of this software computes on it, and keep it until this one ends.

    Args:
        deterministic: the same seed gives the same numbers on the same machine, on a GPU at the cost of its
            fastest kernels. This must then be the process's first use of TensorFlow or JAX.
        only_look: nothing will be computed, so that there is nothing to wait for.

    Raises:
        Interrupted: by SIGINT while it waited.
        NightlyError: ``require_gpu`` is set and the backend sees no GPU. A missing driver would otherwise
            train on the CPU all night without a word.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if deterministic and _DETERMINISTIC_XLA not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC_XLA}".strip()
    with _quiet_stderr():
        import keras

    backend = keras.backend.backend()
    gpus = _tensorflow_gpus(deterministic) if backend == "tensorflow" else _jax_gpus()
    if require_gpu and not gpus:
        raise NightlyError(
            f"train.require_gpu is true, but {backend} sees no GPU: check 'nvidia-smi' and that the 'gpu' extra is "
            "installed, or set train.require_gpu to false"
        )
    if not gpus:
        return Device(
            backend, "cpu", _cpu_name(), _cpu_count(backend), fast_bfloat16="amx_bf16" in _line(CPU, "flags").split()
        )
    if not only_look:
        _take_turn()
    name, capability = gpus[0]
    return Device(
        backend, "gpu", name, len(gpus), _nvidia_driver(), _gpu_memory_bytes(), fast_bfloat16=capability >= (8, 0)
    )


def _take_turn() -> None:
    """Wait until no other process of this account holds a GPU that this one sees, then hold them until its end.

    Two at once would end each other for want of memory, in the middle of the night. The locks are the kernel's, which
    gives them back however a process ends.
    """
    if os.environ.get(GPU_SHARED):
        return
    # Not the home folder: a service's account may have none.
    folder = Path(tempfile.gettempdir()) / f"resnet-nightly-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    command = " ".join(" ".join(sys.orig_argv[1:]).split())[:100]
    facts = {"command": command, "folder": os.getcwd(), "pid": os.getpid(), "host": socket.gethostname()}
    for gpu in sorted(_gpu_ids()):  # in one order, so that no two wait for each other
        lock, owner = FileLock(folder / f"{gpu}.lock"), folder / f"{gpu}.json"
        try:
            lock.acquire(blocking=False)
        except Timeout:
            holder = _holder(owner)
            try:
                print(f"waiting for the GPU: {holder}", flush=True)
                lock.acquire(poll_interval=1.0)
            except KeyboardInterrupt:
                raise Interrupted(f"stopped while it waited for the GPU: {holder}") from None
        _held.append(lock)
        write_json(owner, {**facts, "since": datetime.now().astimezone().isoformat(timespec="seconds")})
    os.environ[GPU_SHARED] = "1"


def _holder(owner: Path) -> str:
    """Say who holds a GPU. The file only informs; the lock itself is the kernel's."""
    try:
        facts = read_json(owner)
    except FileNotFoundError:
        return "another process has just taken it"
    since = datetime.fromisoformat(facts["since"])
    who = f"process {facts['pid']} on {facts['host']}, '{facts['command']}' in {facts['folder']}"
    return f"{who}, since {since:%Y-%m-%d %H:%M:%S}"


@contextmanager
def data_parallel(device: Device) -> Iterator[None]:
    """Build, compile and train Keras models in here, and each batch is shared out among the devices of this machine.

    With a single one nothing is changed. Batch sizes must be multiples of ``device.count``. With several on
    TensorFlow, Keras can neither compile the training step with XLA nor run several steps per execution, a
    ``keras.losses.Loss`` called in here gives the loss divided by ``device.count``, every replica draws the same
    random numbers unless told otherwise, and see :func:`normalize_whole_batches`.
    """
    import keras

    if device.count == 1:
        yield
    elif device.backend == "jax":
        with keras.distribution.DataParallel(devices=keras.distribution.list_devices(device.kind)).scope():
            yield
    else:
        import tensorflow as tf

        names = [logical.name for logical in tf.config.list_logical_devices(device.kind.upper())]
        with tf.distribute.MirroredStrategy(names).scope():
            yield


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc; for training on a CPU.

    Otherwise every layer's activations are given back to the system at each step and fetched anew, page by page:
    270 MB a step for ResNet50 on 128 images of 32 px, which cost a fifth of the time.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def normalize_whole_batches(model: Any, device: Device) -> None:
    """Let a Keras model's BatchNorm see whole batches on several devices, as it does on one, and on JAX.

    TensorFlow's replicas would otherwise normalize by their own shares, and of their moving statistics only the
    first one's would be saved.
    """
    import keras

    if device.count > 1 and device.backend == "tensorflow":
        for layer in model.layers:
            if isinstance(layer, keras.Model):
                normalize_whole_batches(layer, device)
            elif isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True


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


def _tensorflow_gpus(deterministic: bool) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and compute capability of each GPU."""
    import tensorflow as tf

    if deterministic:
        tf.config.experimental.enable_op_determinism()
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    return [
        (found.get("device_name", gpu.name), found.get("compute_capability", (0,)))
        for gpu, found in zip(gpus, details, strict=True)
    ]


def _jax_gpus() -> list[tuple[str, tuple[int, ...]]]:
    """Return name and compute capability of each GPU."""
    import jax

    return [
        (gpu.device_kind, tuple(int(part) for part in re.findall(r"^\d+|(?<=\.)\d+", gpu.compute_capability)))
        for gpu in jax.devices()
        if gpu.platform == "gpu"
    ]


def _nvidia_driver() -> str | None:
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", _line(DRIVER, "NVRM version"))
    return found[1] if found else None


def _gpu_memory_bytes() -> int | None:
    """Return the memory of the first GPU that this process may use, by CUDA's own count."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number, size = ctypes.c_int(), ctypes.c_size_t()
    # All three return 0 where they succeed.
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(number), 0):
        return None
    return None if cuda.cuDeviceTotalMem_v2(ctypes.byref(size), number) else size.value


def _gpu_ids() -> list[str]:
    """Return what tells the GPUs that this process may use from all others, or parts of GPUs where they are divided."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:  # AMD's; then all of them are one
        return ["gpu"]
    count, number, ids = ctypes.c_int(), ctypes.c_int(), []
    cuda.cuInit(0)
    cuda.cuDeviceGetCount(ctypes.byref(count))
    for index in range(count.value):
        uuid = (ctypes.c_ubyte * 16)()
        cuda.cuDeviceGet(ctypes.byref(number), index)
        cuda.cuDeviceGetUuid_v2(ctypes.byref(uuid), number)
        ids.append(f"gpu-{bytes(uuid).hex()}")
    return ids


def _cpu_count(backend: str) -> int:
    """Return how many devices the CPU is for the backend: one, unless somebody divided it."""
    if backend == "jax":
        import jax

        return len(jax.devices())
    import tensorflow as tf

    [cpu] = tf.config.list_physical_devices("CPU")
    return len(tf.config.get_logical_device_configuration(cpu) or [cpu])


def _cpu_name() -> str:
    return f"{_line(CPU, 'model name') or 'CPU'}, {os.cpu_count()} cores"


def _line(file: Path, key: str) -> str:
    """Return what stands after ``key:`` in one of Linux's files; empty where there is none, or no such file."""
    try:
        with file.open(encoding="utf-8") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
    except OSError:
        return ""


def gpu_present() -> bool:
    """Tell whether a GPU can be used, without importing a deep-learning library."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/kfd")
