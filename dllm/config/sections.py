"""The settings of a run: frozen dataclasses, one a section.

To add a setting: a field with its effect and bounds. --set, files, checks, `--settings` and the docs take it from here.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from .bounds import setting


def is_private(path: str) -> bool:
    """Whether a path names a place of each rank's own, by {rank} in it."""
    return "{rank}" in path


def path_of_rank(path: str, rank: int) -> str:
    """The place that a path names on a rank."""
    return path.replace("{rank}", str(rank))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    kind: str = setting(
        "lm",
        "lm: the next token; bilm: the next and the one before; seq2seq: a target of a source; tagger: a label a word; "
        "classifier: a label a text; ctc: text of sound",
        choices=("lm", "bilm", "seq2seq", "tagger", "classifier", "ctc"),
    )
    embedding: int = setting(256, "width of the embedding; 0: one-hot inputs, as in char-rnn")
    hidden: int = setting(256, "units of each layer, in each direction", at_least=1)
    layers: int = setting(1, "LSTM layers; of seq2seq those of the decoder", at_least=1, at_most=1000)
    bidirectional: bool = setting(False, "whether what is read whole is read in both directions: not by lm and bilm")
    encoder_layers: int = setting(1, "seq2seq: layers that read the source", at_least=1, at_most=1000)
    attention: str = setting(
        "general",
        "seq2seq: scores h k with keys k = m W of the memory m, or with m itself (Luong et al. 2015)",
        choices=("general", "dot"),
    )
    pool: str = setting(
        "max", "classifier: what of all steps is looked at; last: the end of each direction", choices=("max", "mean", "last")
    )
    projection: int = setting(0, "units of the tanh layer before the output; 0: none, of seq2seq as many as the embedding has")
    copy: bool = setting(False, "seq2seq: tokens of the source can be copied (See et al. 2017)")
    labels: int = setting(0, "tagger, classifier, ctc: labels; 0: those of the corpus")
    features: int = setting(0, "numbers in a frame of sound; 0: those of the corpus, whose text has none")
    tied: bool = setting(
        False, "one matrix for embedding and output (Press and Wolf 2017); needs embedding = hidden, of seq2seq = projection"
    )
    dropout: float = setting(0.0, "on embeddings, between layers and before the output, never on the recurrence", below=1)
    biases: int = setting(
        1,
        "2: two bias vectors a layer that are added, as PyTorch and Torch7 have: same model, twice the bias's rate",
        choices=(1, 2),
    )
    init: float = setting(0.0, "LSTM weights and biases start uniform(+-init); 0: 1 / sqrt(hidden)")
    init_output: float = setting(0.1, "embedding and output weights start uniform(+-init_output)")
    init_output_bias: float = setting(0.0, "the output bias starts uniform(+-init_output_bias)")
    forget_bias: float = setting(
        0.0, "not 0: the forget gate's bias starts at this value (Jozefowicz et al. 2015 advise 1)", at_least=-math.inf
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How it is trained."""

    lanes: int = setting(32, "the global batch: parallel streams of text, shared out over the ranks", at_least=1)
    window: int = setting(64, "steps of truncated back-propagation through time", at_least=1)
    last_window: str = setting("keep", "what becomes of the shorter window at the end of an epoch", choices=("keep", "drop"))
    carry: str = setting(
        "epoch",
        "states start from zero at each epoch; run: never again; window: in each window (pairs)",
        choices=("epoch", "run", "window"),
    )
    epochs: int = setting(10, "passes over the training text", at_least=1)
    max_steps: int = setting(0, "not 0: end after this many steps; the cosine schedule then ends here too")
    optimizer: str = setting("adam", "what moves the parameters", choices=("sgd", "adam", "adamw", "rmsprop"))
    lr: float = setting(0.003, "learning rate", above=0)
    momentum: float = setting(0.0, "of sgd", below=1)
    nesterov: bool = setting(False, "Nesterov's momentum, of sgd")
    beta1: float = setting(0.9, "of adam and adamw: decay of the mean", below=1)
    beta2: float = setting(0.999, "of adam and adamw: decay of the mean square", below=1)
    alpha: float = setting(0.99, "of rmsprop: decay of the mean square", below=1)
    epsilon: float = setting(1e-8, "of adam, adamw and rmsprop: added to the root of the mean square", above=0)
    weight_decay: float = setting(0.0, "pull of the parameters towards zero; decoupled with adamw")
    schedule: str = setting(
        "constant",
        "what becomes of lr; range: it rises from min_lr to lr by the same factor in each step, as lr-find has it",
        choices=("constant", "cosine", "epochs", "plateau", "range"),
    )
    warmup: int = setting(0, "steps over which lr rises linearly from 0, before any schedule")
    min_lr: float = setting(0.0, "cosine: where it ends; range: where it begins")
    decay: float = setting(
        1.0, "epochs: lr is divided by this after each epoch beyond decay_after; plateau: when validation stalls", above=0
    )
    decay_after: int = setting(0, "epochs: how many keep the first lr")
    clip: float = setting(0.0, "the largest gradient; 0: any")
    clip_by: str = setting(
        "norm",
        "norm: of the gradient the optimiser gets; value: each element; own: norm of a rank's, before it is sent",
        choices=("norm", "value", "own"),
    )
    loss_norm: str = setting(
        "token",
        "token: the loss is the mean over tokens; window: its sum over the window, mean over lanes",
        choices=("token", "window"),
    )
    smoothing: float = setting(
        0.0, "the part of a target that all tokens share alike (Szegedy et al. 2016); losses shown are without it", below=1
    )
    unfreeze: int = setting(
        0,
        "not 0, with --init-from: so many steps what is above all layers learns alone, then a layer more (Howard, Ruder 2018)",
    )
    precision: str = setting(
        "fp32", "bf16: products of bfloat16 added up in fp32, all else fp32", choices=("fp32", "fp64", "bf16")
    )
    threads: int = setting(0, "of a rank; 0: cores of the node / ranks of the node; the results are the same to the bit")
    seed: int = setting(1, "of the first parameters and of dropout")
    eval_every: int = setting(0, "steps between evaluations on the validation split; 0: at each epoch's end")
    patience: int = setting(0, "not 0: end after this many evaluations in a row without a better one")
    init_from: str = setting("", 'the run or model whose parameters are the beginning, by --init-from; "": they are drawn')
    eval_lanes: int = setting(0, "lanes of an evaluation; 0: as many as in training")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text is."""

    path: str = setting(
        "", 'folder made by dllm.prepare; {rank} in it: a private folder for each rank; "": the embedded corpus'
    )

    @property
    def private(self) -> bool:
        """Whether every rank has text of its own, which stays there."""
        return is_private(self.path)


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """How ranks come to one model."""

    method: str = setting("allreduce", "how ranks come to one model; docs/how-to/choose-a-method.md says when to take which")
    topology: str = setting(
        "",
        'who is whose neighbour: ring, torus, hypercube, exponential, ... or a file of edges; "": the method\'s own',
    )
    hierarchical: bool = setting(False, "true: Allreduce between the ranks of a node, the method between nodes")
    weights: str = setting(
        "", 'of what comes from neighbours; "": what suits the topology', choices=("", "metropolis", "uniform")
    )
    degree: int = setting(3, "neighbours of a rank in random topologies", at_least=1)
    compression: str = setting("none", "of what travels")
    rank: int = setting(4, "powersgd. Lower: smaller messages, coarser gradients", at_least=1)
    fraction: float = setting(0.01, "top-k, random-k: the part of the values that travels", above=0, at_most=1)
    period: int = setting(1, "local-sgd, diloco, async-gossip: steps between meetings of all ranks", at_least=1)
    momentum: float = setting(0.9, "of diloco's outer optimiser, of qg-momentum, of signum", below=1)
    outer_lr: float = setting(0.7, "diloco: rate of its outer optimiser", above=0)
    consensus: float = setting(
        0.5, "choco: the step towards the neighbours. 1 without compression, smaller the coarser that is", above=0, at_most=1
    )
    bucket_mb: float = setting(
        0.0, "smaller: communication starts earlier; larger: fewer messages. 0: 4 in a node, 0.5 between nodes"
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept to go on from."""

    every_steps: int = setting(0, "0: not by steps")
    every_minutes: float = setting(-1.0, "0: not by time; -1: as often as pays, by what one costs and by mtbf_hours", also=-1.0)
    mtbf_hours: float = setting(1000.0, "mean time between failures of one rank: shorter, more checkpoints", above=0)
    keep: int = setting(3, "newest checkpoints that stay, besides the best one", at_least=1)


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig:
    """What happens when ranks die or fall silent."""

    min_ranks: int = setting(1, "fewer survivors than this end the run", at_least=1)
    deadline: float = setting(60.0, "seconds of silence after which a rank is ended by others on its node; 0: never")
    max_skipped: int = setting(
        5, "so many steps in a row whose gradient is not finite end the run; fewer are left out", at_least=1
    )
    lost_lanes: str = setting(
        "reset", "what follows where a lane's state died with its rank and with its copy", choices=("reset", "stop")
    )


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Where copies lie, and how shared stores of files are reached."""

    copies: int = setting(
        2, "disks that have each shard and each part of a checkpoint, where hosts share none; 0: no copies", at_most=1000
    )
    ipfs: str = setting("", 'RPC of an IPFS node, such as http://127.0.0.1:5001; "": the variable DLLM_IPFS')
    gateways: str = setting("", 'trustless gateways of IPFS, with commas between them; "": the variable IPFS_GATEWAY')
    bee: str = setting("", 'HTTP of a node of Ethereum Swarm, such as http://127.0.0.1:1633; "": the variable DLLM_BEE')
    timeout: float = setting(30.0, "seconds that a store has to answer", above=0)
    pin: bool = setting(True, "whether what is published stays at the IPFS node")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is shown and written down."""

    every: int = setting(50, "steps between lines in metrics.jsonl", at_least=1)
    sample: int = setting(200, "tokens of the sample at the end; 0: none; private text: always none")
    prompt: str = setting("", "what the sample continues")
    tensorboard: bool = setting(False, "also write files for TensorBoard; needs pip install 'dllm[tensorboard]'")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    log: LogConfig = field(default_factory=LogConfig)


SECTIONS: dict[str, Any] = {part.name: part.type for part in dataclasses.fields(Config)}
FIELDS: dict[str, dataclasses.Field[Any]] = {
    f"{section}.{entry.name}": entry for section, kind in SECTIONS.items() for entry in dataclasses.fields(kind)
}


def as_dict(config: Config) -> dict[str, dict[str, Any]]:
    """A Config as plain nested dicts: section -> key -> value."""
    return dataclasses.asdict(config)


def flat(config: Config) -> dict[str, Any]:
    """A Config as one dict: "section.key" -> value."""
    return {f"{section}.{key}": value for section, values in as_dict(config).items() for key, value in values.items()}
