from pathlib import Path

import pytest
import yaml

from tasks.errors import NightlyError
from tasks.params import Section, read_section
from tasks.prepare import PrepareParams
from tasks.recipe import TrainParams


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return path


def test_a_section_that_is_missing_or_empty_means_its_defaults(tmp_path):
    assert read_section(write(tmp_path, "download: {source: digits}\n"), "train", TrainParams) == TrainParams()
    assert read_section(write(tmp_path, "train:\n"), "train", TrainParams) == TrainParams()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {epoch: 3}", ["unknown key 'train.epoch'", "did you mean 'epochs'?"]),
        ("train: {zzz: 3}", ["unknown key 'train.zzz'", "allowed:", "batch_size"]),
        ("train: {epochs: 0}", ["'train.epochs'", "greater than or equal to 1", "but is 0"]),
        ("train: {epochs: many}", ["'train.epochs'", "valid integer", "'many'"]),
        ("train: {optimizer: adamx}", ["'train.optimizer'", "'adam', 'adamw'", "'adamx'"]),
        ("train: {learning_rate: .nan}", ["'train.learning_rate'", "finite"]),
        ("train: {epochs: 2, warmup_epochs: 3}", ["warmup_epochs must be below epochs (2)"]),
        ("train: [1]", ["'train' must hold 'key: value' lines"]),
        ("train: {epochs: 2", ["not valid YAML"]),
        ("- a\n- b", ["must hold 'section:' keys"]),
    ],
)
def test_a_wrong_value_is_one_line_that_names_key_rule_and_value(tmp_path, text, parts):
    with pytest.raises(NightlyError) as caught:
        read_section(write(tmp_path, text), "train", TrainParams)
    message = str(caught.value)
    assert "\n" not in message
    assert "params.yaml" in message
    for part in parts:
        assert part in message


def test_an_unknown_key_inside_a_nested_group_is_named_with_its_path(tmp_path):
    path = write(tmp_path, "prepare: {decode: {size: 8, resise: crop}}")
    with pytest.raises(NightlyError, match=r"'prepare\.decode\.resise', did you mean 'resize'"):
        read_section(path, "prepare", PrepareParams)


def test_two_mistakes_are_both_named(tmp_path):
    with pytest.raises(NightlyError) as caught:
        read_section(write(tmp_path, "train: {epoch: 3, batch_size: 0}"), "train", TrainParams)
    assert "train.epoch" in str(caught.value)
    assert "train.batch_size" in str(caught.value)


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(NightlyError, match="nightly configure digits"):
        read_section(tmp_path / "params.yaml", "train", TrainParams)


def test_changed_validates_and_leaves_the_original():
    params = TrainParams()
    assert params.changed(epochs=3).epochs == 3
    assert params.epochs != 3
    with pytest.raises(ValueError, match="greater than or equal"):
        params.changed(epochs=0)


def test_parameters_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        TrainParams().epochs = 3


def test_every_preset_is_valid_and_opens_with_command_hardware_and_accuracy():
    from flows.settings import read_settings

    presets = list(Path("presets").glob("*.yaml"))
    assert {path.stem for path in presets} == {
        "cifar10",
        "cifar10-cpu",
        "cifar10-probe",
        "digits",
        "notebook",
        "study",
        "study-quick",
    }
    for path in presets:
        read_settings(path)
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert header[0].startswith(f"# {path.stem}: ")
        text = " ".join(header)
        for word in (f"nightly configure {path.stem}", "Hardware:", "accuracy"):
            assert word in text, f"{path} does not say '{word}'"


def test_the_committed_parameters_are_the_digits_preset():
    assert yaml.safe_load(Path("params.yaml").read_text()) == yaml.safe_load(Path("presets/digits.yaml").read_text())


def test_sections_refuse_unknown_keys_by_default():
    class Small(Section):
        number: int = 1

    with pytest.raises(ValueError, match="Extra inputs"):
        Small(numbr=2)
