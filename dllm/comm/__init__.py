"""Everything that talks MPI. Knows flat arrays, slices and callbacks, never a model."""
