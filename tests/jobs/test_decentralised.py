"""Whole runs of every averaging method: near Allreduce's loss, resumed to the bit, by other numbers of ranks from the mean."""

import json
import re

import numpy as np
import pytest
from helpers.launch import complaint, mpirun, train_arguments
from helpers.run_files import arrays, checkpoints, column, metrics
from helpers.several_commands import run_several

from dllm.data.corpus import Corpus

STEPS, RANKS = 40, 3
COMMON = (
    "train.precision=fp64", "train.optimizer=sgd", "train.lr=0.5",
    "train.momentum=0.0", f"train.max_steps={STEPS}", "train.eval_every=20",
    "checkpoint.every_steps=20", "log.sample=0", "model.dropout=0.2", "train.threads=1", "averaging.bucket_mb=0.004",
)  # fmt: skip
METHODS = {  # clip=0 where runs are compared: a rank's own gradient is longer than the mean, and is clipped sooner
    "allreduce": ("train.clip=0",),
    "dpsgd": (), "dpsgd-atc": ("averaging.topology=ring", "train.momentum=0.5"), "sgp": ("averaging.topology=star",),
    "gradient-tracking": (), "exact-diffusion": (), "qg-momentum": ("averaging.momentum=0.5",), "relaysum": (),
    "local-sgd 1": ("train.clip=0",), "dpsgd-atc complete": ("averaging.topology=complete", "train.clip=0"),
    "dpsgd-atc hierarchical": ("averaging.hierarchical=true", "train.clip=0"),
    "local-sgd": ("averaging.period=5",), "diloco": ("averaging.period=8", "averaging.outer_lr=1.0", "averaging.momentum=0.1"),
    "choco": ("averaging.compression=sign",), "choco top-k": ("averaging.compression=top-k", "averaging.fraction=0.2"),
    **{f"allreduce {kind}": (f"averaging.compression={kind}", "averaging.fraction=0.2") for kind in
       ("powersgd", "sign", "top-k", "random-k", "qsgd", "bf16")},
    "allreduce signum": ("averaging.compression=signum", "train.lr=0.003", "train.clip=0"),
    "allreduce own": ("train.clip_by=own", "train.clip=1e9"),
}  # fmt: skip
MOVING = ("async-gossip", "averaging.period=10")  # its runs are never the same twice
UNEVEN = 25  # steps on text that is dealt out unevenly
ALONE = ("local-sgd", "diloco", MOVING[0])  # do not send in every step


@pytest.fixture(scope="module")
def folder(prepare, text, tmp_path_factory):
    """Runs NAME, NAME-2 with a break in the middle, NAME-3 on uneven private text. All in one start of the ranks."""
    folder = tmp_path_factory.mktemp("methods")
    tiny = prepare("char", train=text[:200_000], valid=text[-4000:])  # of a long one most of the time would be measuring
    (folder / "text").write_bytes(text[:60_000])
    (folder / "valid").write_bytes(text[56_000:60_000])
    deal = "--deal", "dirichlet", "--alpha", "0.5", "--seed", "3", "--out", folder / "part{rank}"
    texts = "--train", folder / "text", "--valid", folder / "valid"
    mpirun(RANKS, "-m", "dllm.prepare", *texts, "--tokenizer", "char", *deal, check=True)
    commands = []
    for name, settings in (*METHODS.items(), (MOVING[0], MOVING[1:])):
        settings = (*COMMON, f"averaging.method={name.split()[0]}", *settings)
        whole, broken = (train_arguments(tiny, folder / f"{name}{end}", *settings)[1:] for end in ("", "-2"))
        resume = ["dllm.train", "--resume", folder / f"{name}-2", "--progress", "none"]
        commands += [whole, [*broken, "--max-steps", "20"], resume]
        uneven = train_arguments(folder / "part{rank}", folder / f"{name}-3", *settings, f"train.max_steps={UNEVEN}")
        commands.append(uneven[1:])
    done = run_several(folder / "out", RANKS, commands, timeout=200, check=True)
    assert {end.text for end in done} == {""}
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_a_run_with_a_break_is_the_run_without_to_the_bit(folder, name):
    whole, broken = folder / name, folder / f"{name}-2"
    assert checkpoints(whole) == checkpoints(broken) == [20, STEPS]
    for step in (20, STEPS):
        (one, scalars), (other, others) = arrays(whole, step), arrays(broken, step)
        assert set(one) == set(other)
        assert ("own.theta" in one) == (not name.startswith("allreduce"))
        assert not [array for array in one if not np.array_equal(one[array], other[array])]
        assert scalars == others
    assert metrics(whole) == metrics(broken)


@pytest.mark.parametrize("name", ["allreduce own", "local-sgd 1", "dpsgd-atc complete", "dpsgd-atc hierarchical"])
def test_what_is_allreduce_in_theory_is_so_in_a_run(folder, name):
    for split in ("train", "valid"):
        ours, theirs = (column(metrics(folder / run, split), "loss") for run in (name, "allreduce"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-11)


@pytest.mark.parametrize("name", [*METHODS, MOVING[0]])
def test_every_method_comes_near_the_loss_of_allreduce(folder, name):
    first, last = metrics(folder / name, "valid")
    assert last["loss"] < first["loss"]
    assert last["loss"] < 1.1 * metrics(folder / "allreduce", "valid")[-1]["loss"]
    if name.startswith("allreduce"):
        assert "own_loss" not in last
        assert len(set(column(metrics(folder / name, "train"), "parameters"))) == STEPS
    else:
        assert last["own_loss"] == pytest.approx(last["loss"], rel=0.1)
        assert 0 <= last["consensus_distance"] < 0.5
    sent = np.array(column(metrics(folder / name, "train"), "bytes_sent"))
    assert sent.any() if name in ALONE else sent.all()


@pytest.mark.parametrize("name", [*METHODS, MOVING[0]])
def test_every_method_learns_from_uneven_private_text(folder, name):
    sizes = [Corpus(folder / f"part{rank}").split("train")["tokens"] for rank in range(RANKS)]
    assert max(sizes) > 3 * min(sizes)
    assert metrics(folder / f"{name}-3", "valid")[-1]["loss"] < 0.95 * metrics(folder / f"{name}-3", "train")[0]["loss"]


@pytest.mark.parametrize(("name", "pairs"), [("dpsgd", 6), ("sgp", 4), ("choco", 6), ("local-sgd", 0), ("allreduce", 0)])
def test_a_line_of_metrics_tells_how_long_each_neighbour_takes_to_answer(folder, name, pairs):
    for line in (folder / name / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line).get("neighbour_seconds", {})
        assert len(found) == (0 if "split" in line else pairs)
        for pair, seconds in found.items():
            assert re.fullmatch("[0-2]-[0-2]", pair)
            assert 0 < seconds < 10


def test_the_header_of_a_run_tells_how_well_its_graph_mixes(tiny, tmp_path):
    settings = "averaging.method=dpsgd", "averaging.topology=ring", "train.optimizer=sgd", "train.max_steps=2"
    arguments = [word for word in train_arguments(tiny, tmp_path / "run", *settings) if word not in ("--progress", "none")]
    done = mpirun(4, *arguments, check=True)
    assert "dpsgd on ring (spectral gap 0.67)" in done.stdout  # 1 - 1/3: eigenvalues (1 + 2 cos(pi k / 2)) / 3


def test_on_another_number_of_ranks_a_run_goes_on_from_the_average(folder):
    run = folder / "gradient-tracking-2"
    done = mpirun(2, "-m", "dllm.train", "--resume", run, "--progress", "none", "--set", "train.max_steps=50", check=True)
    assert re.fullmatch(r"dllm: .*step-00000040 has no gradient-tracking state for 2 ranks: .*\n", complaint(done))
    assert metrics(run, "train")[-1]["step"] == 50
    again = ["-m", "dllm.train", "--resume", run, "--progress", "none", "--set", "train.max_steps=60"]
    done = mpirun(2, *again, "--set", "averaging.topology=ring", check=True)
    assert re.fullmatch(r"dllm: .*step-00000050 has no gradient-tracking state for 2 ranks: .*\n", complaint(done))
    assert complaint(mpirun(2, *again[:-1], "train.max_steps=70", "--set", "averaging.topology=ring", check=True)) == ""
    assert metrics(run, "valid")[-1]["loss"] < metrics(run, "valid")[0]["loss"]


def test_a_run_on_a_graph_from_a_file_goes_on_from_another_folder(tiny, tmp_path):
    (tmp_path / "edges").write_text("0 1\n1 2\n")
    settings = "averaging.method=dpsgd", "averaging.topology=edges", "train.optimizer=sgd", "train.max_steps=4"
    mpirun(3, *train_arguments(tiny, tmp_path / "run", *settings), cwd=tmp_path, check=True)
    more = "-m", "dllm.train", "--resume", tmp_path / "run", "--progress", "none", "--set", "train.max_steps=6"
    mpirun(3, *more, check=True)
    sent = column(metrics(tmp_path / "run", "train"), "bytes_sent")
    most = column(metrics(tmp_path / "run", "train"), "most_bytes_sent")
    assert len(sent) == 6
    assert (most > 1.3 * sent).all()  # the rank in the middle sends twice what the others do
