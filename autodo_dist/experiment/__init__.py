"""Methods x data settings x seeds, each trained once, and one table of paired differences (docs/experiments.md)."""
