import pytest

from tasks.bundle import load_bundle
from tasks.choice import choose_engine
from tasks.engines import REFERENCE
from tasks.errors import NightlyError


def test_the_engine_is_chosen_by_evidence(exported, monkeypatch):
    import tasks.choice

    bundle = load_bundle(exported)
    monkeypatch.setattr(tasks.choice, "supports_bfloat16", lambda: True)
    engines = {
        name: {"agreement": 1.0, "max_difference": 0.0, "offered": True}
        for name in ("keras-float32", "openvino-float32", "openvino-bfloat16")
    }
    assert choose_engine(bundle.changed(engines=engines))[0] == "openvino-bfloat16"
    engines["openvino-bfloat16"] = {"agreement": 0.9, "max_difference": 0.3, "offered": False}
    poor = bundle.changed(engines=engines)
    assert choose_engine(poor)[0] == "openvino-float32"
    with pytest.raises(NightlyError, match=r"is not offered by this model: it agrees with Keras on 0\.9000"):
        choose_engine(poor, precision="bfloat16")
    with pytest.raises(NightlyError, match="needs engine openvino"):
        choose_engine(bundle, "keras", "bfloat16")
    monkeypatch.setattr(tasks.choice, "gpu_present", lambda: True)
    assert choose_engine(bundle)[0] == REFERENCE
