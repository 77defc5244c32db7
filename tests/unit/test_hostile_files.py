"""HDF5 files made to harm: each is refused in one line before anything of it is read."""

import json
import os
import shutil
import time

import h5py
import numpy as np
import pytest
from helpers import mutated_files

from dllm.data import corpus
from dllm.errors import UserError
from dllm.files import hdf5, storage
from dllm.runs import checkpoint, run_folder


def virtual(file, name, data, outside):
    layout = h5py.VirtualLayout(data.shape, data.dtype)
    layout[:] = h5py.VirtualSource(outside / "other.h5", name, data.shape)
    file.create_virtual_dataset(name, layout)


def foreign_filter(file, name, data, outside):
    """A filter that no library has: a plugin would be asked for."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk(data.shape)
    plan.set_filter(h5py.h5z.FILTER_FLETCHER32)
    plan.set_filter(32_123, h5py.h5z.FLAG_OPTIONAL)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(data.dtype), h5py.h5s.create_simple(data.shape), plan)


def masked(file, name, data, outside):
    """A chunk whose entry says that its checksum was left out."""
    dataset = file.create_dataset(name, data.shape, data.dtype, chunks=data.shape, fletcher32=True)
    dataset.id.write_direct_chunk((0,) * data.ndim, data.tobytes(), filter_mask=1)


def of_type(dtype):
    return lambda file, name, data, outside: file.create_dataset(name, data.shape, dtype)


def with_options(**options):
    return lambda file, name, data, outside: file.create_dataset(name, data=data, **options)


def empty(shape, **options):
    return lambda file, name, data, outside: file.create_dataset(
        name, shape or data.shape, data.dtype, fletcher32=True, **options
    )


ATTACKS = {  # what is put in a dataset's place: what the message says of it
    "external link": (
        lambda file, name, data, outside: file.__setitem__(name, h5py.ExternalLink(outside / "other.h5", name)),
        "is missing or a link",
    ),
    "external link to a pipe": (
        lambda file, name, data, outside: file.__setitem__(name, h5py.ExternalLink(outside / "pipe", name)),
        "is missing or a link",
    ),
    "soft link": (lambda file, name, data, outside: file.__setitem__(name, h5py.SoftLink("/h")), "is missing or a link"),
    "group": (lambda file, name, data, outside: file.create_group(name), "is not a dataset"),
    "named type": (lambda file, name, data, outside: file.__setitem__(name, data.dtype), "is not a dataset"),
    "external storage": (
        lambda file, name, data, outside: file.create_dataset(
            name, data.shape, data.dtype, external=[(outside / "raw", 0, h5py.h5f.UNLIMITED)]
        ),
        "is stored in another file",
    ),
    "virtual dataset": (virtual, "is stored in another file"),
    "object references": (of_type(h5py.ref_dtype), "is not of numbers"),
    "region references": (of_type(h5py.regionref_dtype), "is not of numbers"),
    "lists": (of_type(h5py.vlen_dtype(np.uint8)), "is not of numbers"),
    "text": (of_type(h5py.string_dtype()), "is not of numbers"),
    "compound": (of_type([("a", "u1"), ("b", "f4")]), "is not of numbers"),
    "array": (of_type(np.dtype(("u1", (4,)))), "is not of numbers"),
    "enumeration": (of_type(bool), "is not of numbers"),
    "opaque": (of_type(np.dtype("V4")), "is not of numbers"),
    "wide numbers": (of_type(">i8"), "is >i8"),
    "four terabytes": (empty((1 << 42,), chunks=(1 << 16,)), "[4398046511104] where"),
    "four terabytes in large chunks": (empty((1 << 42,), chunks=(1 << 28,)), "[4398046511104] where"),
    "a chunk of far more than the data": (
        lambda file, name, data, outside: file.create_dataset(
            name, data.shape, data.dtype, chunks=(1 << 22,) + data.shape[1:], maxshape=(None,) + data.shape[1:], fletcher32=True
        ),
        "has chunks of",
    ),
    "foreign filter": (foreign_filter, "uses a foreign filter"),
    "lzf": (with_options(compression="lzf", fletcher32=True), "uses a foreign filter"),
    "scale-offset": (with_options(scaleoffset=4), "uses a foreign filter"),
    "a bomb of zeros": (with_options(compression="gzip", fletcher32=True), "uses a foreign filter"),
    "no checksum": (with_options(), "has no checksum"),
    "chunks without a checksum": (with_options(chunks=True), "has no checksum"),
    "checksum left out": (masked, "has a chunk without its checksum"),
    "no data": (empty(None), "lacks a chunk"),
}


@pytest.fixture
def outside(tmp_path):
    """A folder with files that no link may lead to: whoever opens the pipe hangs."""
    folder = tmp_path / "outside"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "raw").write_bytes(bytes(1 << 20))
    return folder


@pytest.fixture
def reads(monkeypatch):
    """Names of the datasets that are read while a test runs."""
    seen, read = [], h5py.Dataset.__getitem__
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda self, *place: seen.append(self.name[1:]) or read(self, *place))
    return seen


def refusal(file):
    """The one line that reading all of a file without its hash ends in."""
    with pytest.raises(UserError) as error:
        file.read(check=False)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{file.path}: ")
    return str(error.value)


NAMES = [("shard", "tokens"), *(("rank", name) for name in ("theta", "moment.0", "moment.1", "h", "c", "lane_loss"))]


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_whatever_stands_in_a_datasets_place_is_refused_before_it_is_read(tmp_path, outside, reads, kind, name):
    file = mutated_files.KINDS[kind](tmp_path)
    file.write()
    whole, data = file.path.read_bytes(), file.arrays[name]
    shutil.copy(file.path, outside / "other.h5")
    for found, expected in zip(file.read(check=True), file.expected(), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert name in reads
    for case, (attack, message) in ATTACKS.items():
        file.path.write_bytes(whole)
        with h5py.File(file.path, "r+") as target:
            del target[name]
            attack(target, name, data, outside)
        reads.clear()
        text = refusal(file)
        assert text.startswith(f"{file.path}: '{name}' "), (case, text)
        assert message in text, (case, text)
        assert name not in reads, case


@pytest.mark.parametrize("kind", mutated_files.KINDS)
def test_a_file_with_other_datasets_than_its_own_is_refused(tmp_path, reads, kind):
    file = mutated_files.KINDS[kind](tmp_path)
    file.write()
    reads.clear()  # of the writer, which looks at what it wrote
    count = len(file.arrays)
    name = list(file.arrays)[-1]
    with h5py.File(file.path, "r+") as target:
        target.move(name, "other\nname")
    assert refusal(file) == f"{file.path}: '{name}' is missing"
    with h5py.File(file.path, "r+") as target:
        target.move("other\nname", name)
        for number in range(10_000):
            target.create_dataset(str(number), (1 << 39,), np.float64)
    assert refusal(file) == f"{file.path}: it holds {10_000 + count} datasets where {count} are expected"
    assert not reads


def test_two_names_do_not_share_their_bytes(tmp_path):
    file = mutated_files.Rank(tmp_path)
    file.write()
    with h5py.File(file.path, "r+") as target:
        del target["c"]
        target["c"] = target["h"]
    assert refusal(file) == f"{file.path}: 'c' has a chunk that is another's too"


@pytest.mark.parametrize(
    "link", [h5py.SoftLink("/real"), h5py.ExternalLink("other.h5", "/real"), h5py.ExternalLink("pipe", "/")]
)
def test_a_link_anywhere_in_a_path_is_refused(tmp_path, outside, link):
    data = np.arange(8.0)
    for name in ("file.h5", "other.h5"):
        with hdf5.write_hdf5(outside / name) as target:
            target.create_dataset("real/a/b", data=data, chunks=data.shape, fletcher32=True)
    with h5py.File(outside / "file.h5", "r+") as target:
        target["link"] = link
        target["real/link"] = link
    with hdf5.open_arrays(outside / "file.h5") as array:
        np.testing.assert_array_equal(array("real/a/b", np.float64, (8,)), data)
        for name in ("link", "link/a", "link/a/b", "real/link/a/b", "real/a/b/c", "real//a", "/real", ""):
            with pytest.raises(UserError, match=rf"^{outside}/file.h5: '{name}' is missing or a link$"):
                array(name, np.float64, (8,))


def test_a_number_type_of_other_bits_is_refused(tmp_path):
    """NumPy has no name for it and h5py calls it float64; HDF5 would convert it on the way."""
    path, kind = tmp_path / "file.h5", h5py.h5t.IEEE_F64LE.copy()
    kind.set_ebias(1022)
    with h5py.File(path, "w") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((8,))
        plan.set_fletcher32()
        h5py.h5d.create(file.id, b"x", kind, h5py.h5s.create_simple((8,)), plan)
    with hdf5.open_arrays(path) as array, pytest.raises(UserError, match=r"'x' is .*where float64\[8\] is expected"):
        array("x", np.float64, (8,))


def test_files_of_the_older_format_are_read_and_a_hidden_chunk_is_refused(tmp_path):
    path, data = tmp_path / "file.h5", np.arange(8.0)
    with h5py.File(path, "w", libver="earliest") as file:
        file.create_dataset("x", data=data, chunks=(8,), fletcher32=True)
    with hdf5.open_arrays(path, ["x"]) as array:
        np.testing.assert_array_equal(array("x", np.float64, (8,)), data)
    whole = bytearray(path.read_bytes())
    last = whole.rindex(b"TREE\x01") + 24 + 24 + 8  # the key behind the only chunk: its size, its filters, where it ends
    assert whole[last + 8] == 8
    whole[last + 8 : last + 24] = bytes(16)
    path.write_bytes(whole)
    with hdf5.open_arrays(path, ["x"]) as array, pytest.raises(UserError, match=r"'x' has a chunk that cannot be reached$"):
        array("x", np.float64, (8,))


def test_many_small_chunks_are_refused(tmp_path):
    path = tmp_path / "file.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", (1 << 20,), np.uint8, chunks=(16,), fletcher32=True)
    with hdf5.open_arrays(path) as array, pytest.raises(UserError, match=r"'x' is cut into 65536 chunks$"):
        array("x", np.uint8, (1 << 20,))


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        *(("moments", value, "has moments = ") for value in (-1, 1.0, "2", None, 10**12)),
        ("ranks", 10**30, "has ranks = "),
        ("ranks", 2, "sha256 for each rank"),
        ("sha256", {}, "sha256 for each rank"),
        ("scalars", {"step": 1}, "scalars of a state"),
        ("scalars", dict.fromkeys(mutated_files.State.SCALARS, "x"), "no numbers"),
        *(
            ("scalars", dict.fromkeys(mutated_files.State.SCALARS, 1) | {name: value}, f"has {name} = ")
            for name in ("step", "epoch", "place", "tokens", "stale", "seen", "order", "skipped", "skipped_in_a_row")
            for value in (1.5, -1, 10**300)
        ),
        *(
            ("texts", value, "does not say what the model was trained on")
            for value in ("x", [1], [{"corpus": "/etc"}], [{}] * 1001)
        ),
        ("texts", [], "names no text"),
        ("dtype", "object", "is of 'object'; no checkpoint is"),
        ("dtype", ["float32"], r"is of \['float32'\]; no checkpoint is"),
        ("format", "/etc/passwd" * 1000, "is of format"),
    ],
)
def test_a_manifest_that_no_run_writes_is_refused(tmp_path, name, value, complaint):
    file = mutated_files.Rank(tmp_path)
    file.write()
    path = file.path.parent / "manifest.json"
    manifest = storage.read_json(path, []) | {name: value}
    storage.write_json(path, manifest)
    damaged = "is of format" if name == "format" else "its checksum does not hold"
    with pytest.raises(UserError, match=damaged):
        checkpoint.Checkpoint.open(path.parent)
    storage.write_json(path, manifest | {"seal": checkpoint.seal(manifest)})
    with pytest.raises(UserError, match=complaint) as refusal:
        checkpoint.Checkpoint.open(path.parent)
    assert len(str(refusal.value)) < 300


def shard(**changes):
    return lambda manifest: manifest["splits"]["train"]["shards"][0].update(changes)


def split(**changes):
    return lambda manifest: manifest["splits"]["train"].update(changes)


def both(size):
    """A split of so many tokens, by its manifest alone."""
    return lambda manifest: (split(tokens=size)(manifest), shard(stop=size)(manifest))


MANIFESTS = {  # what is done to the manifest of a corpus: what is said
    "the folder above": (shard(name=".."), "a shard of split 'train' is not described"),
    "an absolute name": (shard(name="/etc/passwd"), "a shard of split 'train' is not described"),
    "a name in another folder": (shard(name="../x.h5"), "a shard of split 'train' is not described"),
    "a name with NUL": (shard(name="a\0b"), "a shard of split 'train' is not described"),
    "a name with escapes": (shard(name="\x1b[2J"), "a shard of split 'train' is not described"),
    "a name that is a list": (shard(name=["x"]), "is not a manifest of dllm.prepare"),
    "no hash": (shard(sha256="x" * 64), "a shard of split 'train' is not described"),
    "false for a start": (shard(start=False), "start of split 'train' is False"),
    "tokens with a point": (split(tokens=70_000.0), "tokens of split 'train' is 70000.0"),
    "negative bytes": (split(bytes=-1), "bytes of split 'train' is -1"),
    "no number of bytes": (split(bytes=float("nan")), "bytes of split 'train' is nan"),
    "tokens beyond numbers": (both(10**30), "tokens of split 'train' is 1000000"),
    "true for a vocabulary": (lambda manifest: manifest.update(vocabulary=True), "its vocabulary is no whole number"),
    "a hundred thousand empty shards": (
        split(shards=[{"name": "x", "start": 0, "stop": 0, "sha256": "0" * 64}] * 100_000),
        "split 'train' does not add up",
    ),
    "more tokens than bytes": (both(1 << 47), "it has [0-9,]+ bytes, what it should hold takes at least 140,737,488,355,328"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_the_manifest_of_a_corpus_that_no_text_has_is_refused(tmp_path, case):
    file = mutated_files.Shard(tmp_path)
    file.write()
    change, says = MANIFESTS[case]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=says) as error:
        corpus.Corpus(tmp_path).verify("train", 0, 10)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("kind", mutated_files.KINDS)
def test_a_sparse_terabyte_is_refused_without_being_read(tmp_path, kind):
    file = mutated_files.KINDS[kind](tmp_path)
    file.write()
    os.truncate(file.path, 1 << 40)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"is damaged: it has 1,099,511,627,776 bytes, what it should hold takes at most"):
        file.read(check=True)
    assert time.monotonic() - begin < 10  # its sha256 would take half an hour


def test_a_checkpoint_of_more_parameters_than_bytes_is_refused_before_memory_is_taken(tmp_path):
    file = mutated_files.Rank(tmp_path)
    file.write()
    path = file.path.parent / "manifest.json"
    manifest = storage.read_json(path, []) | {"parameters": 1 << 48}
    storage.write_json(path, manifest | {"seal": checkpoint.seal(manifest)})
    with pytest.raises(UserError, match="what it should hold takes at least"):
        file.read(check=True)


def test_what_is_not_a_checkpoint_is_not_removed_and_links_are_not_followed(tmp_path):
    file = mutated_files.Rank(tmp_path / "run")
    file.write()
    folder, precious = tmp_path / "run" / "checkpoints", tmp_path / "precious"
    precious.mkdir()
    (precious / "mine").write_text("mine")
    for name in ("step-by-step", "step-1", "step-00000001"):
        (folder / name).mkdir()
    (folder / "step-00000002").symlink_to(precious)
    checkpoint.prune(tmp_path / "run", 1, 0)
    assert {path.name for path in folder.iterdir()} == {"step-00000000", "step-00000002", "step-1", "step-by-step"}
    assert (precious / "mine").read_text() == "mine"


def test_a_run_folder_that_is_a_link_is_not_begun_anew(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "config.toml").write_text("mine")
    (tmp_path / "run").symlink_to(precious)
    with pytest.raises(UserError, match="is not the folder of a run"):
        run_folder.begin_anew(tmp_path / "run")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not the folder of a run"):
        run_folder.begin_anew(tmp_path / "dangling")
    assert (precious / "config.toml").read_text() == "mine"


def test_no_checkpoint_is_written_through_a_link(tmp_path):
    file = mutated_files.Rank(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "run" / "checkpoints" / "step-00000000").symlink_to(tmp_path / "precious")
    with pytest.raises(AssertionError):  # of `write`: it is not whole
        file.write()
    assert list((tmp_path / "precious").iterdir()) == []


def test_a_pipe_or_device_is_not_waited_for(outside):
    (outside / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        message = f"^cannot read {outside}/{name}: it is not a file$"
        with pytest.raises(UserError, match=message), hdf5.open_arrays(outside / name):
            pass
        with pytest.raises(UserError, match=message):
            storage.check_file(outside / name, "0" * 64)
