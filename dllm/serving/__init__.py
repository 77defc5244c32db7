"""A model that answers: the engine, which knows nothing of HTTP, and what stands in front of it."""
