"""Text to tokens to files to windows. No MPI here."""
