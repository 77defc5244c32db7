"""A run on disk: its folder, who owns it, its state and checkpoints."""
