"""AutoDO on clusters: per-sample augmentation, loss weights and soft labels for biased image data."""

__version__ = "0.1.0"
