"""Files written whole or not at all, and the one door to HDF5; what is damaged or foreign is a UserError that names it."""

import os

import h5py
import numpy as np
import pytest
from helpers.run_files import flip, place_of

from dllm.errors import UserError
from dllm.files import hdf5, storage


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"

    def write(text_to_write, problem=None):
        with storage.atomic(path) as temporary:
            assert temporary.parent == tmp_path  # where renaming is atomic
            temporary.write_text(text_to_write)
            if problem:
                raise problem

    with pytest.raises(error):
        write("half", error)
    assert list(tmp_path.iterdir()) == []
    write("old")
    with pytest.raises(error):
        write("half of the new", error)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"
    write("new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "new"


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    storage.write_text(path, "old")
    with storage.atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"


def test_json_survives_and_its_errors_name_the_file(tmp_path):
    path = tmp_path / "value.json"
    value = {"text": "宋\n", "number": 1.5, "none": None}
    storage.write_json(path, value)
    assert storage.read_json(path, ["text", "none"]) == value
    with pytest.raises(UserError, match=r"value.json has no 'other'"):
        storage.read_json(path, ["text", "other"])
    path.write_text("{1}")
    with pytest.raises(UserError, match=r"value.json is not valid JSON"):
        storage.read_json(path, [])
    with pytest.raises(UserError, match=r"cannot read .*: it is not a file"):
        storage.read_json(tmp_path, [])


ARRAYS = {"a": np.arange(1000.0), "b": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "none": np.zeros((2, 0))}


def test_arrays_survive_and_a_flipped_bit_in_any_is_found(tmp_path):
    path = tmp_path / "arrays.h5"
    assert hdf5.write_arrays(path, ARRAYS) == storage.sha256(path)

    def read(names=ARRAYS):
        with hdf5.open_arrays(path) as array:
            return {name: array(name, ARRAYS[name].dtype, ARRAYS[name].shape)[:] for name in names}

    for name, found in read().items():
        np.testing.assert_array_equal(found, ARRAYS[name])
    for name in ("a", "b"):
        place = place_of(path, name)
        flip(path, place)
        with pytest.raises(UserError, match=r"cannot read .*arrays.h5"):
            read([name])
        flip(path, place)


def test_large_arrays_have_a_checksum_for_each_mebibyte(tmp_path):
    hdf5.write_arrays(tmp_path / "large.h5", {"large": np.zeros((100_000, 2))})
    with h5py.File(tmp_path / "large.h5") as file:
        assert file["large"].fletcher32
        assert file["large"].chunks == (65536, 2)


def test_damage_in_the_structure_of_a_file_is_a_user_error_or_harmless(tmp_path):
    path = tmp_path / "arrays.h5"
    hdf5.write_arrays(path, {"a": ARRAYS["a"]})
    rng, problems = np.random.default_rng(3), []
    for place in (0, *rng.integers(0, path.stat().st_size, 400)):
        flip(path, place)
        try:
            with hdf5.open_arrays(path) as array:
                array("a", np.float64, (1000,))[:]
        except UserError as error:
            problems.append(str(error))
        flip(path, place)
    assert len(problems) > 100
    assert all(str(path) in problem and "\n" not in problem for problem in problems)


def foreign_files(folder):
    """A file for each way in which 'x' is not a plain dataset of eight float64 in this very file."""
    outside = folder / "outside.h5"
    data = np.arange(8.0)
    with h5py.File(outside, "w") as file:
        file["x"] = data
    (folder / "raw").write_bytes(data.tobytes())

    def virtual(file):
        layout = h5py.VirtualLayout((8,), np.float64)
        layout[:] = h5py.VirtualSource(outside, "x", (8,))
        file.create_virtual_dataset("x", layout)

    def soft(file):
        file["other"] = data
        file["x"] = h5py.SoftLink("/other")

    def huge(file):
        file.create_dataset("x", (1 << 42,), np.float64, chunks=(1 << 10,))

    return {
        "external link": lambda file: file.__setitem__("x", h5py.ExternalLink(str(outside), "x")),
        "dangling external link": lambda file: file.__setitem__("x", h5py.ExternalLink("/dev/zero", "x")),
        "soft link": soft,
        "dangling soft link": lambda file: file.__setitem__("x", h5py.SoftLink("/nowhere")),
        "virtual dataset": virtual,
        "external storage": lambda file: file.create_dataset("x", (8,), np.float64, external=[(folder / "raw", 0, 64)]),
        "group": lambda file: file.create_group("x"),
        "named type": lambda file: file.__setitem__("x", np.dtype(np.float64)),
        "missing": lambda file: None,
        "float32": lambda file: file.__setitem__("x", data.astype(np.float32)),
        "big-endian": lambda file: file.__setitem__("x", data.astype(">f8")),
        "text": lambda file: file.__setitem__("x", "text"),
        "other shape": lambda file: file.__setitem__("x", data.reshape(2, 4)),
        "scalar": lambda file: file.__setitem__("x", 1.0),
        "empty": lambda file: file.__setitem__("x", h5py.Empty(np.float64)),
        "four terabytes": huge,
        "foreign filter": lambda file: file.create_dataset("x", data=data, compression="lzf"),
    }


def test_whatever_is_not_a_plain_dataset_of_the_file_is_refused(tmp_path):
    path = tmp_path / "file.h5"
    for case, make in foreign_files(tmp_path).items():
        with h5py.File(path, "w") as file:
            make(file)
        with hdf5.open_arrays(path) as array, pytest.raises(UserError) as error:
            array("x", np.float64, (8,))
        assert str(error.value).startswith(f"{path}: 'x' "), case
        assert "\n" not in str(error.value)


def test_a_file_that_is_not_hdf5_is_named(tmp_path):
    path = tmp_path / "file.h5"
    path.write_text("text")
    for place in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=f"cannot read {place}"), hdf5.open_arrays(place):
            pass


def test_a_hash_that_does_not_hold_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    storage.check_file(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")  # FIPS 180-4
    with pytest.raises(UserError, match=r"file is damaged"):
        storage.check_file(path, "0" * 64)
    with pytest.raises(UserError, match=r"cannot read .*missing"):
        storage.check_file(tmp_path / "missing", "0" * 64)


@pytest.mark.parametrize(("before", "after"), [(0o022, 0o077), (0o000, 0o077), (0o077, 0o077), (0o177, 0o177)])
def test_what_is_private_is_for_the_owner_only_and_a_stricter_umask_stays(before, after):
    saved = os.umask(before)
    try:
        storage.owner_only()
        assert os.umask(0) == after
    finally:
        os.umask(saved)
