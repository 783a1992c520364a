"""Which engine classifies: what is there, what is offered, what is fastest on this processor."""

from tasks.bundle import Bundle
from tasks.device import gpu_present
from tasks.engines import OPENVINO_PRECISIONS, REFERENCE, supports_bfloat16
from tasks.errors import NightlyError


def choose_engine(bundle: Bundle, engine: str = "auto", precision: str = "auto") -> tuple[str, str]:
    """Return the engine's name and the reason for it in words.

    Raises:
        NightlyError: the engine or precision asked for is not to be had with this bundle.
    """
    kind = engine
    if kind == "auto":
        kind = "keras" if gpu_present() or not bundle.openvino_file.is_file() else "openvino"
        why = "a GPU is present" if gpu_present() else "no GPU is present"
    else:
        why = "as asked"
    if kind == "keras":
        if precision not in ("auto", "float32"):
            raise NightlyError(f"predict.precision {precision} needs engine openvino; engine keras computes in float32")
        return REFERENCE, why
    if precision != "auto":
        name = f"openvino-{precision}"
        evidence = bundle.engines.get(name)
        if evidence and not evidence["offered"]:
            raise NightlyError(
                f"predict.precision {precision} is not offered by this model: it agrees with Keras on "
                f"{evidence['agreement']:.4f} of the validation images only"
            )
        return name, why
    for name in reversed(OPENVINO_PRECISIONS):
        evidence = bundle.engines.get(name)
        if evidence and evidence["offered"] and (name != "openvino-bfloat16" or supports_bfloat16()):
            return (
                name,
                f"{why}, {name} agreed with Keras on {evidence['agreement']:.4f} of the validation images",
            )
    return "openvino-float32", why
