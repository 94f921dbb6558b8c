"""What a run's settings say of DeepSpeed's, and whether the engine can be had: checked before anything starts."""

from __future__ import annotations

from typing import Any

from autodo_dist.config import Config
from autodo_dist.parallel import deepspeed_settings
from autodo_dist.parallel.deepspeed_settings import Ours


def check(config: Config, ranks: int) -> None:
    """AutodoError if the engine is not installed, or its file contradicts settings or number of ranks."""
    if config.engine.name == "deepspeed":
        deepspeed_settings.check_installed()
        of_deepspeed(config, ranks)


def of_deepspeed(config: Config, ranks: int) -> dict[str, Any]:
    """DeepSpeed's settings as a tree: those decided here, and those of engine.deepspeed_config."""
    return deepspeed_settings.merged(decided(config, ranks), config.engine.deepspeed_config)


def nesterov(config: Config) -> bool:
    """Whether the momentum is Nesterov's; without momentum it is neither."""
    return config.optim.nesterov and config.optim.momentum > 0


def decided(config: Config, ranks: int) -> dict[str, Ours]:
    """What settings say of DeepSpeed's, by its dotted key."""
    optim, train = config.optim, config.train
    part = -(-train.batch_size // ranks)  # parts differ by one picture; DeepSpeed reads it for reports of its own only
    return {
        "train_batch_size": Ours("train.batch_size", train.batch_size, passed=False),
        "train_micro_batch_size_per_gpu": Ours(f"train.batch_size over {ranks} ranks", part),
        "gradient_accumulation_steps": Ours("train.batch_size in one piece", 1),
        "gradient_clipping": Ours("optim.clip_norm", optim.clip_norm or 0.0),
        "optimizer.type": Ours("this program", "SGD", passed=False),
        "optimizer.params.lr": Ours("optim.lr", optim.lr, passed=False),
        "optimizer.params.momentum": Ours("optim.momentum", optim.momentum, passed=False),
        "optimizer.params.nesterov": Ours("optim.nesterov", nesterov(config), passed=False),
        "optimizer.params.weight_decay": Ours("optim.weight_decay", optim.weight_decay, passed=False),
        "zero_optimization.stage": Ours("engine.stage", config.engine.stage),
        "fp16.enabled": Ours("train.precision", False),
        "bf16.enabled": Ours("train.precision", False),
        "torch_autocast.enabled": Ours("train.precision", False),
    }
