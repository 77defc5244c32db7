"""Files of Keras that are damaged, that lie or are made to harm: refused in one line, before much is read."""

import copy
import json
import os
import struct
import time
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
from helpers import keras_files
from helpers.keras_files import archive, hdf5, imdb, imdb_arrays, sequential
from helpers.mutated_files import mutate

from dllm.errors import UserError
from dllm.files.plain_hdf5 import PlainHdf5

TABLE, KERNEL = "layers/embedding/vars/0", "layers/bidirectional/forward_layer/cell/vars/0"
MUTATIONS = int(os.environ.get("DLLM_MUTATIONS", "150"))  # of each file


def instead(name, function):
    """Put something else at a path of an HDF5 file; function(group, name within it, what was there)."""

    def change(file):
        group, _, last = name.rpartition("/")
        before = file[name][()]
        del file[name]
        function(file[group], last, before)

    return change


def another_file(group, name, array):
    group.create_dataset(name, array.shape, "f4", external=[("/etc/passwd", 0, array.nbytes)])


def huge(group, name, array):
    group.create_dataset(name, (1 << 40, 1 << 20), "f4")


def virtual(group, name, array):
    layout = h5py.VirtualLayout(array.shape, "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", array.shape)
    group.create_virtual_dataset(name, layout)


HDF5 = {
    "a soft link": (instead(TABLE, lambda g, n, a: g.__setitem__(n, h5py.SoftLink("/vars"))), "is a link"),
    "another file": (instead(TABLE, lambda g, n, a: g.__setitem__(n, h5py.ExternalLink("x.h5", "/x"))), "no group that"),
    "a group that is a link": (
        lambda file: (file.move("layers/embedding", "there"), file.__setitem__("layers/embedding", h5py.SoftLink("/there"))),
        "is a link",
    ),
    "data elsewhere": (instead(TABLE, another_file), "stored in another file"),
    "virtual": (instead(TABLE, virtual), "stored"),
    "compressed": (instead(TABLE, lambda g, n, a: g.create_dataset(n, data=a, compression="gzip")), "compressed"),
    "in chunks": (instead(TABLE, lambda g, n, a: g.create_dataset(n, data=a, chunks=(1, 1))), "in chunks"),
    "whole numbers": (instead(TABLE, lambda g, n, a: g.__setitem__(n, a.astype("i4"))), "is not of float"),
    "big endian": (instead(TABLE, lambda g, n, a: g.__setitem__(n, a.astype(">f4"))), "is not of float"),
    "text": (instead(TABLE, lambda g, n, a: g.__setitem__(n, "weights")), "is not of float"),
    "references": (instead(TABLE, lambda g, n, a: g.create_dataset(n, (12, 8), h5py.ref_dtype)), "is not of float"),
    "shared type": (
        lambda file: (file.__setitem__("type", np.dtype("f4")), instead(TABLE, lambda g, n, a: g.create_dataset(
            n, data=a, dtype=file["type"]))(file)), "shares a datatype",
    ),
    "never written": (instead(TABLE, huge), "has no .* bytes for"),
    "no numbers": (instead(TABLE, lambda g, n, a: g.create_dataset(n, (0, 8), "f4")), "has no 0 bytes for"),
    "no array": (instead(TABLE, lambda g, n, a: g.create_group(n)), "is no array"),
    "a number": (instead(TABLE, lambda g, n, a: g.__setitem__(n, np.float32(1))), r"is \[\]"),
    "not finite": (instead(TABLE, lambda g, n, a: g.__setitem__(n, a.astype("f8") * 1e300)), "not finite"),
    "one array twice": (
        lambda file: file.__delitem__(KERNEL) or file.__setitem__(KERNEL, file[KERNEL.replace("forward", "backward")]),
        "is another's too",
    ),
    "no bias and no kernel": (lambda file: file.__delitem__(KERNEL), "has 2 arrays"),
    "one more": (lambda file: file.__setitem__(KERNEL[:-1] + "3", np.ones(3, "f4")), "has 4 arrays"),
    "other shape": (instead(KERNEL, lambda g, n, a: g.__setitem__(n, a[:-1])), "by the others they are"),
    "no layers": (lambda file: file.__delitem__("layers"), "has no|is no .weights.h5"),
}  # fmt: skip


@pytest.mark.parametrize("end", ["keras", "weights.h5"])
@pytest.mark.parametrize("what", HDF5)
def test_weights_that_are_other_than_plain_arrays_are_refused(what, end, tmp_path):
    change, says = HDF5[what]
    data, path = hdf5(imdb_arrays(), change), tmp_path / f"model.{end}"
    path.write_bytes(archive(sequential(imdb()), data) if end == "keras" else data)
    with pytest.raises(UserError, match=says):
        finite(keras_files.read(path))


def finite(found):
    """As the command looks at what was read."""
    if not all(np.isfinite(tensor).all() for tensor in found.tensors.values()):
        raise UserError("not finite")


@pytest.mark.parametrize("options", [{"libver": "latest"}, {"libver": ("v110", "v110")}, {"track_order": True}])
def test_newer_formats_of_hdf5_are_refused(options, tmp_path):
    (tmp_path / "model.weights.h5").write_bytes(hdf5(imdb_arrays(), **options))
    with pytest.raises(UserError, match="of another version than Keras and h5py write"):
        keras_files.read(tmp_path / "model.weights.h5")


def test_the_older_format_of_keras_is_named(tmp_path):
    (tmp_path / "model.h5").write_bytes(hdf5({"model_weights/dense/kernel:0": np.ones((2, 2), "f4")}))
    with pytest.raises(UserError, match="Keras's older format: save the model as"):
        keras_files.read(tmp_path / "model.h5")


def test_what_is_read_is_what_h5py_reads():
    """Groups of many members, so that the tree has several leaves; every type of floating-point number."""
    rng = np.random.default_rng(7)
    arrays = {f"layers/g_{n}/vars/0": rng.standard_normal((n % 5 + 1, 3)).astype(f"f{2 << n % 3}") for n in range(500)}
    file = PlainHdf5(hdf5(arrays), "x")
    assert file.names("layers") == sorted(f"g_{n}" for n in range(500))
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(file.dataset(name)), array.astype("f4"))


def zipped(change):
    """A .keras whose members another hand has put there: change(ZipFile, config.json, model.weights.h5)."""

    def make(path):
        with zipfile.ZipFile(path, "w") as members:
            change(members, json.dumps(sequential(imdb())), hdf5(imdb_arrays()))

    return make


def flagged(path):
    """Encrypted, as the list of members says."""
    data = bytearray(archive(sequential(imdb()), hdf5(imdb_arrays())))
    for place in range(len(data)):
        if data[place : place + 4] == b"PK\x01\x02":
            data[place + 8] |= 1
    path.write_bytes(data)


def listed(path):
    """A list of members of a million entries, which is not there."""
    data = bytearray(archive(sequential(imdb()), hdf5(imdb_arrays())))
    end = data.rindex(b"PK\x05\x06")
    struct.pack_into("<HHII", data, end + 8, 65535, 65535, len(data) - 100, 0)
    path.write_bytes(data)


def larger(path):
    """Weights that are larger than the file, as the list says."""
    data = bytearray(archive(sequential(imdb()), hdf5(imdb_arrays())))
    place = data.rindex(b"model.weights.h5") - 46
    struct.pack_into("<II", data, place + 20, 1 << 31, 1 << 31)
    path.write_bytes(data)


DEFLATED = zipfile.ZIP_DEFLATED
ZIPS = {
    "no zip": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(1000)), "cannot read .*not a zip"),
    "empty": (lambda path: path.write_bytes(b""), "cannot read .*not a zip"),
    "no config": (zipped(lambda z, c, w: z.writestr("model.weights.h5", w)), "has no config.json"),
    "no weights": (zipped(lambda z, c, w: z.writestr("config.json", c)), "has no model.weights.h5"),
    "numpy's": (zipped(lambda z, c, w: (z.writestr("config.json", c), z.writestr("model.weights.npz", w))), "has no model.w"),
    "a bomb of weights": (
        zipped(lambda z, c, w: (z.writestr("config.json", c), z.writestr("model.weights.h5", bytes(1 << 27), DEFLATED))),
        "is compressed",
    ),
    "a bomb of settings": (
        zipped(lambda z, c, w: (z.writestr("config.json", " " * (1 << 27), DEFLATED), z.writestr("model.weights.h5", w))),
        "config.json has 134,217,728 bytes",
    ),
    "another compression": (
        zipped(lambda z, c, w: (z.writestr("config.json", c, zipfile.ZIP_LZMA), z.writestr("model.weights.h5", w))),
        "not known here",
    ),
    "encrypted": (flagged, "encrypted"),
    "a long list": (listed, "cannot read"),
    "larger than it is": (larger, "cannot read"),
    "no JSON": (lambda path: path.write_bytes(archive(b"{", hdf5({}))), "not valid JSON"),
    "deep JSON": (lambda path: path.write_bytes(archive(b"[" * 200_000, hdf5({}))), "not valid JSON|too much"),
    "a list": (lambda path: path.write_bytes(archive(b"[]", hdf5({}))), "is none of Keras"),
    "a million layers": (
        lambda path: path.write_bytes(archive(sequential(imdb()[:1] * 9000), hdf5({}))), "is none of Keras|too large",
    ),
    "a folder": (lambda path: path.mkdir(), "it is not a file"),
}  # fmt: skip


@pytest.mark.parametrize("what", ZIPS)
def test_archives_that_lie_are_refused_before_much_is_read(what, tmp_path):
    make, says = ZIPS[what]
    make(tmp_path / "model.keras")
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=says):
            keras_files.read(tmp_path / "model.keras")
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("end", ["keras", "weights.h5"])
def test_mutated_files_are_refused_or_of_the_right_shapes(end, tmp_path):
    """No other exception, and no long wait. Of a .keras what is read is right, since each member has a CRC."""
    weights, path = hdf5(imdb_arrays()), tmp_path / f"model.{end}"
    whole = archive(sequential(imdb()), weights) if end == "keras" else weights
    path.write_bytes(whole)
    right, refused = keras_files.read(path), 0
    for seed in range(MUTATIONS):
        what, data = mutate(whole, seed)
        path.write_bytes(data)
        begin = time.monotonic()
        try:
            found = keras_files.read(path)
        except UserError:
            refused += 1
            continue
        finally:
            assert time.monotonic() - begin < 20
        assert found.settings == right.settings
        for name, tensor in right.tensors.items():
            assert found.tensors[name].shape == tensor.shape
            assert end == "weights.h5" or np.array_equal(found.tensors[name], tensor), (seed, what)
    assert refused > 0


JUNK = (None, True, -1, 10**400, 1.5, "x", "\n", [], {}, [[[]]], {"class_name": "__keras_tensor__"}, {"config": 3})


def places(value, path=()):
    """The path of each value of a JSON value."""
    yield path
    for key, one in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(one, (*path, key))


def functional():
    """Keras's example as a Functional model."""
    layers, before = imdb(), None
    for one in layers:
        name = one["config"]["name"]
        told = {"shape": [None, None], "dtype": "float32", "keras_history": [before, 0, 0]}
        call = {"args": [{"class_name": "__keras_tensor__", "config": told}], "kwargs": {"mask": None}}
        one |= {"name": name, "inbound_nodes": [call] if before else []}
        before = name
    config = {"layers": layers, "input_layers": ["input_layer", 0, 0], "output_layers": [[before, 0, 0]]}
    module = "keras.src.models.functional"
    return {"module": module, "class_name": "Functional", "config": config, "registered_name": "Functional"}


@pytest.mark.parametrize("made", [functional, lambda: sequential(imdb())], ids=["functional", "sequential"])
def test_settings_of_any_kind_are_refused_or_change_nothing(made, tmp_path):
    described, weights, path, rng = made(), hdf5(imdb_arrays()), tmp_path / "model.keras", np.random.default_rng(8)
    path.write_bytes(archive(described, weights))
    right, refused = keras_files.read(path), 0
    for place in [*places(described)][1:]:
        changed = copy.deepcopy(described)
        here = changed
        for key in place[:-1]:
            here = here[key]
        here[place[-1]] = JUNK[rng.integers(len(JUNK))]
        path.write_bytes(archive(changed, weights))
        try:
            found = keras_files.read(path)
        except UserError:
            refused += 1
        else:
            assert found.settings.model == right.settings.model, (place, here[place[-1]])
            assert found.tensors.keys() == right.tensors.keys()
    assert refused > 50


def wired(change):
    described = functional()
    change(described["config"]["layers"], described["config"])
    return described


def reads(layers, place, name):
    layers[place]["inbound_nodes"][0]["args"][0]["config"]["keras_history"] = [name, 0, 0]


GRAPHS = {
    "a circle": (lambda layers, config: reads(layers, 2, "bidirectional_1"), "no chain|several"),
    "itself": (lambda layers, config: reads(layers, 2, "bidirectional"), "no chain|several"),
    "two readers": (lambda layers, config: reads(layers, 4, "bidirectional"), "no chain|several"),
    "what is not there": (lambda layers, config: reads(layers, 2, "gone"), "reads what is no layer"),
    "twice": (lambda layers, config: layers[3]["inbound_nodes"].append(layers[3]["inbound_nodes"][0]), "more than once"),
    "two at once": (lambda layers, config: layers[3]["inbound_nodes"][0]["args"].append(
        layers[2]["inbound_nodes"][0]["args"][0]), "reads 2 others"),
    "in training": (lambda layers, config: layers[3]["inbound_nodes"][0]["kwargs"].update(training=True), "with training"),
    "a state": (lambda layers, config: layers[3]["inbound_nodes"][0]["kwargs"].update(initial_state=[1]), "initial_state"),
    "a mask of its own": (lambda layers, config: layers[3]["inbound_nodes"][0]["kwargs"].update(
        mask=layers[1]["inbound_nodes"][0]["args"][0]), "a mask that is not Keras's own"),
    "another output": (lambda layers, config: config.update(output_layers=["bidirectional", 0, 0]), "other than what its last"),
    "two outputs": (lambda layers, config: config.update(output_layers=[["dense", 0, 0], ["dense", 0, 0]]), "other than what"),
}  # fmt: skip


@pytest.mark.parametrize("what", GRAPHS)
def test_what_is_no_chain_of_layers_is_refused(what, tmp_path):
    change, says = GRAPHS[what]
    (tmp_path / "model.keras").write_bytes(archive(wired(change), hdf5(imdb_arrays())))
    with pytest.raises(UserError, match=says):
        keras_files.read(tmp_path / "model.keras")
