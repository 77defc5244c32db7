"""Configuration: every preset loads, file and --set are laid over it in order, and whatever is wrong is a UserError
that names the key.
"""

import dataclasses
import math
import re
import subprocess
import sys
import tomllib

import pytest
import tomli_w

from dllm import config
from dllm.comm import methods
from dllm.config.bounds import RULES, in_words
from dllm.errors import UserError
from dllm.training.options import train_config, train_options


def toml(tmp_path, text):
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", config.preset_names())
def test_every_preset_loads_and_survives_being_written(name):
    found = config.resolve(name)
    assert isinstance(found, config.Config)
    assert config.from_dict(config.as_dict(found)) == found
    assert config.from_dict(tomllib.loads(tomli_w.dumps(config.as_dict(found)))) == found
    settings = [  # as the user would type it
        f"{section}.{key}={value!r}".replace("True", "true").replace("False", "false")
        for section, values in config.as_dict(found).items()
        for key, value in values.items()
        if config.reads(found.model.kind, f"{section}.{key}")
    ]
    log = found.log if found.model.kind == "lm" else dataclasses.replace(found.log, prompt="def")  # which others do not read
    assert config.resolve("default", settings=settings) == dataclasses.replace(found, log=log)


def test_the_default_preset_is_there():
    assert "default" in config.preset_names()


def test_without_anything_the_fields_have_their_defaults():
    assert config.from_dict({}) == config.Config()


def test_a_file_is_laid_over_the_preset_and_settings_over_both(tmp_path):
    file = toml(tmp_path, "[model]\nhidden = 7\nlayers = 3\n[train]\nlr = 1\n")
    preset = config.resolve("default")
    found = config.resolve("default", file, ["model.layers=4", "model.layers=5", "log.prompt=def f(x):"])
    assert (found.model.hidden, found.model.layers, found.train.lr, found.log.prompt) == (7, 5, 1.0, "def f(x):")
    changed = dataclasses.replace(preset.model, hidden=7, layers=5)
    assert found.model == changed
    assert found.train == dataclasses.replace(preset.train, lr=1.0)
    assert found.data == preset.data


OF_ONE_TEXT = ("train.max_steps", "log.prompt")


@pytest.mark.parametrize(
    ("said", "steps", "prompt"),
    [
        ([], 600, "def"),
        (["train.epochs=200"], 0, "def"),  # what is said lifts the preset's limit
        (["train.epochs=200", "train.max_steps=7"], 7, "def"),
        (["data.path=/other"], 0, ""),  # both belong to the embedded corpus
        (["data.path=/other", "train.max_steps=7", "log.prompt=To"], 7, "To"),
        (["train.lr=0.1", "data.path="], 600, "def"),
    ],
)
def test_what_belongs_to_the_embedded_corpus_does_not_outlive_it(tmp_path, said, steps, prompt):
    found = config.resolve("default", None, said)
    assert [config.flat(found)[name] for name in OF_ONE_TEXT] == [steps, prompt]
    file = tmp_path / "mine.toml"
    file.write_text(tomli_w.dumps(config.parse_settings(said)))
    assert config.resolve("default", file) == found


@pytest.mark.parametrize(
    ("said", "steps", "prompt"),
    [
        ([], 50, "my"),
        (["train.epochs=5"], 50, "my"),  # as many as before: a launcher says it again with each start
        (["train.epochs=6"], 0, "my"),
        (["train.epochs=4"], 50, "my"),
        (["train.epochs=6", "train.max_steps=60"], 60, "my"),
        (["data.path=/moved"], 50, "my"),
    ],
)
def test_a_run_that_goes_on_keeps_its_length_until_another_is_said(said, steps, prompt):
    run = config.as_dict(
        config.resolve("default", None, ["data.path=/mine", "train.epochs=5", "train.max_steps=50", "log.prompt=my"])
    )
    found = config.from_dict(config.lay_over(run, config.parse_settings(said), of_run=True))
    assert [config.flat(found)[name] for name in OF_ONE_TEXT] == [steps, prompt]
    embedded = config.as_dict(config.resolve("default"))
    moved = config.from_dict(config.lay_over(embedded, {"data": {"path": "/mine"}}, of_run=True))
    assert [config.flat(moved)[name] for name in OF_ONE_TEXT] == [0, ""]


def test_the_settings_of_a_run_on_the_embedded_corpus_do_not_bind_another(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(tomli_w.dumps(config.as_dict(config.resolve("default"))))
    found = config.resolve("default", file, ["data.path=/mine"])
    assert [config.flat(found)[name] for name in OF_ONE_TEXT] == [0, ""]
    file.write_text("[train]\nmax_steps = 7\n")  # somebody's own words
    assert config.resolve("default", file, ["data.path=/mine"]).train.max_steps == 7


def test_more_steps_than_before_may_be_asked_for():
    steps = lambda *words: train_config(train_options(words)).train.max_steps
    assert [steps(), steps("--max-steps", "1000"), steps("--max-steps", "100")] == [600, 1000, 600]
    assert steps("--max-steps", "1000", "--set", "train.epochs=3") == 0


def test_merge_leaves_what_it_is_given_as_it_was():
    below, above = {"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": {"z": 4}}
    assert config.merge(below, above) == {"a": {"x": 1, "y": 3}, "b": {"z": 4}}
    assert below == {"a": {"x": 1, "y": 2}}
    assert above == {"a": {"y": 3}, "b": {"z": 4}}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train.lr=0.01", 0.01),
        ("train.lr = 1e-2", 0.01),
        ("model.tied=true", True),
        ("model.hidden=1_000", 1000),
        ("log.prompt=bare words = fine", "bare words = fine"),
        ('log.prompt=" quoted "', " quoted "),
        ("data.path=/data/site{rank}", "/data/site{rank}"),
        ("data.path=", ""),
        ("log.prompt=宋词", "宋词"),
    ],
)
def test_settings_are_read_as_toml_or_as_a_bare_word(setting, value):
    ((_, values),) = config.parse_settings([setting]).items()
    assert list(values.values()) == [value]


def test_whole_numbers_become_numbers_where_a_number_is_asked_for():
    lr = config.from_dict({"train": {"lr": 1}}).train.lr
    assert lr == 1.0
    assert type(lr) is float


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.Config().model.hidden = 5


BAD = {  # section.key=value: what the message says
    "modle.hidden=5": "unknown section 'modle'; did you mean 'model'",
    "nothing.hidden=5": "unknown section 'nothing'; there are model, train",
    "model.hiden=5": "unknown key 'model.hiden'; did you mean 'model.hidden'",
    "model.qqq=5": "unknown key 'model.qqq'; there are model.kind, model.embedding, model.hidden",
    "model.hidden.x=5": "unknown key 'model.hidden.x'; did you mean 'model.hidden'",
    "train.lr=fast": "train.lr = 'fast': it takes a number",
    "train.lr=": "train.lr = '': it takes a number",
    "train.lr=true": "train.lr = True: it takes a number",
    "model.hidden=1.5": "model.hidden = 1.5: it takes a whole number",
    "model.hidden=true": "model.hidden = True: it takes a whole number",
    "model.tied=1": "model.tied = 1: it takes true or false",
    "train.optimizer=3": "train.optimizer = 3: it takes a word",
    "train.optimizer=[1, 2]": "train.optimizer = [1, 2]: it takes a word",
    "model.hidden=-3": "model.hidden = -3: it must be at least 1",
    "model.hidden=0": "model.hidden = 0: it must be at least 1",
    "model.embedding=-1": "model.embedding = -1: it must not be negative",
    "train.momentum=-0.5": "train.momentum = -0.5: it must not be negative",
    "train.lr=0": "train.lr = 0.0: it must be above 0",
    "train.lr=-1": "train.lr = -1.0: it must be above 0",
    "train.lr=nan": "train.lr = nan: it must be a finite number",
    "train.lr=inf": "train.lr = inf: it must be a finite number",
    "model.forget_bias=nan": "model.forget_bias = nan: it must be a finite number",
    "model.forget_bias=-inf": "model.forget_bias = -inf: it must be a finite number",
    "model.hidden=99999999999": "model.hidden = 99999999999: it must be a finite number of at most",
    f"model.hidden={10**400}": "model.hidden",
    f"train.lr={10**400}": "train.lr",
    "model.dropout=1": "model.dropout = 1.0: it must be below 1",
    "train.beta2=1": "train.beta2 = 1.0: it must be below 1",
    "train.optimizer=lion": "train.optimizer = lion: it is one of sgd, adam",
    "train.precision=fp8": "train.precision = fp8: it is one of fp32, fp64",
    "train.clip_by=x": "train.clip_by = x: it is one of norm, value",
    "model.biases=3": "model.biases = 3: it is one of 1, 2",
    "averaging.method=x": "averaging.method = x: it is one of allreduce",
    "train.nesterov=true": "train.nesterov needs train.momentum",
    "train.schedule=plateau": "train.schedule = plateau divides lr by train.decay",
    "hidden=5": "--set hidden=5: write it as section.key=value",
    "model.hidden": "--set model.hidden: write it as section.key=value",
    "model.=5": "--set model.=5: write it as section.key=value",
    "": "write it as section.key=value",
    "=": "write it as section.key=value",
}


@pytest.mark.parametrize("setting", BAD)
def test_bad_settings_are_named(setting):
    with pytest.raises(UserError) as error:
        resolve([setting])
    assert BAD[setting] in str(error.value)
    assert "\n" not in str(error.value)


def test_tied_weights_need_equal_widths():
    with pytest.raises(UserError, match=r"model.tied needs model.embedding = model.hidden, but they are 5 and 7"):
        config.resolve(settings=["model.tied=true", "model.embedding=5", "model.hidden=7"])
    assert config.resolve(settings=["model.tied=true", "model.embedding=7", "model.hidden=7"]).model.tied


def test_a_forget_bias_may_be_negative():
    assert config.resolve(settings=["model.forget_bias=-1"]).model.forget_bias == -1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model\nhidden = 3", "settings.toml"),
        ("[model]\nhidden = 3\nhidden = 4", "settings.toml"),
        ("model = 3", "'model' is a section"),
        ("hidden = 3", "unknown section 'hidden'"),
        ("[model]\nhidden = '3'", "model.hidden = '3': it takes a whole number"),
        ("[train]\nlr = nan", "train.lr = nan"),
        ("[model.hidden]\nx = 3", "model.hidden = {'x': 3}: it takes a whole number"),
        ("[[model]]\nhidden = 3", "'model' is a section"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        config.resolve("default", toml(tmp_path, text))
    assert message in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"[model]\n# caf\xe9\n")
    for path, reason in [
        (tmp_path / "missing.toml", "No such file"),
        (tmp_path, "it is not a file"),
        (latin, "codec can't decode"),
    ]:
        with pytest.raises(UserError, match=reason) as error:
            config.resolve("default", path)
        assert str(path) in str(error.value)


def test_an_unknown_preset_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"--preset ../default: there is none of that name; there are .*default"):
        config.resolve("../default")


def test_every_setting_says_its_effect_and_its_bounds():
    assert list(config.FIELDS) == list(config.flat(config.Config()))
    for name, entry in config.FIELDS.items():
        assert entry.metadata["doc"], name
        assert set(entry.metadata["bounds"]) <= set(RULES), name
        assert entry.default in (entry.metadata["choices"] or [entry.default]), name


def settings_table(preset="default", settings=()):
    return config.settings_table(config.resolve(preset, settings=settings), methods.choices())


def resolve(settings):
    """A Config that is also checked by the methods of averaging."""
    resolved = config.resolve("default", settings=settings)
    methods.check(resolved)
    return resolved


def outside(name):
    """Values just beyond each bound of a setting, with the words for that bound."""
    metadata, kind = config.FIELDS[name].metadata, config.FIELDS[name].type
    for rule, limit in metadata["bounds"].items():
        if math.isfinite(limit):
            beyond = {"at_least": limit - 1, "above": limit, "at_most": limit + 1, "below": limit}[rule]
            yield kind(beyond - (beyond == metadata["also"])), in_words(rule, limit)


@pytest.mark.parametrize("name", config.FIELDS)
def test_a_message_says_the_bound_in_the_words_of_the_table(name):
    (row,) = (row for row in settings_table() if row.name == name)
    section, key = name.split(".")
    for value, words in outside(name):
        assert words in row.bounds
        with pytest.raises(UserError) as error:
            config.from_dict({section: {key: value}})
        assert str(error.value) == f"{name} = {value}: it must be {words}".replace("be not", "not be")
    if row.bounds.startswith("one of"):
        with pytest.raises(UserError) as error:
            resolve([f"{name}={99 if row.kind == 'a whole number' else 'nothing'}"])
        assert str(error.value).endswith(f": it is {row.bounds}")


def test_a_value_beyond_the_bounds_may_have_a_meaning():
    assert config.from_dict({"checkpoint": {"every_minutes": -1}}).checkpoint.every_minutes == -1
    (row,) = (row for row in settings_table() if row.name == "checkpoint.every_minutes")
    assert row.bounds == "not negative, or -1"


@pytest.mark.parametrize("preset", config.preset_names())
def test_the_table_has_every_setting_with_its_value_as_toml(preset):
    rows = settings_table(preset, settings=["train.seed=7"])
    written = "\n".join(f"{row.name} = {row.value}" for row in rows)
    expected = config.resolve(preset, settings=["train.seed=7"])
    assert config.from_dict(tomllib.loads(written)) == expected
    assert [row.name for row in rows] == list(config.flat(expected))


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_table_fits_on_a_screen(width):
    text = config.settings_text(settings_table(), width)
    assert max(map(len, text.splitlines())) <= max(width, 104)
    words = " ".join(text.split())
    assert all(f" {name} " in words for name in config.FIELDS)


def test_the_table_as_markdown_has_a_line_for_each_setting_under_its_section():
    text = config.settings_markdown(settings_table())
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(config.SECTIONS)
    names = re.findall(r"^\| `([a-z]+\.[a-z0-9_]+)` \|", text, re.MULTILINE)
    assert names == list(config.FIELDS)
    assert all(line.count(" | ") == 3 for line in text.splitlines() if line.startswith("| `"))


REFUSED_BY_METHODS = {
    "averaging.compression=sign averaging.method=dpsgd": "allreduce and choco compress",
    "averaging.compression=powersgd averaging.method=choco": "does not go with averaging.method = choco: it takes top-k",
    "averaging.compression=zip": "averaging.compression = zip: it is one of none, powersgd",
    "averaging.topology=ring": "averaging.method = allreduce has no neighbours: leave out averaging.topology",
    "averaging.method=sgp averaging.weights=uniform": "has no choice of weights: leave out averaging.weights",
    "averaging.method=choco averaging.hierarchical=true": "averaging.hierarchical does not go with averaging.method = choco",
    "averaging.period=5": "averaging.period goes with local-sgd, diloco, async-gossip, not with averaging.method = allreduce",
    "averaging.method=exact-diffusion": "averaging.method = exact-diffusion needs train.optimizer = sgd",
    "averaging.method=qg-momentum train.optimizer=sgd train.momentum=0.5": "train.momentum = 0: it has a momentum of its own",
}


@pytest.mark.parametrize("settings", REFUSED_BY_METHODS)
def test_a_method_says_what_it_cannot_do(settings):
    config.resolve(settings=settings.split())  # by itself each setting is in order
    with pytest.raises(UserError) as error:
        resolve(settings.split())
    assert REFUSED_BY_METHODS[settings] in str(error.value)


@pytest.mark.parametrize("command", ["train", "serve"])
def test_a_command_that_is_only_starting_can_be_signalled(command):
    """What takes long is imported behind the signal handlers."""
    code = f"import sys, dllm.{command}; print(sorted({{'numba', 'h5py', 'mpi4py.MPI'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_to_ask_methods_what_they_can_do_starts_no_mpi():
    code = "import sys; from dllm.comm import methods; print(*methods.choices()); assert 'mpi4py.MPI' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
