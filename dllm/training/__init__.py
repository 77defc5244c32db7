"""The training run on one rank."""
