"""Whether a run that is killed and started again is the run that would have been: real kills, bytes compared."""
