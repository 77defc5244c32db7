r"""Labels out of frames of which nobody says where each label is: connectionist temporal classification, and how it is read.

Graves, Fernandez, Gomez, Schmidhuber 2006. Every frame has logits of all labels and, last, of a blank. A path is a label or
the blank for each frame; it says what is left when repetitions become one and blanks go. The loss of a transcript l of U labels
is that of all paths that say it, in log space, over l' = blank l_1 blank l_2 ... blank, 2U + 1 places:

    y_tv = log softmax_v z_tv
    alpha_ts = y_t,l'_s + log(e^alpha_t-1,s + e^alpha_t-1,s-1 + e^alpha_t-1,s-2 [l'_s no blank, l'_s != l'_s-2])
    beta_ts = log(sum of the same three of e^(beta_t+1,s' + y_t+1,l'_s'), s' = s, s+1, s+2)
    loss = -log(e^alpha_T,2U + e^alpha_T,2U-1)          nats a transcript
    dz_tv = scale (softmax_v z_t - sum_{s: l'_s = v} e^(alpha_ts + beta_ts + loss))

A transcript that takes more frames than there are (each label one, and one more between equal ones) has the loss infinity and
no gradient; `prepare` leaves such ones out. A lane without frames has neither loss nor gradient.

The likeliest transcript is sought by a prefix beam search (Hannun, Maas, Jurafsky, Ng 2014, without a language model): each
kept text has the probability of its paths that end with a blank, and of those that do not; what two paths say is one text.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from .compile import kernel
from .team import Team
from .types import Array

NEVER = -np.inf  # the logarithm of no probability


def ctc_loss_and_gradient(
    losses: Array, dz: Array | None, z: Array, targets: Array, frames: Array, labels: Array, scale: float, team: Team
) -> None:
    """Losses of transcripts and, for training, the gradient of the logits.

    Parameters
    ----------
    losses : (B,) float64, out
        Nats a transcript.
    dz : (T,B,V), out
        Overwritten. None: only the losses are computed.
    z : (T,B,V)
        Logits; the blank is V - 1.
    targets : (U,B) int64
        Labels of each lane; behind its own ones anything.
    frames, labels : (B,) int64
        How many of a lane's frames and labels count.
    scale : float
        Factor on the gradients.
    team : Team
        Threads that share the lanes.
    """
    T, B, V = z.shape
    S = 2 * int(labels.max(initial=0)) + 1
    y, alpha = np.empty((B, T, V)), np.empty((B, T, S))
    beta, mass = np.empty((B, 2, S)), np.empty((B, V))
    wanted = dz is not None

    def work(first: int, last: int) -> None:
        out = losses, z if dz is None else dz
        _lanes(*out, y, alpha, beta, mass, z, targets, frames, labels, scale, wanted, first, last)

    team.share(work, B)


@kernel
def _add(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    high = max(a, b)
    if high == NEVER:
        return NEVER
    return high + math.log1p(math.exp(min(a, b) - high))


@kernel
def _log_softmax(y: Array, z: Array) -> None:
    """y (V,), out, of logits z (V,)."""
    high = z[0]
    for v in range(len(z)):
        high = max(high, z[v])
    total = 0.0
    for v in range(len(z)):
        y[v] = z[v] - high
        total += math.exp(y[v])
    shift = math.log(total)
    for v in range(len(z)):
        y[v] -= shift


@kernel
def _jumps(s: int, target: Array) -> bool:
    """Whether place s of l' may be reached from s - 2: it is a label, and not the one before."""
    return s % 2 == 1 and s >= 3 and target[s // 2] != target[s // 2 - 1]


@kernel
def _forward(y: Array, alpha: Array, target: Array, T: int, U: int) -> float:
    """Fill alpha (T,2U+1), and y below T is given. Returns the loss."""
    blank = y.shape[1] - 1
    for s in range(2 * U + 1):
        alpha[0, s] = NEVER
    alpha[0, 0] = y[0, blank]
    if U > 0:
        alpha[0, 1] = y[0, target[0]]
    for t in range(1, T):
        for s in range(2 * U + 1):
            total = alpha[t - 1, s]
            if s >= 1:
                total = _add(total, alpha[t - 1, s - 1])
            if _jumps(s, target):
                total = _add(total, alpha[t - 1, s - 2])
            alpha[t, s] = total + y[t, target[s // 2] if s % 2 == 1 else blank]
    total = alpha[T - 1, 2 * U]
    return -_add(total, alpha[T - 1, 2 * U - 1]) if U > 0 else -total


@kernel
def _lanes(
    losses: Array,
    dz: Array,
    y: Array,
    alpha: Array,
    beta: Array,
    mass: Array,
    z: Array,
    targets: Array,
    frames: Array,
    labels: Array,
    scale: float,
    wanted: bool,
    first: int,
    last: int,
) -> None:
    """Lanes [first, last); y, alpha, beta, mass: memory for each lane."""
    blank = z.shape[2] - 1
    for n in range(first, last):
        T, U, target = frames[n], labels[n], targets[:, n]
        if wanted:
            dz[:, n] = 0
        losses[n] = 0
        if T == 0:
            continue
        for t in range(T):
            _log_softmax(y[n, t], z[t, n])
        loss = losses[n] = _forward(y[n], alpha[n], target, T, U)
        if not wanted or not loss < np.inf:
            continue
        S, here = 2 * U + 1, 0
        beta[n, here, :S] = NEVER
        beta[n, here, S - 1] = 0
        beta[n, here, max(S - 2, 0)] = 0
        for t in range(T - 1, -1, -1):
            now = beta[n, here]
            if t < T - 1:
                behind, now = now, beta[n, 1 - here]
                here = 1 - here
                for s in range(S):
                    total = behind[s] + y[n, t + 1, target[s // 2] if s % 2 == 1 else blank]
                    if s + 1 < S:
                        total = _add(total, behind[s + 1] + y[n, t + 1, target[(s + 1) // 2] if s % 2 == 0 else blank])
                    if s + 2 < S and _jumps(s + 2, target):
                        total = _add(total, behind[s + 2] + y[n, t + 1, target[s // 2 + 1]])
                    now[s] = total
            mass[n] = 0
            for s in range(S):
                mass[n, target[s // 2] if s % 2 == 1 else blank] += math.exp(alpha[n, t, s] + now[s] + loss)
            for v in range(blank + 1):
                dz[t, n, v] = scale * (math.exp(y[n, t, v]) - mass[n, v])


def log_probabilities(z: Array) -> Array:
    """log softmax of logits (..., V), float64."""
    shifted = z.astype(np.float64) - z.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def spoken(path: Sequence[int] | Array, blank: int) -> list[int]:
    """What a path says: repetitions become one, then blanks go."""
    return [int(label) for label, _ in itertools.groupby(path) if label != blank]


def best_path(y: Array) -> list[int]:
    """What the likeliest path of log-probabilities (T,V) says, which need not be the likeliest transcript."""
    return spoken(y.argmax(axis=1), y.shape[1] - 1)


def loss_of_paths(y: Array, labels: Sequence[int]) -> float:
    """The loss of a transcript by log-probabilities (T,V), from all V^T paths: the plain reference."""
    T, V = y.shape
    saying = [path for path in itertools.product(range(V), repeat=T) if spoken(path, V - 1) == list(labels)]
    return -math.log(sum(math.exp(sum(y[t, v] for t, v in enumerate(path))) for path in saying)) if saying else math.inf


def beam_search(y: Array, beams: int) -> tuple[list[int], float]:
    """The likeliest transcript that a search finds, and the logarithm of the probability of its paths that were followed.

    Parameters
    ----------
    y : (T,V) float64
        Log-probabilities; the blank is V - 1.
    beams : int
        Texts that are kept at each frame.
    """
    T, V = y.shape
    nodes = 1 + T * beams
    parent, label, child = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64), np.zeros((nodes, V - 1), np.int64)
    kept, found = np.zeros((2, beams), np.int64), np.empty((2, beams, V))
    logs = np.empty((4, beams))
    node, total = _search(parent, label, child, kept, logs, found, y, beams)
    labels = []
    while node > 0:
        labels.append(int(label[node]))
        node = parent[node]
    return labels[::-1], float(total)


@kernel
def _search(
    parent: Array, label: Array, child: Array, kept: Array, logs: Array, found: Array, y: Array, beams: int
) -> tuple[int, float]:
    """Returns the node of the best text, and its log-probability. Texts are nodes of a tree; node 0 is the empty one.

    kept (2,beams) : the texts, and where they come from in `found`
    logs (4,beams) : of each text that of paths that end with a blank, that of the others; both anew
    found (2,beams,V) : of each text with a label more, and last as it is: by paths that end with a blank, by the others
    """
    V, blank = y.shape[1], y.shape[1] - 1
    nodes, count = 1, 1
    kept[0, 0], logs[0, 0], logs[1, 0] = 0, 0.0, NEVER
    for t in range(len(y)):
        for k in range(count):
            ended, open_, last = logs[0, k], logs[1, k], label[kept[0, k]] if kept[0, k] > 0 else -1
            both = _add(ended, open_)
            for v in range(blank):
                found[0, k, v] = NEVER
                found[1, k, v] = y[t, v] + (ended if v == last else both)
            found[0, k, blank] = y[t, blank] + both
            found[1, k, blank] = y[t, last] + open_ if last >= 0 else NEVER
        for k in range(count):  # a text that is another kept one and a label is one of them only
            for j in range(count):
                node = kept[0, j]
                if node > 0 and parent[node] == kept[0, k]:
                    found[1, j, blank] = _add(found[1, j, blank], found[1, k, label[node]])
                    found[1, k, label[node]] = NEVER
        chosen = 0
        while chosen < beams:
            high, at, what = NEVER, -1, -1
            for k in range(count):
                for v in range(V):
                    total = _add(found[0, k, v], found[1, k, v])
                    if total > high:
                        high, at, what = total, k, v
            if at < 0:
                break
            logs[2, chosen], logs[3, chosen] = found[0, at, what], found[1, at, what]
            found[0, at, what], found[1, at, what] = NEVER, NEVER
            node = kept[0, at]
            if what < blank:
                if child[node, what] == 0:
                    child[node, what], parent[nodes], label[nodes] = nodes, node, what
                    nodes += 1
                node = child[node, what]
            kept[1, chosen] = node
            chosen += 1
        count = chosen
        kept[0, :count] = kept[1, :count]
        logs[:2, :count] = logs[2:, :count]
    return kept[0, 0], _add(logs[0, 0], logs[1, 0])
