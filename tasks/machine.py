"""What is chosen for the device where the parameters leave it open."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.device import Device
from tasks.errors import NightlyError
from tasks.recipe import TrainParams

#: Training images stay in a GPU's memory if they take no more than this share of it.
RESIDENT_SHARE = 0.25


@dataclass(frozen=True)
class Machine:
    """How training runs on this device; the recipe's result depends on ``precision`` alone."""

    precision: str
    jit_compile: bool
    steps_per_execution: int
    data_on_device: bool

    def compile_options(self) -> dict[str, Any]:
        """Return what a Keras model's ``compile`` wants to know of it."""
        return {"jit_compile": self.jit_compile, "steps_per_execution": self.steps_per_execution}


def choose(params: TrainParams, device: Device, images: np.ndarray) -> Machine:
    """Fill in what ``params`` leaves to the device, by what was measured fastest.

    On a CPU bfloat16 pays with AMX alone, and XLA made training half as fast; JAX has nothing but XLA, and
    TensorFlow cannot compile an update under MirroredStrategy with it.
    """
    gpu = device.kind == "gpu"
    mirrored = device.backend == "tensorflow" and device.count > 1
    fits = device.count == 1 and images.nbytes <= RESIDENT_SHARE * (device.memory_bytes or 0)
    chosen = {
        "precision": "mixed_bfloat16" if device.fast_bfloat16 else "float32",
        "jit_compile": (gpu and not mirrored) or device.backend == "jax",
        "steps_per_execution": 1,
        "data_on_device": gpu and fits,
    }
    given = {name: getattr(params, name) for name in chosen}
    machine = Machine(**{name: chosen[name] if value is None else value for name, value in given.items()})
    if mirrored and (machine.jit_compile or machine.steps_per_execution > 1):
        raise NightlyError(
            f"train.jit_compile must be false and train.steps_per_execution 1 with {device.count} devices under "
            f"TensorFlow (JAX can do more), but they are {machine.jit_compile} and {machine.steps_per_execution}"
        )
    if device.count > 1 and machine.data_on_device:
        raise NightlyError(f"train.data_on_device must be false with {device.count} devices, but is true")
    return machine


def describe(device: Device, machine: Machine, params: TrainParams) -> str:
    """Return one line on where and how training runs."""
    where = f"{device.count} × {device.name}" if device.count > 1 else device.name
    words = [device.backend, machine.precision]
    if device.driver:
        words.append(f"driver {device.driver}")
    words.append("compiled by XLA" if machine.jit_compile else "no XLA")
    if machine.steps_per_execution > 1:
        words.append(f"{machine.steps_per_execution} steps an execution")
    words.append("images on the device" if machine.data_on_device else "images in host memory")
    if params.deterministic:
        words.append("deterministic")
    return f"{where} ({', '.join(words)})"
