"""Starts the ranks of a run, on this machine or on a Slurm cluster, and says why one of them ended."""
