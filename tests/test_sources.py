import hashlib
import io
import json
import tarfile

import numpy as np
import pytest

from tasks.errors import NightlyError
from tasks.sources import CIFAR_RECORD_BYTES, Sample, is_side_file, read_labels, read_samples


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def raw_folder(tmp_path, members, format="folder", mode="w"):
    raw = tmp_path / "raw"
    raw.mkdir()
    write_tar(raw / "images.tar", members, mode)
    (raw / "source.json").write_text(json.dumps({"source": "folder", "format": format, "file": "images.tar"}))
    return raw


def test_labels_are_read_off_class_folders():
    labels = read_labels(["cat/1.jpg", "dog/1.jpg"])
    assert (labels["cat/1.jpg"].class_name, labels["cat/1.jpg"].split) == ("cat", None)
    assert labels["dog/1.jpg"].class_name == "dog"


def test_labels_are_read_off_splits_with_and_without_a_folder_around_them():
    for top in ("", "pets/"):
        labels = read_labels([f"{top}train/cat/1.jpg", f"{top}test/dog/2.jpg"])
        assert labels[f"{top}train/cat/1.jpg"].split == "train"
        assert labels[f"{top}test/dog/2.jpg"].split == "test"
        assert labels[f"{top}test/dog/2.jpg"].class_name == "dog"


def test_a_single_folder_around_class_folders_is_no_class():
    labels = read_labels(["pets/cat/1.jpg", "pets/dog/1.jpg"])
    assert {label.class_name for label in labels.values()} == {"cat", "dog"}


def test_a_source_with_only_a_train_folder_keeps_its_classes():
    labels = read_labels(["train/cat/1.jpg", "train/dog/1.jpg"])
    assert {(label.class_name, label.split) for label in labels.values()} == {("cat", "train"), ("dog", "train")}


@pytest.mark.parametrize("name", ["1.jpg", "cat/persian/1.jpg", "train/cat/x/1.jpg"])
def test_a_file_at_another_depth_is_named(name):
    with pytest.raises(NightlyError, match=name):
        read_labels(["cat/1.jpg", "dog/1.jpg", name])


def test_side_files_are_left_out(tmp_path):
    raw = raw_folder(tmp_path, {"cat/1.jpg": b"a", "cat/Thumbs.db": b"b", "dog/.DS_Store": b"c", "README.txt": b"d"})
    assert [sample.name for sample in read_samples(raw)] == ["cat/1.jpg"]
    assert is_side_file("__MACOSX/cat/1.jpg")
    assert not is_side_file("cat/photo.json.jpg")


def cifar_record(label, seed):
    return bytes([label]) + np.random.default_rng(seed).integers(0, 256, CIFAR_RECORD_BYTES - 1, np.uint8).tobytes()


def test_cifar_planes_become_rgb_pixels_and_names(tmp_path):
    classes = [f"class{number}" for number in range(10)]
    members = {f"cifar-10-batches-bin/data_batch_{number}.bin": cifar_record(number, number) for number in range(1, 6)}
    members["cifar-10-batches-bin/test_batch.bin"] = cifar_record(0, 7) + cifar_record(9, 8)
    members["cifar-10-batches-bin/batches.meta.txt"] = ("\n".join(classes) + "\n").encode()
    samples = list(read_samples(raw_folder(tmp_path, members, "cifar10-binary", "w:gz")))
    assert len(samples) == 7
    assert samples[0].name == "train/class1/data_batch_1_00000"
    assert samples[-1].name == "test/class9/test_batch_00001"
    record = cifar_record(9, 8)
    assert samples[-1].pixels.shape == (32, 32, 3)
    # The record holds 1,024 red values row by row, then green, then blue.
    assert tuple(samples[-1].pixels[1, 2]) == (record[1 + 34], record[1 + 1024 + 34], record[1 + 2048 + 34])


def test_content_hash_is_that_of_the_bytes_or_of_pixels_with_their_shape():
    assert Sample("a", data=b"abc").content_hash == hashlib.sha256(b"abc").hexdigest()
    flat, tall = np.zeros((2, 8, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    assert Sample("a", pixels=flat).content_hash != Sample("a", pixels=tall).content_hash


def test_a_folder_that_is_no_download_says_so(tmp_path):
    with pytest.raises(NightlyError, match="run the download stage first"):
        list(read_samples(tmp_path))
