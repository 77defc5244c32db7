"""The sizes that are compared: B lanes and T steps a rank."""

from typing import NamedTuple


class Size(NamedTuple):
    """A language model with as many embedding as hidden units, and what a rank computes of it in a step."""

    vocabulary: int
    hidden: int
    layers: int
    lanes: int
    window: int

    @property
    def flops(self) -> int:
        """Floating-point operations of a step on one rank: 6 x active parameters x tokens."""
        active = 8 * self.layers * self.hidden**2 + self.vocabulary * self.hidden
        return 6 * active * self.lanes * self.window


SIZES = {
    "ptb-small": Size(10000, 200, 2, 20, 20),
    "ptb-medium": Size(10000, 650, 2, 20, 35),
    "char": Size(256, 512, 2, 64, 64),
    "ptb-large": Size(10000, 1500, 2, 20, 35),
}
NETWORK = Size(65, 512, 1, 4, 32)  # of tinyshakespeare, where hosts have slow links
