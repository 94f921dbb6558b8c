"""What a run's settings say of DeepSpeed's, and whether the engine can be had: checked before anything starts."""

from __future__ import annotations

from typing import Any

from autodo_dist.config import READ_BY, Config
from autodo_dist.errors import AutodoError
from autodo_dist.parallel import deepspeed_settings
from autodo_dist.parallel.deepspeed_settings import Ours


def check(config: Config, ranks: int) -> None:
    """AutodoError if the batch does not divide, the engine is not installed, or its file contradicts settings."""
    batch, accumulate = config.train.batch_size, config.train.accumulate
    if accumulate > 1 and batch % (ranks * accumulate):
        divides = max(k for k in range(1, accumulate) if batch % (ranks * k) == 0 or k == 1)
        raise AutodoError(
            f"train.accumulate = {accumulate}: train.batch_size = {batch} does not divide by {ranks} ranks x "
            f"{accumulate} pieces; set train.accumulate={divides}, or "
            f"train.batch_size={-(-batch // (ranks * accumulate)) * ranks * accumulate}"
        )
    if config.engine.name == "deepspeed":
        deepspeed_settings.check_installed()
        of_deepspeed(config, ranks)


def of_deepspeed(config: Config, ranks: int) -> dict[str, Any]:
    """DeepSpeed's settings as a tree: those decided here, and those of engine.deepspeed_config."""
    return deepspeed_settings.merged(decided(config, ranks), config.engine.deepspeed_config)


def of_optimizer(config: Config) -> dict[str, Any]:
    """DeepSpeed's optimizer.params for the optimizer: the settings that it reads, momentum's form as it is used.

    Weight decay is that of the first parameter group, where optim.decay_norms is false.
    """
    read = {name: getattr(config.optim, name) for name, readers in READ_BY.items() if config.optim.name in readers}
    if "nesterov" in read:
        read["nesterov"] = config.optim.nesterov and config.optim.momentum > 0  # without momentum it is neither
    if "betas" in read:
        read["betas"] = list(config.optim.betas)  # as JSON has it
    return read | {"weight_decay": config.optim.weight_decay}


def decided(config: Config, ranks: int) -> dict[str, Ours]:
    """What settings say of DeepSpeed's, by its dotted key."""
    optim, train = config.optim, config.train
    # Parts differ by one picture where there is one piece of them; DeepSpeed reads it for reports of its own only.
    piece = -(-train.batch_size // (ranks * train.accumulate))
    scaled = "optim.lr" if optim.lr_batch_size is None else "optim.lr x train.batch_size / optim.lr_batch_size"
    return {
        "train_batch_size": Ours("train.batch_size", train.batch_size, passed=False),
        "train_micro_batch_size_per_gpu": Ours(f"train.batch_size over {ranks} ranks x train.accumulate", piece),
        "gradient_accumulation_steps": Ours("train.accumulate", train.accumulate),
        "gradient_clipping": Ours("optim.clip_norm", optim.clip_norm or 0.0),
        "optimizer.type": Ours("optim.name", optim.name, passed=False),
        "optimizer.params.lr": Ours(scaled, config.lr, passed=False),
        **{
            f"optimizer.params.{name}": Ours(f"optim.{name}", value, passed=False)
            for name, value in of_optimizer(config).items()
        },
        "zero_optimization.stage": Ours("engine.stage", config.engine.stage),
        "fp16.enabled": Ours("train.precision", False),
        "bf16.enabled": Ours("train.precision", False),
        "torch_autocast.enabled": Ours("train.precision", False),
    }
