"""From settings to the optimizer and the engine around it."""

from __future__ import annotations

import torch

from autodo_dist import engine_settings
from autodo_dist.config import Config
from autodo_dist.models import Classifier
from autodo_dist.optimizers import build_optimizer
from autodo_dist.parallel.comm import Ranks
from autodo_dist.parallel.deepspeed_engine import build_deepspeed_engine
from autodo_dist.parallel.engine import DdpEngine, Engine


def build_engine(config: Config, model: Classifier, ranks: Ranks) -> Engine:
    """Optimizer and data-parallel engine around the model. Every rank must call this."""
    optimizer = build_optimizer(model, config.optim, config.lr)
    if config.engine.name == "deepspeed":
        settings = engine_settings.of_deepspeed(config, ranks.ranks)
        return build_deepspeed_engine(model, optimizer, ranks, config.engine.stage, settings)
    scaler = torch.amp.GradScaler(ranks.device.type) if config.train.precision == "fp16" else None
    engine = DdpEngine(model, optimizer, ranks, config.optim.clip_norm, scaler)
    size, dtype = config.data.image_size, next(model.parameters()).dtype
    engine.settle(torch.zeros(1, 3, size, size, device=ranks.device, dtype=dtype))
    return engine
