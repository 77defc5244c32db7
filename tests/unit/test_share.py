"""dllm publish and dllm fetch: what of a folder is published, what is not, and that it comes back as it was."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from helpers.gateway import Gateway, damaged
from helpers.model_folders import TOKENIZER, make
from helpers.mutated_files import Alone, Shard
from helpers.numerics import V, configured

from dllm import share
from dllm.comm.replicas import Domains
from dllm.config import CheckpointConfig, Config, DataConfig
from dllm.data.tokenizer_files import load_tokenizer, tokenizer_hash
from dllm.exchange import formats, hugging_face
from dllm.files import safetensors
from dllm.inference import model_folder
from dllm.inference.loaded_model import LoadedModel
from dllm.model import torch_weights
from dllm.model.layout import Layout
from dllm.runs import checkpoint, run_folder
from dllm.runs.checkpoint_writer import Saver
from dllm.runs.ownership import Ownership
from dllm.runs.provenance import Text
from dllm.runs.state import State


@pytest.fixture(autouse=True)
def _nobody_to_ask(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("DLLM_IPFS", "IPFS_GATEWAY", "DLLM_IPFS_TOKEN"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(autouse=True)
def _mask():
    """--private leaves files to their owner alone; what other tests make is for all."""
    mask = os.umask(0o022)
    yield
    os.umask(mask)


@pytest.fixture
def dllm(capsys):
    """(exit code, last line of standard output, standard error) of a command."""

    def run(*words):
        capsys.readouterr()
        os.umask(0o022)
        code = share.main([str(word) for word in words])
        out, said = capsys.readouterr()
        assert code in (0, 2)
        assert (code == 2) == bool(said)
        assert said.count("\n") == (code == 2)
        return code, out.splitlines()[-1] if out else "", said

    return run


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    Shard(folder).write()
    (folder / "notes.txt").write_text("what else lies there")
    return folder


@pytest.fixture
def model(tmp_path):
    make(tmp_path / "model")
    (tmp_path / "model/secret").write_text("what else lies there")
    return tmp_path / "model"


def make_run(folder, path=""):
    """A run with checkpoints of the steps 1 to 4; the best is that of step 2."""
    settings = Config(model=configured("untied"), data=DataConfig(path=path), checkpoint=CheckpointConfig(keep=9))
    run_folder.create(folder, settings, TOKENIZER)
    claim, layout = Ownership.of_this_job(folder), Layout(settings.model, V, np.float32)
    claim.take()
    facts = checkpoint.facts(layout, 1, tokenizer_hash(TOKENIZER), [Text("")], "")
    saver = Saver(Alone, claim, Domains(0, (0,), ("here",)), layout, facts, settings, print)
    for step in range(1, 5):
        shape = settings.model.layers, 1, settings.model.hidden
        theta = np.full(layout.size, step / 100, np.float32)
        saver.save(State(theta, [], np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(1), step), step == 2, {})
        assert saver.whole
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def there(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_of_each_kind_what_belongs_to_it_comes_back(dllm, corpus, model, run, tmp_path):
    parts = [
        f"checkpoints/step-0000000{step}/{name}" for step in (2, 4) for name in ("manifest.json", "rank-00000-of-00001.h5")
    ]
    wanted = {
        corpus: {"manifest.json", "tokenizer.json", "train-00000.h5"},
        model: {"config.json", "model.safetensors", "dllm_tokenizer.json", "README.md", *hugging_face.FILES},
        run: {"config.toml", "tokenizer.json", *parts},
    }
    for folder, names in wanted.items():
        car, out = tmp_path / f"{folder.name}.car", tmp_path / f"{folder.name}-again"
        code, url, _ = dllm("publish", folder, "--to", car)
        assert code == 0
        assert url.startswith("ipfs://bafy")
        assert dllm("fetch", car, "--out", out)[0] == 0
        assert set(there(out)) == names
        assert there(out).items() <= there(folder).items()
        with Gateway.of({name: folder / name for name in names}) as gateway:
            assert url == f"ipfs://{gateway.root}"
            set_gateway = "--set", f"storage.gateways={gateway.url}"
            assert dllm("fetch", url, "--out", tmp_path / f"{folder.name}-net", *set_gateway)[0] == 0
            assert there(tmp_path / f"{folder.name}-net") == there(out)
            one = sorted(names)[0]
            assert dllm("fetch", f"{url}/{one}", "--out", tmp_path / "one", *set_gateway)[0] == 0
            assert (tmp_path / "one").read_bytes() == (folder / one).read_bytes()
            (tmp_path / "one").unlink()
    assert LoadedModel.open(tmp_path / "run-again").scalars["step"] == 2
    assert LoadedModel.open(tmp_path / "run-again", best=False).scalars["step"] == 4
    assert (LoadedModel.open(tmp_path / "model-again").vector == LoadedModel.open(model).vector).all()


def test_a_model_is_used_by_its_url(run, monkeypatch):
    names = share.published_files(str(run))
    with Gateway.of(names) as gateway:
        monkeypatch.setenv("IPFS_GATEWAY", gateway.url)
        found = LoadedModel.open(f"ipfs://{gateway.root}")
        assert found.scalars["step"] == 2
        assert found.fingerprint == LoadedModel.open(run).fingerprint


def test_the_tokenizer_of_an_url_is_that_of_its_folder(run, model, monkeypatch, tmp_path):
    """Also of a model folder of an older version, which has no tokenizer for other programs."""
    older = shutil.copytree(model, tmp_path / "older")
    (older / "dllm_tokenizer.json").replace(older / "tokenizer.json")
    assert LoadedModel.open(older).fingerprint == LoadedModel.open(model).fingerprint
    for folder in (run, model, older):
        with Gateway.of(share.published_files(str(folder))) as gateway:
            monkeypatch.setenv("IPFS_GATEWAY", gateway.url)
            assert load_tokenizer(f"ipfs://{gateway.root}").to_json() == TOKENIZER.to_json()


def test_what_others_would_run_is_published_where_dllm_wrote_it_only(model, capsys):
    for name in ("modeling_dllm.py", "tokenizer.json"):
        (model / name).write_text((model / name).read_text() + " ")
    names = set(share.published_files(str(model)))
    left = {"config.json", "model.safetensors", "dllm_tokenizer.json", "README.md"}
    assert names == left | {"tokenizer_config.json", "generation_config.json"}
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is not what dllm writes")[0] for line in said] == [
        f"dllm: {model / name}" for name in ("tokenizer.json", "modeling_dllm.py")
    ]


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_files_for_other_programs_are_published_where_dllm_wrote_them_only(model, capsys, tmp_path, weights):
    out, source = tmp_path / "out", LoadedModel.open(model)
    encoded = torch_weights.encode(torch_weights.read_vector(source.layout, source.vector), weights)
    data = safetensors.pack(encoded)
    facts = model_folder.describe(source.settings, TOKENIZER, weights, data) | {"imported": "nothing"}
    also = formats.pack(["keras", "onnx"], formats.Stored(source.settings, TOKENIZER, encoded, weights))
    model_folder.write(out, data, TOKENIZER, facts, also)
    assert {"model.keras", "model.onnx"} <= set(share.published_files(str(out)))
    (out / "model.keras").write_bytes((out / "model.keras").read_bytes() + b" ")
    (out / "encoder.onnx").write_bytes(b"of somebody else")
    capsys.readouterr()
    names = set(share.published_files(str(out)))
    assert "model.onnx" in names
    assert not {"model.keras", "encoder.onnx"} & names
    assert [line.split(" is not what")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"dllm: {out / name}" for name in ("model.keras", "encoder.onnx")
    ]


def test_a_folder_that_names_code_of_others_is_read_but_not_published(model, dllm, tmp_path):
    path = model / "config.json"
    path.write_text(path.read_text().replace('"modeling_dllm.', '"their/repository--modeling.'))
    assert LoadedModel.open(model).config.hidden == 6
    code, _, said = dllm("publish", model, "--to", tmp_path / "x.car")
    assert code == 2
    assert "config.json names code for transformers (auto_map) that is not dllm's: dllm export" in said


def harm(path, what):
    if what == "flip":
        path.write_bytes(damaged(path.read_bytes()))
    elif what == "link":
        shutil.move(path, path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("kind", "name", "what", "why"),
    [
        ("corpus", "train-00000.h5", "flip", "is damaged"),
        ("corpus", "train-00000.h5", "remove", "cannot read"),
        ("corpus", "tokenizer.json", "flip", "tokenizer.json"),
        ("corpus", "manifest.json", "link", "is not a file: only files are published"),
        ("corpus", "manifest.json", "remove", "is not the folder of a run, a model or a corpus"),
        ("model", "model.safetensors", "flip", "model.safetensors"),
        ("model", "dllm_tokenizer.json", "remove", "tokenizer.json has no 'kind'"),
        ("run", "tokenizer.json", "remove", "cannot read"),
    ],
)
def test_what_is_damaged_is_not_published(request, dllm, tmp_path, kind, name, what, why):
    folder = request.getfixturevalue(kind)
    harm(folder / name, what)
    code, _, said = dllm("publish", folder, "--to", tmp_path / "x.car")
    assert code == 2
    assert why in said
    assert not (tmp_path / "x.car").exists()


def test_a_run_without_a_whole_checkpoint_is_not_published(dllm, run, tmp_path):
    for path in run.glob("checkpoints/*/*.h5"):
        path.write_bytes(b"")
    assert "no checkpoint of" in dllm("publish", run, "--to", tmp_path / "x.car")[2]
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint" in dllm("publish", run, "--to", tmp_path / "x.car")[2]


def test_the_one_before_is_published_where_the_newest_checkpoint_is_damaged(run, capsys):
    for path in run.glob("checkpoints/step-00000004/*.h5"):
        path.write_bytes(b"")
    names = share.published_files(str(run))
    assert {pathlib.Path(name).parts[1] for name in names if "/" in name} == {"step-00000002", "step-00000003"}
    assert "trying the one before" in capsys.readouterr().err


def test_private_text_is_published_only_where_that_is_said(dllm, corpus, model, tmp_path):
    private = make_run(tmp_path / "private", "data/site{rank}")
    (corpus / "manifest.json").chmod(0o600)
    (model / "model.safetensors").chmod(0o600)
    for folder, why in (
        (private, "was trained on private text"),
        (corpus, "for its owner only"),
        (model, "for its owner only"),
    ):
        car = tmp_path / f"{folder.name}.car"
        code, _, said = dllm("publish", folder, "--to", car)
        assert (code, why in said, car.exists()) == (2, True, False)
        assert dllm("publish", folder, "--to", car, "--private")[0] == 0
        assert car.stat().st_mode & 0o077 == 0


def test_what_is_there_stays_and_what_nobody_can_do_is_said(dllm, corpus, model, tmp_path):
    (tmp_path / "there.car").write_bytes(b"x")
    cases = [
        (("publish", corpus, "--to", tmp_path / "there.car"), "exists"),
        (("publish", corpus, "--to", "elsewhere"), "elsewhere is none of ipfs"),
        (("publish", corpus), "there is no node of IPFS"),
        (("publish", corpus, "--set", "storage.ipfs=http://127.0.0.1:1"), "Connection refused"),
        (("publish", corpus, "--set", "storage.ipfs=http://10.0.0.1:1"), "can be reached by others"),
        (("publish", corpus, "--set", "train.lr=1"), "only storage.KEY=VALUE"),
        (("publish", tmp_path), "is not the folder of a run, a model or a corpus"),
        (("publish",), "required: FOLDER"),
        (("fetch", tmp_path / "there.car", "--out", model), "exists"),
        (("fetch", tmp_path / "there.car", "--out", tmp_path / "new"), "is not a CAR file"),
        (("fetch", tmp_path / "no.car", "--out", tmp_path / "new"), "cannot read"),
        (("fetch", "http://127.0.0.1/x", "--out", tmp_path / "new"), "is no URL"),
        (("fetch", corpus, "--out", tmp_path / "new"), "is no URL"),
        (("fetch", "ipfs://bafy", "--out", tmp_path / "new"), "is not a CID"),
        (("fetch", "ipfs://bafy"), "required: --out"),
        (("sell", corpus), "it is one of publish, fetch"),
        ((), "it is one of publish, fetch"),
    ]
    for words, why in cases:
        code, _, said = dllm(*words)
        assert code == 2, words
        assert why in said
    assert (tmp_path / "there.car").read_bytes() == b"x"
    assert not (tmp_path / "new").exists()


def test_a_fetch_that_fails_leaves_nothing(dllm, corpus, tmp_path):
    with Gateway.of(share.published_files(str(corpus))) as gateway:
        largest = max(gateway.blocks, key=lambda name: len(gateway.blocks[name]))
        del gateway.blocks[largest]
        before = sorted(tmp_path.iterdir())
        gateways = "--set", f"storage.gateways={gateway.url}"
        assert f"no block {largest}" in dllm("fetch", f"ipfs://{gateway.root}", "--out", tmp_path / "deep/new", *gateways)[2]
        assert list((tmp_path / "deep").rglob("*")) == []
        assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "deep"])


def test_long_work_says_how_far_it_is(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dllm.remote.progress.EVERY", 0.0)
    assert share.main(["publish", str(corpus), "--to", str(tmp_path / "x.car")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("dllm: writing ") and line.endswith(" MB") for line in lines)


def test_the_manifest_of_a_corpus_names_nothing_outside_of_it(dllm, corpus, tmp_path):
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["name"] = "../secret.h5"
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    assert "is not described" in dllm("publish", corpus, "--to", tmp_path / "x.car")[2]
