"""mpirun, started and watched."""
