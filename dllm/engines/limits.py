"""What a server puts up with: connections, bodies, requests at once, time; and what one request may ask for."""

from dataclasses import dataclass

MOST_NUMBERS = 32  # times the tokens of a choice, or of a source: what one request may hold


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one rank. Times in seconds."""

    body: int = 1 << 20  # bytes
    prompt: int = 32768  # tokens
    source: int = 8192  # tokens or frames of one that is read as a whole
    tokens: int = 4096  # that a request may ask for, each choice
    requests: int = 256  # that generate, score or embed at once
    connections: int = 512  # beyond it those that have waited longest go
    head: float = 10.0  # for a whole request head
    upload: float = 20.0  # for a whole body
    deadline: float = 600.0  # for a whole request

    @property
    def numbers(self) -> int:
        """Tokens and alternatives that a request may hold, of all its choices, or of all texts that a search keeps."""
        return MOST_NUMBERS * self.tokens

    @property
    def attention(self) -> int:
        """Tokens of a source, once for each text that a search keeps: each of them attends to all."""
        return MOST_NUMBERS * self.source
