"""Comparisons of AutoDO with what else a practitioner would do with the same data."""
