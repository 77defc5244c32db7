"""A rank that computes nonsense, is slow, has no memory left or loses its text: it is named, and nobody waits for ever."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers.faults import fault, in_each_step
from helpers.launch import REFUSED, ULFM, complaint, flavour, mpirun, train_arguments
from helpers.run_files import arrays, column, metrics

STEPS = 12
SETTINGS = "train.precision=fp64", f"train.max_steps={STEPS}", "log.sample=0", "model.dropout=0.1"
NODE_OR_NOT = pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "messages"])
MESSAGES = "import os\ndef unavailable(*_): raise OSError('no')\nos.memfd_create = unavailable\n"
NOT_A_NUMBER = """
def backward(self, *arguments, before=module.LanguageModel.backward):
    self.turn = getattr(self, "turn", 0) + 1
    if rank == {rank} and self.turn in {turns}:
        ready = arguments[0]
        def poisoned(part):
            self.gradient[part.start + {place}] = float("nan")
            ready(part)
        arguments = (poisoned, *arguments[1:])
    return before(self, *arguments)
module.LanguageModel.backward = backward
"""


@NODE_OR_NOT
def test_a_step_with_a_gradient_that_is_not_finite_is_left_out_by_all(tiny, tmp_path, shared):
    run = tmp_path / "run"
    code = ("" if shared else MESSAGES) + NOT_A_NUMBER.format(rank=1, turns=(4, 7, 8), place=5)
    arguments = train_arguments(tiny, run, *SETTINGS)
    done = mpirun(3, *arguments, env=fault(tmp_path, "dllm.model.language_model", code), check=True)
    lines = [f"dllm: step {step} is left out: the gradient of rank 1 is not finite" for step in (4, 7, 8)]
    assert complaint(done).splitlines() == lines
    found = metrics(run, "train")
    assert column(found, "step").tolist() == [step for step in range(1, STEPS + 1) if step not in (4, 7, 8)]
    assert column(found, "skipped").tolist() == [0] * 3 + [1] * 2 + [3] * 4
    assert np.isfinite(column(found, "loss")).all()
    straight = tmp_path / "straight"
    mpirun(2, *train_arguments(tiny, straight, *SETTINGS), check=True)
    assert column(metrics(straight, "train"), "loss")[:3].tolist() == pytest.approx(
        column(found, "loss")[:3].tolist(), rel=1e-12
    )


@NODE_OR_NOT
def test_several_in_a_row_end_the_run(tiny, tmp_path, shared):
    code = ("" if shared else MESSAGES) + NOT_A_NUMBER.format(rank=0, turns=range(5, 99), place=0)
    arguments = train_arguments(tiny, tmp_path / "run", *SETTINGS, "resilience.max_skipped=3")
    done = mpirun(2, *arguments, env=fault(tmp_path, "dllm.model.language_model", code))
    assert done.returncode == REFUSED
    last = complaint(done).splitlines()[-1]
    assert (
        last
        == "dllm: the gradient is not finite at step 7, 3 times in a row, that of rank 0: try a lower train.lr, or train.clip"
    )


@pytest.mark.parametrize("method", ["dpsgd", "gradient-tracking", "local-sgd"])
def test_a_rank_that_steps_by_itself_leaves_out_a_step_by_itself(tiny, tmp_path, method):
    """The others learn of it in the next step; they go on."""
    run, own = tmp_path / "run", (f"averaging.method={method}", "train.optimizer=sgd", "train.lr=0.1")
    faulty = fault(tmp_path, "dllm.model.language_model", NOT_A_NUMBER.format(rank=1, turns=(4, 7, 8), place=5))
    done = mpirun(3, *train_arguments(tiny, run, *SETTINGS, *own), env=faulty, check=True)
    lines = [f"dllm: step {step} is left out: the gradient of rank 1 is not finite" for step in (4, 7, 8)]
    assert complaint(done).splitlines() == lines
    found = metrics(run, "train")
    assert column(found, "skipped").tolist() == [0] * 4 + [1] * 3 + [2] + [3] * 4
    assert np.isfinite(column(found, "loss")).all()
    assert metrics(run, "valid")[-1]["own_loss"] < 5
    sick = fault(tmp_path, "dllm.model.language_model", NOT_A_NUMBER.format(rank=0, turns=range(5, 99), place=0))
    done = mpirun(2, *train_arguments(tiny, tmp_path / "sick", *SETTINGS, *own, "resilience.max_skipped=3"), env=sick)
    assert done.returncode == REFUSED
    assert "not finite at step 7, 3 times in a row, that of rank 0" in complaint(done).splitlines()[-1]


@pytest.mark.skipif(flavour() == "mpich", reason="MPICH ends the job where a rank dies")
def test_a_run_whose_ranks_may_die_is_the_same_to_the_bit(tiny, tmp_path):
    steps = STEPS + 1  # an odd number: the state that is written then is the second of the two
    for name, env in (("may", ULFM), ("may-not", {})):
        settings = *SETTINGS, f"train.max_steps={steps}", "train.eval_every=5"
        mpirun(2, *train_arguments(tiny, tmp_path / name, *settings), env=env, check=True)
    (one, _), (other, _) = (arrays(tmp_path / name, steps) for name in ("may", "may-not"))
    assert not [name for name in one if not np.array_equal(one[name], other[name])]
    assert metrics(tmp_path / "may", "valid") == metrics(tmp_path / "may-not", "valid")


def test_a_run_that_diverges_ends(tiny, tmp_path):
    settings = "train.lr=1e9", "train.clip=0.0", "train.optimizer=sgd", "train.precision=fp32", "log.every=50"
    done = mpirun(2, *train_arguments(tiny, tmp_path / "run", *settings))
    assert done.returncode == REFUSED
    assert re.search(r"not finite at step \d+, 5 times in a row, that of (rank|all ranks together)", complaint(done))


def test_a_rank_that_is_slow_for_a_while_is_named_once(tiny, tmp_path):
    slow = """
from dllm.model.language_model import LanguageModel
module.PATIENCE = 0.5

def slow(self, *arguments, before=LanguageModel.forward):
    time.sleep((0.05 if rank == 1 else 0.01) if self.training else 0)
    return before(self, *arguments)
LanguageModel.forward = slow
"""
    arguments = train_arguments(tiny, tmp_path / "run", "train.max_steps=60", "train.threads=1", "log.every=5")
    done = mpirun(2, *arguments, env=fault(tmp_path, "dllm.training.metrics", slow), check=True)
    assert re.fullmatch(r"dllm: rank 1 takes \d\.\d times as long for a step as the others do\n", complaint(done))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "split" not in line]
    assert [line["slowest_rank"] for line in train[1:]] == [1] * (len(train) - 1)
    assert all(low <= middle <= high for low, middle, high in (line["busy_seconds"] for line in train))


TROUBLE = {  # what happens to rank 1 in its seventh step, and what is said of it
    "no memory": ("raise MemoryError('no memory left')", "dllm: out of memory (rank 1): no memory left"),
    "no text": (
        "shutil.rmtree(trainer.corpus.folder)",
        r"dllm: cannot read .*/own/train-\d+.h5: No such file or directory \(rank 1\)",
    ),
    "a bug": ("raise RuntimeError('an error that nobody expected')", "dllm: rank 1 failed\nTraceback"),
}


@pytest.mark.parametrize("what", TROUBLE)
@pytest.mark.parametrize("survive", [True, False], ids=["others go on", "all leave"])
def test_an_error_on_one_rank_is_named_and_hangs_nobody(tiny, tmp_path, what, survive):
    if survive and flavour() == "mpich":
        pytest.skip("MPICH ends the job where a rank dies")
    trouble, message = TROUBLE[what]
    also = "import dllm.data.lanes, pathlib, shutil\ndllm.data.lanes.AHEAD = 16\n"
    in_step = f"""
if rank == 1 and trainer.state.step == 0:
    trainer.corpus.folder = pathlib.Path({str(tmp_path / "own")!r})
if rank == 1 and trainer.state.step == 6:
    {trouble}
"""
    run = tmp_path / "run"
    shutil.copytree(tiny, tmp_path / "own")
    env = in_each_step(tmp_path, in_step, also=also) | (ULFM if survive else {})
    done = mpirun(3, *train_arguments(tiny, run, *SETTINGS), env=env)
    assert re.search(message if "\\" in message else re.escape(message), done.stderr), done.stderr
    assert ("Traceback" in done.stderr) == (what == "a bug"), done.stderr
    if survive:
        assert "rank 1 of 3 died; 2 go on" in done.stderr
        assert (run / "DONE").exists()
        assert column(metrics(run, "train"), "step").tolist() == list(range(1, STEPS + 1))
    else:
        assert done.returncode == (1 if what == "a bug" else REFUSED)
        assert done.seconds < 40
