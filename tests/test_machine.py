import numpy as np
import pytest

from tasks.device import Device
from tasks.errors import NightlyError
from tasks.machine import choose, describe
from tasks.recipe import TrainParams

CPU = Device("tensorflow", "cpu", "a CPU", 1)
GPU = Device("tensorflow", "gpu", "a GPU", 1, driver="580.1", memory_bytes=1 << 20, fast_bfloat16=True)
SMALL, LARGE = np.zeros((10, 8, 8, 3), np.uint8), np.zeros((1000, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("device", "precision", "jit", "resident"),
    [
        (CPU, "float32", False, False),
        (Device("tensorflow", "cpu", "with AMX", 1, fast_bfloat16=True), "mixed_bfloat16", False, False),
        (Device("jax", "cpu", "a CPU", 1), "float32", True, False),
        (GPU, "mixed_bfloat16", True, True),
        (Device("jax", "gpu", "an old GPU", 1, memory_bytes=1 << 20), "float32", True, True),
        (Device("jax", "gpu", "of unknown memory", 1, fast_bfloat16=True), "mixed_bfloat16", True, False),
        (Device("tensorflow", "gpu", "two", 2, memory_bytes=1 << 20), "float32", False, False),
        (Device("jax", "gpu", "two", 2, memory_bytes=1 << 20), "float32", True, False),
    ],
)
def test_the_device_chooses_what_the_parameters_leave_open(device, precision, jit, resident):
    machine = choose(TrainParams(), device, SMALL)
    assert (machine.precision, machine.jit_compile, machine.data_on_device) == (precision, jit, resident)
    assert machine.steps_per_execution == 1


def test_images_that_would_crowd_the_devices_memory_stay_in_the_hosts():
    assert choose(TrainParams(), GPU, SMALL).data_on_device
    assert not choose(TrainParams(), GPU, LARGE).data_on_device


def test_every_choice_can_be_overridden():
    params = TrainParams(precision="float32", jit_compile=False, steps_per_execution=5, data_on_device=False)
    machine = choose(params, GPU, SMALL)
    assert vars(machine) == {
        "precision": "float32",
        "jit_compile": False,
        "steps_per_execution": 5,
        "data_on_device": False,
    }
    assert machine.compile_options() == {"jit_compile": False, "steps_per_execution": 5}


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        (
            {"jit_compile": True},
            r"train\.jit_compile must be false.*with 2 devices under TensorFlow.*they are True and 1",
        ),
        ({"steps_per_execution": 4}, r"train\.steps_per_execution 1 with 2 devices.*they are False and 4"),
        ({"data_on_device": True}, r"train\.data_on_device must be false with 2 devices"),
    ],
)
def test_what_several_devices_cannot_do_is_refused(wanted, what):
    with pytest.raises(NightlyError, match=what):
        choose(TrainParams(**wanted), Device("tensorflow", "gpu", "two", 2), SMALL)


def test_the_choices_are_told():
    params = TrainParams(steps_per_execution=4, deterministic=True)
    assert describe(GPU, choose(params, GPU, SMALL), params) == (
        "a GPU (tensorflow, mixed_bfloat16, driver 580.1, compiled by XLA, 4 steps an execution, images on the device, "
        "deterministic)"
    )
    two = Device("jax", "gpu", "a GPU", 2)
    assert describe(two, choose(TrainParams(), two, SMALL), TrainParams()).startswith("2 × a GPU (jax, float32")
