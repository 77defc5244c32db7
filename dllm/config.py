"""Every setting of a run: frozen dataclasses, one a section, and how a preset, a TOML file and --set become one Config.

The comment on a field states its effect. A preset sets some fields, a TOML file more, ``--set section.key=value`` wins.
"""

import dataclasses
import difflib
import pathlib
import tomllib
from dataclasses import dataclass, field

from .errors import UserError

PRESETS = pathlib.Path(__file__).parent / "presets"


def is_private(path: str) -> bool:
    """Whether a path names a place of each rank's own, by {rank} in it."""
    return "{rank}" in path


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    embedding: int = 256  # E; 0: one-hot inputs, as in char-rnn
    hidden: int = 256  # H
    layers: int = 1  # L
    tied: bool = False  # one matrix for embedding and output (Press and Wolf 2017); needs embedding = hidden
    dropout: float = 0.0  # on embeddings, between layers and before the output, never on the recurrence
    biases: int = 1  # 2: two bias vectors a layer that are added, as PyTorch and Torch7 have: same model, twice the bias's rate
    init: float = 0.0  # LSTM weights and biases start uniform(+-init); 0: 1 / sqrt(hidden)
    init_output: float = 0.1  # embedding and output weights start uniform(+-init_output)
    init_output_bias: float = 0.0  # the output bias starts uniform(+-init_output_bias)
    forget_bias: float = 0.0  # not 0: the forget gate's bias starts at this value (Jozefowicz et al. 2015 advise 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    lanes: int = 32  # the global batch: parallel streams of text, shared out over the ranks
    window: int = 64  # steps of truncated back-propagation through time
    last_window: str = "keep"  # keep | drop: what becomes of the shorter window at the end of an epoch
    carry: str = "epoch"  # epoch | run | window: states start from zero at each epoch, never again, or in each window (pairs)
    epochs: int = 10
    max_steps: int = 0  # not 0: end after this many steps; the cosine schedule then ends here too
    optimizer: str = "adam"  # sgd | adam | adamw | rmsprop
    lr: float = 0.003
    momentum: float = 0.0  # sgd
    nesterov: bool = False  # sgd
    beta1: float = 0.9  # adam, adamw
    beta2: float = 0.999  # adam, adamw
    alpha: float = 0.99  # rmsprop: decay of the mean square
    epsilon: float = 1e-8  # adam, adamw, rmsprop
    weight_decay: float = 0.0
    schedule: str = "constant"  # constant | cosine | epochs | plateau
    warmup: int = 0  # steps over which lr rises linearly from 0, before any schedule
    min_lr: float = 0.0  # cosine: where it ends
    decay: float = 1.0  # epochs: lr is divided by this after each epoch beyond decay_after; plateau: when validation stalls
    decay_after: int = 0  # epochs
    clip: float = 0.0  # 0: none
    clip_by: str = (
        "norm"  # norm: of the gradient the optimiser gets | value: each element | own: norm of a rank's, before it is sent
    )
    loss_norm: str = "token"  # token: the loss is the mean over tokens | window: its sum over the window, mean over lanes
    precision: str = "fp32"  # fp32 | fp64 | bf16: products of bfloat16 added up in fp32, all else fp32
    threads: int = 0  # of a rank; 0: cores of the node / ranks of the node; the results are the same to the bit
    seed: int = 1
    eval_every: int = 0  # steps between evaluations on the validation split; 0: at each epoch's end
    eval_lanes: int = 0  # lanes of an evaluation; 0: as many as in training


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: str = ""  # folder made by dllm.prepare; {rank} in it: a private folder for each rank; "": the embedded corpus

    @property
    def private(self) -> bool:
        """Whether every rank has text of its own, which stays there."""
        return is_private(self.path)


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    method: str = "allreduce"  # how ranks come to one model; README has a table of when to use which
    topology: str = (
        ""  # who is whose neighbour: ring, torus, hypercube, exponential, ... or a file of edges; "": the method's own
    )
    hierarchical: bool = False  # true: Allreduce between the ranks of a node, the method between nodes
    weights: str = ""  # metropolis | uniform: of what comes from neighbours; "": what suits the topology
    degree: int = 3  # neighbours of a rank in random topologies
    compression: str = "none"  # of what travels: powersgd, sign, signum, top-k, random-k, qsgd, bf16
    rank: int = 4  # powersgd. Lower: smaller messages, coarser gradients
    fraction: float = 0.01  # top-k, random-k: the part of the values that travels
    period: int = 1  # local-sgd, diloco, async-gossip: steps between meetings of all ranks
    momentum: float = 0.9  # of diloco's outer optimiser, of qg-momentum, of signum
    outer_lr: float = 0.7  # diloco
    consensus: float = 0.5  # choco: the step towards the neighbours. 1 without compression, smaller the coarser that is
    bucket_mb: float = 0.0  # smaller: communication starts earlier; larger: fewer messages. 0: 4 in a node, 0.5 between nodes


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 0  # 0: not by steps
    every_minutes: float = -1.0  # 0: not by time; -1: as often as pays, by what one costs and by mtbf_hours
    mtbf_hours: float = 1000.0  # mean time between failures of one rank: shorter, more checkpoints
    keep: int = 3  # newest checkpoints that stay, besides the best one


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig:
    min_ranks: int = 1  # fewer survivors than this end the run
    deadline: float = 60.0  # seconds of silence after which a rank is ended by others on its node; 0: never
    max_skipped: int = 5  # so many steps in a row whose gradient is not finite end the run; fewer are left out
    lost_lanes: str = "reset"  # reset | stop: what follows where a lane's state died with its rank and with its copy


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = 50  # steps between lines in metrics.jsonl
    sample: int = 200  # tokens of the sample at the end; 0: none
    prompt: str = ""  # what the sample continues


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    log: LogConfig = field(default_factory=LogConfig)


CHOICES = {
    "train.last_window": ("keep", "drop"),
    "train.carry": ("epoch", "run", "window"),
    "train.optimizer": ("sgd", "adam", "adamw", "rmsprop"),
    "train.schedule": ("constant", "cosine", "epochs", "plateau"),
    "train.clip_by": ("norm", "value", "own"),
    "train.loss_norm": ("token", "window"),
    "train.precision": ("fp32", "fp64", "bf16"),
    "averaging.method": (
        "allreduce",
        "dpsgd",
        "dpsgd-atc",
        "sgp",
        "gradient-tracking",
        "exact-diffusion",
        "qg-momentum",
        "relaysum",
        "local-sgd",
        "diloco",
        "choco",
        "async-gossip",
    ),
    "averaging.weights": ("", "metropolis", "uniform"),
    "averaging.compression": ("none", "powersgd", "sign", "signum", "top-k", "random-k", "qsgd", "bf16"),
    "resilience.lost_lanes": ("reset", "stop"),
    "model.biases": (1, 2),
}
AT_LEAST_ONE = (
    "model.hidden", "model.layers", "train.lanes", "train.window", "train.epochs", "checkpoint.keep",
    "resilience.min_ranks", "resilience.max_skipped", "log.every", "averaging.degree", "averaging.rank", "averaging.period",
)  # fmt: skip
POSITIVE = (
    "checkpoint.mtbf_hours", "train.lr", "train.decay", "train.epsilon", "averaging.fraction",
    "averaging.outer_lr", "averaging.consensus",
)  # fmt: skip
BELOW_ONE = ("model.dropout", "train.momentum", "train.beta1", "train.beta2", "train.alpha", "averaging.momentum")
AT_MOST_ONE = ("averaging.fraction", "averaging.consensus")
WITHOUT_NEIGHBOURS = ("allreduce", "local-sgd", "diloco")
PERIODIC = ("local-sgd", "diloco", "async-gossip")  # methods whose ranks are alone between meetings
COMPRESSED = {
    "allreduce": ("powersgd", "sign", "signum", "top-k", "random-k", "qsgd", "bf16"),
    "choco": ("sign", "top-k", "random-k", "qsgd", "bf16"),
}
MAY_BE_NEGATIVE = ("model.forget_bias",)
ALSO = {"checkpoint.every_minutes": -1}  # a value that has a meaning of its own
LARGEST = 2**31 - 1


def as_dict(config):
    """A Config as plain nested dicts: section -> key -> value."""
    return dataclasses.asdict(config)


def flat(config):
    """A Config as one dict: "section.key" -> value."""
    return {f"{section}.{key}": value for section, values in as_dict(config).items() for key, value in values.items()}


def resolve(preset="default", file=None, settings=()):
    """The Config of a preset, overlaid by a TOML file and by ``section.key=value`` strings. Raises UserError."""
    sections = load_toml(preset_path(preset))
    if file is not None:
        sections = merge(sections, load_toml(file))
    return from_dict(merge(sections, parse_settings(settings)))


def preset_names():
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_path(name):
    if name not in preset_names():
        raise UserError(f"--preset {name}: there is none of that name; there are {', '.join(preset_names())}")
    return PRESETS / f"{name}.toml"


def load_toml(path):
    try:
        return tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}") from None


def merge(below, above):
    """Sections of `above` laid over those of `below`."""
    merged = dict(below)
    for name, section in above.items():
        both = isinstance(section, dict) and isinstance(merged.get(name), dict)
        merged[name] = {**merged[name], **section} if both else section
    return merged


def parse_settings(settings):
    """Nested dict of ``section.key=value`` strings; a value is written as in TOML, a bare word is a string."""
    sections = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and key):
            raise UserError(f"--set {setting}: write it as section.key=value, for example --set train.lr=0.01")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except ValueError:
            value = text.strip()
        sections.setdefault(section, {})[key] = value
    return sections


def from_dict(sections):
    """A checked Config of nested dicts. Raises UserError that names the key, what it got and what would do."""
    known = {part.name: part.default_factory for part in dataclasses.fields(Config)}
    parts = {}
    for name, values in sections.items():
        if name not in known:
            raise UserError(f"unknown section '{name}'{_suggest(name, known)}")
        if not isinstance(values, dict):
            raise UserError(f"'{name}' is a section: write {name}.key = value")
        kinds = {entry.name: entry.type for entry in dataclasses.fields(known[name])}
        for key in values:
            if key not in kinds:
                raise UserError(f"unknown key '{name}.{key}'{_suggest(key, kinds, name + '.')}")
        parts[name] = known[name](**{key: _typed(f"{name}.{key}", value, kinds[key]) for key, value in values.items()})
    config = Config(**parts)
    _check(config)
    return config


def _suggest(name, known, prefix=""):
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{prefix}{near[0]}'?" if near else f"; there are {', '.join(prefix + key for key in known)}"


def _typed(name, value, kind):
    if kind is float and type(value) is int:
        value = float(str(value))  # infinity, not an OverflowError, where it is too large
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
        raise UserError(f"{name} = {value!r}: it takes {words[kind]}")
    return value


def _check(config):
    for section, values in as_dict(config).items():
        for key, value in values.items():
            _check_value(f"{section}.{key}", value)
    model, train = config.model, config.train
    if model.tied and model.embedding != model.hidden:
        raise UserError(f"model.tied needs model.embedding = model.hidden, but they are {model.embedding} and {model.hidden}")
    if train.nesterov and train.momentum == 0:
        raise UserError("train.nesterov needs train.momentum above 0")
    _check_averaging(config.averaging)
    if train.schedule == "plateau" and train.decay <= 1:
        raise UserError("train.schedule = plateau divides lr by train.decay, which must be above 1, for example 4")


def _check_averaging(averaging):
    method, compression = averaging.method, averaging.compression
    if compression not in ("none", *COMPRESSED.get(method, ())):
        able = COMPRESSED.get(method)
        instead = f"it takes {', '.join(able)}" if able else "allreduce and choco compress"
        raise UserError(f"averaging.compression = {compression} does not go with averaging.method = {method}: {instead}")
    if averaging.topology and method in WITHOUT_NEIGHBOURS:
        raise UserError(f"averaging.method = {method} has no neighbours: leave out averaging.topology")
    if averaging.weights and method in (*WITHOUT_NEIGHBOURS, "sgp", "async-gossip"):
        raise UserError(f"averaging.method = {method} has no choice of weights: leave out averaging.weights")
    if averaging.hierarchical and (method in ("allreduce", "choco", "async-gossip")):
        raise UserError(f"averaging.hierarchical does not go with averaging.method = {method}; with dpsgd, for example")
    if averaging.period > 1 and method not in PERIODIC:
        raise UserError(f"averaging.period goes with {', '.join(PERIODIC)}, not with averaging.method = {method}")


def _check_value(name, value):
    if name in CHOICES and value not in CHOICES[name]:
        raise UserError(f"{name} = {value}: it is one of {', '.join(str(choice) for choice in CHOICES[name] if choice != '')}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not abs(value) <= LARGEST:
        raise UserError(f"{name} = {value}: it must be a finite number of at most {LARGEST}")
    if name in AT_LEAST_ONE and value < 1:
        raise UserError(f"{name} = {value}: it must be at least 1")
    if name in POSITIVE and value <= 0:
        raise UserError(f"{name} = {value}: it must be above 0")
    if value < 0 and name not in MAY_BE_NEGATIVE and value != ALSO.get(name):
        raise UserError(f"{name} = {value}: it must not be negative")
    if name in AT_MOST_ONE and value > 1:
        raise UserError(f"{name} = {value}: it must be at most 1")
    if name in BELOW_ONE and value >= 1:
        raise UserError(f"{name} = {value}: it must be below 1")
