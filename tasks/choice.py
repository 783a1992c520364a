"""Which engine classifies: how far each is from Keras in float32, and which is the fastest on this processor."""

import os
import platform
from typing import Any

import numpy as np

from tasks import metrics
from tasks.bundle import Bundle, Limits
from tasks.device import CPU, gpu_present
from tasks.engines import OPENVINO_ENGINES, REFERENCE, supports_bfloat16
from tasks.errors import NightlyError

#: Instruction sets that decide how fast a precision is.
INSTRUCTIONS = {
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("asimddp", "bf16", "i8mm", "sve"),
}


def compare(reference: np.ndarray, found: np.ndarray, targets: np.ndarray, limits: Limits) -> dict[str, Any]:
    """Return how far an engine is from Keras in float32 on the same images, as JSON values.

    ``agreement`` is the share of images with the same label, ``accuracy_lost`` negative where the engine is the better
    one, ``max_difference`` that of two probabilities, and ``passed`` says whether the first two are within the limits.

    Args:
        reference: the probabilities (N, C) of Keras in float32.
        found: the engine's.
        targets: class indexes (N,).
    """
    accuracy = metrics.accuracy(targets, metrics.predicted_labels(found))
    # Rounded, because 0.95 - 0.947 is a little more than 0.003 in binary.
    lost = round(metrics.accuracy(targets, metrics.predicted_labels(reference)) - accuracy, 9)
    share = metrics.agreement(reference, found)
    return {
        "accuracy": round(accuracy, 6),
        "agreement": round(share, 6),
        "accuracy_lost": round(lost, 6),
        "max_difference": float(f"{metrics.max_difference(reference, found):.2g}"),
        "passed": share >= limits.minimum_agreement and lost <= limits.maximum_loss,
    }


def choose_engine(bundle: Bundle, engine: str = "auto", precision: str = "auto") -> tuple[str, str]:
    """Return the engine's name and, in words, the reason for it with its evidence.

    Args:
        engine: ``keras``, ``openvino``, or ``auto``: Keras where a GPU is present, else OpenVINO.
        precision: ``float32``, ``bfloat16``, ``int8``, or ``auto``: the fastest that is offered. It is the one measured
            fastest if that was on such a machine as this, else the last one of ``OPENVINO_ENGINES``.

    Raises:
        NightlyError: the engine or precision asked for is not to be had with this bundle.
    """
    usable = [name for name in OPENVINO_ENGINES if offered(bundle, name) and available(bundle, name)]
    why = "as asked"
    if engine == "auto" and precision in ("bfloat16", "int8"):
        engine = "openvino"
    elif engine == "auto":
        engine, why = _kind(usable)
    if engine == "keras":
        if precision not in ("auto", "float32"):
            raise NightlyError(f"predict.precision {precision} needs engine openvino; engine keras computes in float32")
        return REFERENCE, why
    if precision != "auto":
        name = f"openvino-{precision}"
        _check(bundle, name)
        return name, f"{why}; {evidence(bundle, name)}"
    if not usable:
        raise NightlyError(f"predict.engine openvino is not to be had with model {bundle.id}: use keras")
    if bundle.machine == this_machine():
        name = max(usable, key=lambda name: bundle.engines[name]["images_per_second"])
        ground = "the fastest when it was measured on this machine"
    else:
        name, ground = usable[-1], "the fastest as a rule, its speed was measured on another machine"
    return name, f"{why}; {name} is {ground}; {evidence(bundle, name)}"


def _kind(usable: list[str]) -> tuple[str, str]:
    if gpu_present():
        return "keras", "a GPU is present"
    if not usable:
        return "keras", "no OpenVINO engine is offered"
    return "openvino", "no GPU is present"


def _check(bundle: Bundle, name: str) -> None:
    precision = name.removeprefix("openvino-")
    if name in bundle.engines and not offered(bundle, name):
        agreement, loss = bundle.limits.minimum_agreement, bundle.limits.maximum_loss * 100
        raise NightlyError(
            f"predict.precision {precision} is not offered by model {bundle.id}: {evidence(bundle, name)}; at least "
            f"{agreement:.2%} must have the same label and at most {loss:.2f} points may be lost"
        )
    if not bundle.engine_file(name).is_file():
        raise NightlyError(
            f"predict.precision {precision} is not to be had with model {bundle.id}: it was not exported"
        )


def offered(bundle: Bundle, name: str) -> bool:
    """Tell whether an engine agreed well enough wherever it was compared."""
    return bool(bundle.engines.get(name, {}).get("offered"))


def available(bundle: Bundle, name: str) -> bool:
    """Tell whether the bundle holds an OpenVINO engine and this processor runs it."""
    return bundle.engine_file(name).is_file() and (name != "openvino-bfloat16" or supports_bfloat16())


def evidence(bundle: Bundle, name: str) -> str:
    """Return in words what speaks for or against an engine; what was found on the test split where it is known."""
    facts = bundle.engines.get(name)
    if facts is None:
        return "it was never compared with Keras"
    split = "test" if "test" in facts else "validation"
    found = {**facts, **facts.get("test", {})}
    words = [f"same label as Keras on {found['agreement']:.2%} of the {split} images"]
    if "accuracy_lost" in found:
        lost = found["accuracy_lost"] * 100
        words.append(f"{lost:.2f} points of accuracy lost" if lost > 0 else "no accuracy lost")
    if "images_per_second" in found:
        words.append(f"{found['images_per_second']:,.0f} images/s")
    return ", ".join(words)


def this_machine() -> dict[str, Any]:
    """Return what an engine's speed depends on: the processor's name, its cores, its instruction sets."""
    facts = _first_processor()
    instructions = INSTRUCTIONS & set(f"{facts.get('flags', '')} {facts.get('Features', '')}".split())
    return {
        "processor": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": sorted(instructions),
    }


def _first_processor() -> dict[str, str]:
    """Return what Linux says of the first processor; nothing on another system."""
    if not CPU.is_file():
        return {}
    lines = CPU.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
