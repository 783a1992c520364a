import numpy as np
import pytest

from tasks import choice
from tasks.bundle import Limits, load_bundle
from tasks.choice import available, choose_engine, compare, evidence, this_machine
from tasks.engines import REFERENCE
from tasks.errors import NightlyError
from tasks.files import write_json

SPEEDS = {REFERENCE: 10.0, "openvino-float32": 40.0, "openvino-bfloat16": 100.0, "openvino-int8": 90.0}


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A bundle with all engines, all offered, measured on this machine, which has bfloat16 and no GPU."""
    monkeypatch.setattr(choice, "supports_bfloat16", lambda: True)
    monkeypatch.setattr(choice, "gpu_present", lambda: False)
    for name in ("model.keras", "engines/openvino/model.xml", "engines/openvino-int8/model.xml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    facts = {"format": 1, "id": "abc", "created": "", "classes": ["a", "b"], "decode": {}, "normalization": {}}
    facts |= {"parameters": {}, "data_digest": "", "test_digest": "", "libraries": {}, "training": {}}
    write_json(tmp_path / "bundle.json", facts)
    good = {"agreement": 0.9975, "accuracy_lost": 0.0005, "max_difference": 0.1, "offered": True}
    engines = {name: {**good, "images_per_second": speed} for name, speed in SPEEDS.items()}
    return load_bundle(tmp_path).changed(engines=engines, machine=this_machine())


def changed(bundle, name, **facts):
    return bundle.changed(engines={**bundle.engines, name: {**bundle.engines[name], **facts}})


def test_the_fastest_as_measured_on_this_machine(bundle):
    name, why = choose_engine(bundle)
    assert name == "openvino-bfloat16"
    assert why == (
        "no GPU is present; openvino-bfloat16 is the fastest when it was measured on this machine; same label as Keras "
        "on 99.75% of the validation images, 0.05 points of accuracy lost, 100 images/s"
    )
    assert choose_engine(changed(bundle, "openvino-int8", images_per_second=101.0))[0] == "openvino-int8"


def test_the_fastest_as_a_rule_on_another_machine(bundle, monkeypatch):
    elsewhere = bundle.changed(machine={**bundle.machine, "processor": "another"})
    name, why = choose_engine(elsewhere)
    assert name == "openvino-int8"
    assert "the fastest as a rule" in why
    assert choose_engine(changed(elsewhere, "openvino-int8", offered=False))[0] == "openvino-bfloat16"
    monkeypatch.setattr(choice, "supports_bfloat16", lambda: False)
    assert choose_engine(elsewhere)[0] == "openvino-int8"
    assert choose_engine(changed(elsewhere, "openvino-int8", offered=False))[0] == "openvino-float32"


def test_an_engine_whose_file_is_gone_is_not_chosen(bundle):
    bundle = changed(bundle, "openvino-int8", images_per_second=1000.0)
    bundle.engine_file("openvino-int8").unlink()
    assert not available(bundle, "openvino-int8")
    assert choose_engine(bundle)[0] == "openvino-bfloat16"


def test_keras_where_a_gpu_is_or_nothing_else_is_offered(bundle, monkeypatch):
    poor = bundle
    for name in SPEEDS:
        poor = changed(poor, name, offered=name == REFERENCE)
    assert choose_engine(poor) == (REFERENCE, "no OpenVINO engine is offered")
    with pytest.raises(NightlyError, match="engine openvino is not to be had with model abc"):
        choose_engine(poor, "openvino")
    monkeypatch.setattr(choice, "gpu_present", lambda: True)
    assert choose_engine(bundle) == (REFERENCE, "a GPU is present")
    assert choose_engine(bundle, precision="float32")[0] == REFERENCE
    assert choose_engine(bundle, precision="int8")[0] == "openvino-int8"


def test_what_is_asked_for_is_given(bundle):
    name, why = choose_engine(bundle, "openvino", "int8")
    assert name == "openvino-int8"
    assert why.startswith("as asked; same label as Keras on 99.75%")
    assert choose_engine(bundle, "keras")[0] == choose_engine(bundle, "keras", "float32")[0] == REFERENCE
    with pytest.raises(NightlyError, match=r"precision bfloat16 needs engine openvino"):
        choose_engine(bundle, "keras", "bfloat16")


def test_what_is_not_offered_is_refused_with_the_evidence(bundle):
    poor = changed(bundle, "openvino-int8", agreement=0.9812, accuracy_lost=0.0041, offered=False)
    poor.engine_file("openvino-int8").unlink()
    with pytest.raises(NightlyError) as refusal:
        choose_engine(poor, "openvino", "int8")
    assert str(refusal.value) == (
        "predict.precision int8 is not offered by model abc: same label as Keras on 98.12% of the validation images, "
        "0.41 points of accuracy lost, 90 images/s; at least 99.50% must have the same label and at most 0.30 points "
        "may be lost"
    )
    never = poor.changed(engines={name: facts for name, facts in bundle.engines.items() if name != "openvino-int8"})
    with pytest.raises(NightlyError, match="int8 is not to be had with model abc: it was not exported"):
        choose_engine(never, "openvino", "int8")


def test_the_test_split_is_the_evidence_where_it_is_known(bundle):
    tested = changed(bundle, "openvino-int8", test={"agreement": 0.9991, "accuracy_lost": -0.0001})
    assert evidence(tested, "openvino-int8") == (
        "same label as Keras on 99.91% of the test images, no accuracy lost, 90 images/s"
    )


def test_this_machine_has_a_name_and_known_instructions():
    machine = this_machine()
    assert machine["processor"]
    assert machine["cores"] >= 1
    assert set(machine["instructions"]) <= choice.INSTRUCTIONS


# --- the limits


def rows(labels):
    return np.eye(3, dtype=np.float32)[labels] * 0.5 + 0.25


def test_every_figure_of_a_comparison():
    reference, targets = rows([0, 1, 2, 2]), np.array([0, 1, 2, 0])
    assert compare(reference, rows([0, 1, 2, 0]), targets, Limits()) == {
        "accuracy": 1.0,
        "agreement": 0.75,
        "accuracy_lost": -0.25,
        "max_difference": 0.5,
        "passed": False,
    }


@pytest.mark.parametrize(
    ("wrong", "other", "passed"),
    [(0, 0, True), (3, 0, True), (4, 0, False), (3, 2, True), (3, 3, False), (0, 6, False)],
)
def test_an_engine_at_both_limits_passes_and_one_image_beyond_either_does_not(wrong, other, passed):
    """Of a thousand images ``wrong`` lose their right label, ``other`` change from one wrong label to another."""
    targets = np.zeros(1000, int)
    before = np.zeros(1000, int)
    before[500:] = 1
    after = before.copy()
    after[:wrong] = 2
    after[500 : 500 + other] = 2
    assert compare(rows(before), rows(after), targets, Limits())["passed"] is passed
