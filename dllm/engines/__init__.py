"""What can be asked of a model, and the engine of each kind, which computes it for many at a time."""
