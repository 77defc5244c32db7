"""Bad input on the command line: refused in one line with exit code 2, alone and by four ranks, and nothing is changed."""

import hashlib
import json
import os
import pathlib
import re
import shutil

import pytest
from helpers.launch import REFUSED, complaint, mpirun
from helpers.run_files import flip
from helpers.several_commands import run_several

import dllm
from dllm.runs import checkpoint

SECONDS = 25  # for a refusal; it takes 1 to 5 where nothing else runs
SMALL = " --set model.hidden=16 --set model.embedding=16 --set train.lanes=8 --set train.window=8"
TRAIN, PREPARE = "dllm.train --data tiny --out new" + SMALL, "dllm.prepare --train text.txt --tokenizer char --out new"
ON_ANY = {  # what is wrong: (command, what the line says), in the folder of `world`
    "train: unknown flag": (TRAIN + " --lanes 4", "unrecognized arguments: --lanes"),
    "train: unknown key": (TRAIN + " --set model.hiden=4", r"unknown key 'model\.hiden'; did you mean 'model\.hidden'"),
    "train: unknown section": (TRAIN + " --set modell.hidden=4", "unknown section 'modell'; did you mean 'model'"),
    "train: wrong type": (TRAIN + " --set train.lanes=many", r"train\.lanes = 'many': it takes a whole number"),
    "train: no value": (TRAIN + " --set train.lanes", "write it as section.key=value"),
    "train: negative size": (TRAIN + " --set model.hidden=-4", r"model\.hidden = -4: it must be at least 1"),
    "train: negative steps": (TRAIN + " --max-steps -1", "argument --max-steps: -1 is not a number of at least 1"),
    "train: precision": (TRAIN + " --set train.precision=fp8", r"train\.precision = fp8: it is one of fp32"),
    "averaging: compressed gossip": (
        TRAIN + " --set averaging.method=dpsgd --set averaging.compression=sign",
        r"averaging\.compression = sign does not go with averaging\.method = dpsgd: allreduce and choco compress",
    ),
    "averaging: PowerSGD of differences": (
        TRAIN + " --set averaging.method=choco --set averaging.compression=powersgd",
        "choco: it takes top-k, random-k, sign",
    ),
    "averaging: neighbours of all": (TRAIN + " --set averaging.topology=ring", "allreduce has no neighbours: leave out"),
    "averaging: a period": (
        TRAIN + " --set averaging.period=5",
        "averaging.period goes with local-sgd, diloco, async-gossip, not",
    ),
    "averaging: unknown graph": (
        TRAIN + " --set averaging.method=dpsgd --set averaging.topology=rign",
        "did you mean 'ring'|ring, torus",
    ),
    "averaging: Adam where it is not exact": (
        TRAIN + " --set averaging.method=gradient-tracking",
        "gradient-tracking needs train.optimizer = sgd",
    ),
    "averaging: momentum twice": (
        TRAIN + " --set averaging.method=qg-momentum --set train.optimizer=sgd --set train.momentum=0.5",
        r"needs train\.optimizer = sgd and train\.momentum = 0: it has a momentum of its own",
    ),
    "train: unknown preset": (TRAIN + " --preset nothing", "--preset nothing: there is none of that name"),
    "train: no configuration": (TRAIN + " --config nothing.toml", "cannot read the configuration nothing.toml: No"),
    "train: configuration not TOML": (TRAIN + " --config text.txt", "cannot read the configuration text.txt: "),
    "train: a pipe for a configuration": (TRAIN + " --config pipe", "cannot read the configuration pipe: it is not a file"),
    "train: endless zeros": (TRAIN + " --config /dev/zero", "cannot read the configuration /dev/zero: it is not a file"),
    "train: a key of many parts": (TRAIN + " --config keys.toml", "cannot read the configuration keys.toml: a key of so many"),
    "train: deep brackets": (TRAIN + " --config deep.toml", "cannot read the configuration deep.toml: brackets are nested"),
    "train: a deep value": (TRAIN + f" --set train.lr={'[' * 9000}", r"train\.lr = '\[\[.*\.\.\.: it takes a number"),
    "train: endless digits": (TRAIN + f" --set train.lanes=0x{'f' * 9000}", r"train\.lanes = a number of too many digits"),
    "train: escapes": (TRAIN + " --set train.\x1b[2J=1", r"unknown key 'train\.\\u001b\[2J'"),
    "train: a pipe for a graph": (
        TRAIN + " --set averaging.method=dpsgd --set averaging.topology=./pipe",
        "cannot read ./pipe: it is not a file|no topology",
    ),
    "prepare: endless zeros for text": (PREPARE + " --valid /dev/zero", "cannot read /dev/zero: it is not a file"),
    "prepare: a pipe twice": (PREPARE + " --valid pipe --test pipe", "pipe is given twice: a stream can be read once"),
    "prepare: text for records": (PREPARE + " --field text", "cannot read text.txt: line 1 is no record of JSON with a text"),
    "prepare: a share beside a file": (PREPARE + " --valid text.txt --valid-fraction 0.1", "leave out either it or the valid"),
    "resume: a pipe for a configuration": ("dllm.train --resume piped", "configuration piped/config.toml: it is not a file"),
    "resume: behind the epoch": ("dllm.train --resume beyond", "is at place 1,000,000,000 of an epoch, and lanes have"),
    "resume: more lanes than text": ("dllm.train --resume run --set train.lanes=2147483647", "too few for 2147483647 lanes"),
    "evaluate: endless windows": ("dllm.evaluate endless", r"windows of 2,147,483,647 tokens in \d+ lanes take .* memory has"),
    "evaluate: a pipe for a configuration": ("dllm.evaluate piped", "configuration piped/config.toml: it is not a file"),
    "train: two origins": (TRAIN + " --resume run", "--resume brings its own configuration"),
    "train: no corpus": (TRAIN + " --data nothing", "there is no prepared corpus at .*nothing; make one with"),
    "train: shard truncated": (TRAIN + " --data truncated", "truncated/train-00000.h5 is damaged"),
    "train: shard with a flipped bit": (TRAIN + " --data flipped", "flipped/train-00000.h5 is damaged"),
    "train: manifest without a key": (TRAIN + " --data nokey", "nokey/manifest.json has no 'vocabulary'"),
    "train: split without a key": (TRAIN + " --data nosplitkey", "nosplitkey/manifest.json has no 'bytes'"),
    "train: manifest not JSON": (TRAIN + " --data notjson", "notjson/manifest.json is not valid JSON"),
    "train: tokenizer of another corpus": (TRAIN + " --data foreign", "tokenizer.json is not the one its manifest"),
    "train: too few tokens for the lanes": (TRAIN + " --set train.lanes=150000", "200000 tokens: too few for 150000"),
    "train: run folder exists": (TRAIN + " --out run", "--out run exists; choose another name, or go on with it"),
    "train: unwritable, below a file": (TRAIN + " --out text.txt/new", "text.txt/new"),
    "train: unwritable, /proc": (TRAIN + " --out /proc/x/new", "cannot write to the run folder /proc/x/new: No"),
    "resume: no run": ("dllm.train --resume nothing", "nothing is not the folder of a run: it has no config.toml"),
    "resume: no checkpoint": ("dllm.train --resume fresh", "fresh has no checkpoint to start from"),
    "resume: another shape": ("dllm.train --resume run --set model.hidden=24", "is of another shape: output.weight is"),
    "resume: another number of lanes": ("dllm.train --resume run --set train.lanes=16", "lanes = 8, this run has 16"),
    "resume: another vocabulary": ("dllm.train --resume run --data other", "the vocabulary of .*other is not the one"),
    "prepare: missing file": (PREPARE + " --valid nothing.txt", "cannot read nothing.txt: No such file or directory"),
    "prepare: a pattern without files": (PREPARE + " --valid *.md", r"no file is at \*\.md"),
    "prepare: empty file": (PREPARE + " --valid empty.txt", "the valid text is empty: empty.txt"),
    "prepare: not UTF-8, char": (PREPARE + " --test latin.txt", "latin.txt is not UTF-8 at byte 4; convert it, or use"),
    "prepare: not UTF-8, word": (PREPARE + " --train latin.txt --tokenizer word", "latin.txt is not UTF-8 at byte 4"),
    "prepare: unknown tokenizer": (PREPARE + " --tokenizer morse", "argument --tokenizer: invalid choice: 'morse'"),
    "prepare: unknown flag": (PREPARE + " --vocab 5", "unrecognized arguments: --vocab"),
    "prepare: negative size": (PREPARE + " --vocab-size -5", "argument --vocab-size: -5 is not a number of at least 1"),
    "prepare: bpe below 256": (PREPARE + " --tokenizer bpe --vocab-size 100", "bpe needs at least 256"),
    "prepare: not empty": (PREPARE + " --out full", "--out full exists and is not an empty folder"),
    "prepare: unwritable, below a file": (PREPARE + " --out text.txt/a/new", "cannot write to --out text.txt/a/new: "),
    "prepare: unwritable, /proc": (PREPARE + " --out /proc/x/new", "cannot write to --out /proc/x/new: No such file"),
    "prepare: one folder for private texts": (PREPARE + " --train site{rank}.txt", r"--train has \{rank\}, so --out"),
    "prepare: dealt to one folder": (PREPARE + " --deal files", r"--deal gives each rank a folder .* put \{rank\} in --out"),
    "prepare: private and dealt": (
        PREPARE + "{rank} --deal evenly --valid v{rank}.txt",
        r"--deal is for text that all ranks can read: leave \{rank\} out",
    ),
    "prepare: no shares": (PREPARE + "{rank} --deal dirichlet --alpha 0", "--alpha: 0 is not a number of at least 0.001"),
    "prepare: missing file to deal": (PREPARE + "{rank} --deal evenly --valid nothing.txt", "cannot read nothing.txt: No such"),
    "averaging: signum that is clipped": (
        TRAIN + " --set averaging.compression=signum --set train.clip=1",
        "signum makes every gradient .* take train.clip = 0, or train.clip_by = own",
    ),
    "averaging: hierarchical without neighbours": (
        TRAIN + " --set averaging.hierarchical=true",
        "averaging.hierarchical does not go with averaging.method = allreduce; with dpsgd, for example",
    ),
    "evaluate: no run": ("dllm.evaluate nothing", "nothing is not the folder of a run"),
    "evaluate: no checkpoint": ("dllm.evaluate fresh", "fresh has no checkpoint to start from"),
    "evaluate: another vocabulary": ("dllm.evaluate run --data other", "the vocabulary of .*other is not the one that"),
    "evaluate: no such split": ("dllm.evaluate run --split exam", "tiny has no split 'exam'; it has train, valid"),
    "evaluate: shard with a flipped bit": ("dllm.evaluate run --data flipped", "flipped/test-00000.h5 is damaged"),
    "evaluate: no lanes": ("dllm.evaluate run --lanes 0", "argument --lanes: 0 is not a number of at least 1"),
    "evaluate: no argument": ("dllm.evaluate", "the following arguments are required: MODEL"),
}
ON_FOUR = {
    "averaging: not a tree": (
        TRAIN + " --set averaging.method=relaysum --set averaging.topology=ring",
        "relaysum needs a tree, which ring is not",
    ),
    "averaging: a directed graph": (
        TRAIN + " --set averaging.method=exact-diffusion --set averaging.topology=exponential --set train.optimizer=sgd",
        r"exact-diffusion needs neighbours that hear each other in every step; .* is directed or changes: take ring",
    ),
    "averaging: weights that lose something": (
        TRAIN + " --set averaging.method=dpsgd --set averaging.topology=star --set averaging.weights=uniform",
        "dpsgd needs weights whose rows and columns add up to 1, which star does not have",
    ),
    "averaging: a graph for other numbers of ranks": (
        TRAIN + " --set averaging.method=dpsgd --set averaging.topology=text.txt",
        "text.txt",
    ),
    "train: more ranks than lanes": (TRAIN + " --set train.lanes=3", r"4 ranks share train\.lanes = 3: start at most"),
    "train: one rank's text damaged": (TRAIN + " --data site{rank}", r"site2/train-00000.h5 is damaged.* \(rank 2\)"),
    "train: one rank's vocabulary differs": (TRAIN + " --data odd{rank}", "do not agree on the vocabulary: rank 0 has"),
    "train: one rank has no valid split": (TRAIN + " --data short{rank}", "splits: rank 0 has .*, rank 3 has train;"),
    "prepare: fewer files than ranks": (
        PREPARE + "{rank} --deal files",
        "rank 1 of 4 gets no train text: take fewer ranks, or more files",
    ),
    "prepare: one text is missing": (
        PREPARE + "/{rank} --share-vocabulary --train t{rank}.txt",
        r"cannot read t3.txt: .* \(rank 3\)",
    ),
}
STARTED = ("train: unknown key", "resume: another shape", "prepare: not UTF-8, char", "evaluate: no such split")
ON_ONE = {
    "generate: no run": ("dllm.generate nothing", "nothing is not the folder of a run"),
    "generate: no checkpoint": ("dllm.generate fresh", "fresh has no checkpoint to start from"),
    "generate: unknown flag": ("dllm.generate run --heat 1", "unrecognized arguments: --heat"),
    "generate: negative temperature": ("dllm.generate run --temperature -1", "-1 is not a number of at least 0"),
    "generate: not a number": ("dllm.generate run --temperature warm", "invalid float value: 'warm'"),
    "generate: no probability": ("dllm.generate run --top-p 1.5", "--top-p: it is a probability, at most 1"),
    "generate: unknown character": ("dllm.generate run --prompt ☃", "'☃' is not in the vocabulary of"),
}


@pytest.fixture(scope="module")
def world(world, tiny, prepare, text):
    """That of conftest.py with more: other corpora and damaged ones, texts, and a run without checkpoints."""
    for name in ("truncated", "flipped", "nokey", "nosplitkey", "notjson", "foreign"):
        shutil.copytree(tiny, world / name)
    shutil.copytree(prepare("char", train=text[:5000].lower(), valid=b"to be or not to be"), world / "other")

    shard = world / "truncated" / "train-00000.h5"
    shard.write_bytes(shard.read_bytes()[:-1000])
    for split in ("train", "test"):
        path = world / "flipped" / f"{split}-00000.h5"
        flip(path, path.stat().st_size // 2)
    _edit(world / "nokey" / "manifest.json", lambda manifest: manifest.pop("vocabulary"))
    _edit(world / "nosplitkey" / "manifest.json", lambda manifest: manifest["splits"]["valid"].pop("bytes"))
    (world / "notjson" / "manifest.json").write_text("{'format': 1,")
    shutil.copy(world / "other" / "tokenizer.json", world / "foreign" / "tokenizer.json")
    for rank in range(4):
        (world / f"site{rank}").symlink_to(world / ("flipped" if rank == 2 else "tiny"))
        (world / f"odd{rank}").symlink_to(world / ("other" if rank == 2 else "tiny"))
        (world / f"short{rank}").symlink_to(world / ("train-only" if rank == 3 else "tiny"))
        if rank < 3:
            (world / f"t{rank}.txt").write_bytes(text[:999])

    (world / "text.txt").write_bytes(text[:5000])
    (world / "empty.txt").write_bytes(b"")
    (world / "latin.txt").write_bytes("Fiançailles".encode("latin-1"))
    (world / "full").mkdir()
    (world / "full" / "mine").write_text("mine")

    shutil.copytree(world / "run", world / "fresh", ignore=shutil.ignore_patterns("checkpoints"))
    os.mkfifo(world / "pipe")
    (world / "keys.toml").write_text("a" + ".a" * 50_000 + " = 1")
    (world / "deep.toml").write_text("x = " + "[" * 60_000)
    for name in ("piped", "endless", "beyond"):
        shutil.copytree(world / "run", world / name)
    (world / "piped" / "config.toml").unlink()
    os.mkfifo(world / "piped" / "config.toml")
    settings = (world / "endless" / "config.toml").read_text()
    (world / "endless" / "config.toml").write_text(settings.replace("\nwindow = 8\n", "\nwindow = 2147483647\n"))
    for path in (world / "beyond").glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["scalars"]["place"] = 10**9
        path.write_text(json.dumps(manifest | {"seal": checkpoint.seal(manifest)}))
    return world


def _edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def everything(world):
    """path -> hash of every file, None for a folder."""
    paths = sorted(world.rglob("*"))
    return {path: hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None for path in paths}


def check(text, says):
    """`text` is one line of a refusal that says so."""
    assert text.count("\n") == 1, text
    assert re.match(f"dllm: .*{says}", text), text
    assert text.count("dllm: ") == 1, text


def refuse(world, ranks, command, says):
    """Run a command that must be refused: one line, exit code 2, in time, and nothing made or changed."""
    before = everything(world)
    done = mpirun(ranks, "-m", *command.split(), cwd=world)
    assert done.returncode == REFUSED, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    check(complaint(done), says)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.seconds < SECONDS
    assert everything(world) == before


@pytest.mark.parametrize("case", [*STARTED, "generate: no run", "generate: unknown flag"])
def test_a_command_refuses_bad_input_in_one_line_with_exit_code_2(world, case):
    refuse(world, 0, *(ON_ANY | ON_ONE)[case])


@pytest.mark.parametrize("case", [*STARTED, "train: one rank's text damaged"])
def test_four_ranks_refuse_in_one_line_what_all_or_only_some_of_them_see(world, case):
    refuse(world, 4, *(ON_FOUR | ON_ANY)[case])


class Refusals:
    """All cases in one start, by one process or by four ranks: how each ended, and whether nothing changed."""

    def __init__(self, world, folder, ranks, cases):
        before = everything(world)
        commands = [command.split() for command, _ in cases.values()]
        ends = run_several(folder / f"out-{ranks}", ranks, commands, cwd=world, timeout=120)
        self.ends, self.unchanged = dict(zip(cases, ends, strict=True)), everything(world) == before

    def check(self, case, says):
        end = self.ends[case]
        check(re.sub("^(reading|counting|encoding|building) .*\n", "", end.text, flags=re.M), says)  # but for progress
        assert end.codes == {REFUSED}
        assert end.seconds < SECONDS


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    return Refusals(world, tmp_path_factory.mktemp("refusals"), 0, ON_ANY | ON_ONE)


@pytest.fixture(scope="module")
def on_four_ranks(world, tmp_path_factory):
    return Refusals(world, tmp_path_factory.mktemp("refusals"), 4, ON_ANY | ON_FOUR)


@pytest.mark.parametrize("case", ON_ANY | ON_ONE)
def test_bad_input_is_refused_in_one_line_with_exit_code_2(alone, case):
    alone.check(case, (ON_ANY | ON_ONE)[case][1])


@pytest.mark.parametrize("case", ON_ANY | ON_FOUR)
def test_bad_input_on_four_ranks_is_refused_in_one_line_by_one_of_them(on_four_ranks, case):
    on_four_ranks.check(case, (ON_ANY | ON_FOUR)[case][1])


def test_nothing_is_left_behind_by_what_was_refused(alone, on_four_ranks):
    assert alone.unchanged
    assert on_four_ranks.unchanged


ODD = """
import os, sys
rank = int(os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])
if sys.argv[1] == "code" and rank == 1:
    sys.path.insert(0, sys.argv[2])
from dllm import train
extra = sys.argv[2].split() if sys.argv[1] == "arguments" and rank == 1 else []
sys.exit(train.main(sys.argv[3:] + extra))
"""


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("--set train.lr=0.5", r"the train\.lr: rank 0 has 0\.\d+, rank 1 has 0\.5; start all of them with the same"),
        ("--set train.lanes=1", r"the train\.lanes: rank 0 has 8, rank 1 has 1"),
        ("--data other", r"the data\.path: rank 0 has \S+/tiny, rank 1 has \S+/other"),
        ("--max-steps 7", r"the --max-steps: rank 0 has 0, rank 1 has 7"),
    ],
)
def test_ranks_with_different_settings_are_refused_before_they_start(world, tmp_path, extra, says):
    (tmp_path / "odd.py").write_text(ODD)
    before = everything(world)
    done = mpirun(2, tmp_path / "odd.py", "arguments", extra, *TRAIN.split()[1:], cwd=world)
    assert done.returncode == REFUSED, done.stderr
    assert re.fullmatch(rf"dllm: the ranks do not agree on {says}.*\n", complaint(done)), done.stderr
    assert everything(world) == before


def test_ranks_with_different_code_are_refused_before_they_start(world, tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    other = tmp_path / "other"
    shutil.copytree(pathlib.Path(dllm.__file__).parent, other / "dllm", ignore=shutil.ignore_patterns("__pycache__"))
    with open(other / "dllm" / "training" / "optim.py", "a") as file:
        file.write("\n# a later version\n")
    done = mpirun(2, tmp_path / "odd.py", "code", other, *TRAIN.split()[1:], cwd=world)
    assert done.returncode == REFUSED, done.stderr
    says = r"dllm: the ranks do not agree on the code: rank 0 has \w+, rank 1 has \w+; .*\n"
    assert re.fullmatch(says, complaint(done)), done.stderr
    assert not (world / "new").exists()
