"""dllm: decentralised training of LSTM language models over MPI ranks. The README shows the commands."""

__version__ = "0.2.0"
