"""Allreduce of compressed gradients: all ranks keep the same parameters, each remembers what its messages left out."""

import numpy as np

from ...errors import UserError
from ...kernels.compress import add_signs, pack_signs
from ...kernels.types import Array
from .. import compression
from ..powersgd import PowerSGD
from ..runtime import agree
from ..traffic import sent_by_allgather, sent_by_allreduce
from .base import WholeVector


class CompressedAllreduce(WholeVector):
    """The mean of compressed gradients.

        p_i = g_i + e_i;   message Q(p_i);   e_i <- p_i - Q(p_i)    error feedback (Stich et al. 2018, Karimireddy et al. 2019)
        x  <- x - lr mean of all Q(p_j)

    averaging.compression : powersgd (Vogels et al. 2019: the factors are averaged), signum (Bernstein et al. 2019: a majority
    vote on the signs of momenta, with no memory of errors), or what compression.LOSSY has
    """

    compressions = ("powersgd", "signum", *compression.LOSSY)

    def prepare(self) -> None:
        config, dtype = self.config, self.x.dtype
        self.P = sum(int(np.prod(shape)) for shape in self.tensors.shapes)
        kind = config.compression
        if kind == "powersgd":
            self.average_of = PowerSGD(self.comm, self.tensors.shapes, dtype, config.rank, self.seed, self.oversubscribed)
            self.arrays |= self.average_of.arrays
        elif kind == "signum":
            if self.optimizer.clip and self.optimizer.clip_by != "own":
                raise UserError.of_all(
                    "averaging.compression = signum makes every gradient +1 or -1, which train.clip would undo: "
                    "take train.clip = 0, or train.clip_by = own"
                )
            self.momentum = self.array("momentum", self.P)
            self.payloads(-(-self.P // 8) + 1)  # the last byte: this rank's gradient is not finite
        elif kind != "none":
            self.Q = agree(
                self.comm, compression.make_compressor, kind, self.tensors.shapes, dtype, config.fraction, self.seed, True
            )
            self.feedback = compression.ErrorFeedback(self.Q)
            self.arrays["error"] = self.feedback.memory
            self.payloads(self.Q.size)
        self.combine = {"powersgd": self._powersgd, "signum": self._signum, "none": None}.get(kind, self._gathered)

    def payloads(self, size: int) -> None:
        """Make room for a message (size,) of this rank, and for those of all ranks."""
        self.payload, self.everyones = np.zeros(size, np.uint8), np.zeros((self.comm.size, size), np.uint8)

    def direction(self, g: Array) -> Array:
        if self.combine is None:
            self.mean(g, g)
        else:
            standard = self.tensors.pack(g)
            self.combine(standard)
            self.tensors.unpack(standard, g)
        self.used = slice(None)  # other ranks' rows are in it now
        return g

    def _powersgd(self, g: Array) -> None:
        with self.exposed():
            self.average_of.average(g)
        self.unsound = self.average_of.unsound
        self.bytes_sent += sent_by_allreduce(self.average_of.size, self.comm.size)

    def _gathered(self, g: Array) -> None:
        self.feedback.encode(g, self.payload, self.step, self.comm.rank)
        self.unsound = not np.isfinite(g).all()
        self._gather()
        g[:] = 0
        for payload in self.everyones:
            self.Q.add(payload, g, 1 / self.comm.size)
        if not (self.unsound or np.isfinite(g).all()):  # all leave this step out: what was sent is still to be sent
            self.Q.add(self.payload, self.feedback.memory)

    def _signum(self, g: Array) -> None:
        m, mu = self.momentum, self.config.momentum
        self.unsound = not np.isfinite(g).all()
        if not self.unsound:
            m *= mu
            m += (1 - mu) * g
        neither = 1 if (self.step + self.comm.rank) % 2 else -1  # votes of ranks, and of steps, that cancel
        pack_signs(self.payload[:-1], np.where(m == 0, m.dtype.type(neither), m))
        self.payload[-1] = self.unsound
        self._gather()
        g[:] = 0
        for payload in self.everyones:
            add_signs(g, payload[:-1], 1.0)
        np.sign(g, out=g)
        if self.everyones[:, -1].any():
            g[:] = np.nan

    def _gather(self) -> None:
        self.wait(self.comm.Iallgather(self.payload, self.everyones))
        self.bytes_sent += sent_by_allgather(self.payload.nbytes, self.comm.size)
