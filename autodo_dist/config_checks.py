"""Settings that contradict each other, whatever the data; each is refused with what to change."""

from __future__ import annotations

from autodo_dist.config import LAYERWISE, READ_BY, RECIPES, SOLVED_WITH, Config, Data, Engine, Hyper, Optim
from autodo_dist.errors import AutodoError


def check_consistent(config: Config) -> None:
    """AutodoError for settings that contradict each other, whatever the data."""
    if config.optim.warmup_epochs >= config.train.epochs:
        raise AutodoError(
            f"optim.warmup_epochs = {config.optim.warmup_epochs:g}: not below train.epochs = {config.train.epochs}; "
            "lower it"
        )
    check_data(config)
    check_engine(config)
    check_optimizer(config)
    check_clean(config)
    check_groups(config)
    if config.learn.anything:
        check_learning(config)
    elif config.history.ids:
        raise AutodoError("history.ids: nothing is learnt of any sample, so there are no rows to keep; leave it out")


def remarks(config: Config) -> list[str]:
    """What may not be as it was meant, though nothing is wrong: a line for each."""
    found = []
    for section, preset in RECIPES.get(str(config.recipe), {}).items():
        for name, wanted in preset.items():
            if (value := getattr(getattr(config, section), name)) != wanted:
                found.append(f"{section}.{name} = {value} is set, and not {wanted} as in recipe: {config.recipe}")
    for name, readers in SOLVED_WITH.items():
        value = getattr(config.hyper, name)
        if config.learn.anything and config.solver not in readers and value != Hyper.model_fields[name].default:
            found.append(f"hyper.{name} = {value} is not read: hyper.solver = {config.solver}")
    return found


def check_data(config: Config) -> None:
    """AutodoError for settings of pictures that nothing reads, or that exclude each other."""
    data = config.data
    for name, needs in (
        ("erase_area", data.erase != "none"),
        ("erase_probability", data.erase != "none"),
        ("policy_operations", data.policy in ("randaugment", "random_subset")),
        ("policy_strength", data.policy in ("randaugment", "random_subset")),
        ("most_dropped", data.on_error == "skip"),
    ):
        if not needs and getattr(data, name) != Data.model_fields[name].default:
            raise AutodoError(
                f"data.{name} = {getattr(data, name)}: changes nothing here (see `autodo settings`); leave it out"
            )
    if data.decoder == "pil" and data.device == "gpu":
        raise AutodoError("data.device = gpu: PIL decodes on the CPU; set data.decoder to auto, or data.device=auto")
    if data.stage_to and data.cache:
        raise AutodoError("data.stage_to and data.cache: set one; both keep shards, one first, the other meanwhile")
    if (data.policy == "custom") != bool(data.sub_policies):
        raise AutodoError(
            f"data.policy = {data.policy}: custom and data.sub_policies belong together; set both or neither"
        )


def check_groups(config: Config) -> None:
    """AutodoError for a part of a group of hyperparameters that is not learnt, or does not go with other settings."""
    learn = config.learn
    if learn.color and learn.augment == "none":
        raise AutodoError(
            "learn.color = true: a part of learnt augmentation; set learn.augment to shared or per_sample"
        )
    if learn.color and config.compat is not None:
        raise AutodoError("learn.color = true: not in the original code; set compat to null, or learn.color=false")
    if config.train.label_smoothing and learn.soft_label:
        raise AutodoError("train.label_smoothing: soft labels are learnt; set learn.smoothing, their start, instead")
    if learn.augment != "none" and config.train.precision == "fp16":
        raise AutodoError(
            "train.precision = fp16: learnt augmentation takes gradients through the encoder that are too small for "
            "float16; set train.precision=bf16, or learn.augment=none"
        )
    if learn.ensembling and not learn.soft_label:
        raise AutodoError(
            f"learn.ensembling = {learn.ensembling:g}: it is soft labels that follow predictions; set "
            "learn.soft_label=true too, or learn.ensembling=0"
        )
    if learn.normalize_weights and not learn.weight:
        raise AutodoError("learn.normalize_weights = true: there are no weights; set learn.weight=true too")


def check_learning(config: Config) -> None:
    """AutodoError for a run that learns what it could never begin to, or by an inverse that there is not."""
    learn, hyper, epochs = config.learn, config.hyper, config.train.epochs
    if learn.ensembling and config.ensembling_epoch >= epochs:
        raise AutodoError(
            f"learn.ensembling_from = {learn.ensembling_from:g}: soft labels would not begin to move in any of "
            f"{epochs} epochs; lower it, or set learn.ensembling=0"
        )
    if hyper.start_epoch >= epochs:
        raise AutodoError(
            f"hyper.start_epoch = {hyper.start_epoch}: not below train.epochs = {epochs}, so that nothing would "
            "be learnt; lower it, or switch off learn.augment, learn.weight and learn.soft_label"
        )
    if config.solver == "cg" and hyper.damping < config.optim.weight_decay:
        raise AutodoError(
            f"hyper.damping = {hyper.damping:g}: below optim.weight_decay = {config.optim.weight_decay:g}, which is "
            "part of the Hessian that cg inverts; raise it"
        )


def check_clean(config: Config) -> None:
    """AutodoError for uses of the clean validation part that exclude each other."""
    learn, train_on = config.learn, config.data.train_on
    if train_on != "train" and learn.anything:
        raise AutodoError(
            f"data.train_on = {train_on}: rows are learnt from clean pictures that are not trained on at the time; "
            "leave it out, and set learn.clean_folds (10 in recipe: autodo) to train on the clean part in turn"
        )
    if learn.clean_folds and not learn.anything:
        raise AutodoError(f"learn.clean_folds = {learn.clean_folds}: nothing is learnt; set data.train_on=all instead")
    if learn.clean_folds == 1:
        raise AutodoError("learn.clean_folds = 1: no clean picture would be trained on; set 0, or 2 and more")


def check_engine(config: Config) -> None:
    """AutodoError for settings that the engine cannot serve, each with the reason."""
    engine, default = config.engine, Engine.model_fields
    if engine.name == "ddp":
        for name in ("stage", "deepspeed_config"):
            value = getattr(engine, name)
            if value != default[name].default:
                raise AutodoError(f"engine.{name} = {value}: changes nothing with DDP; set engine.name=deepspeed too")
        return
    if config.train.precision == "fp64":
        raise AutodoError(
            "train.precision = fp64: DeepSpeed averages and keeps float32 numbers; set engine.name=ddp, or "
            "train.precision=fp32"
        )
    if config.train.precision == "fp16":
        raise AutodoError("train.precision = fp16: not served with DeepSpeed; set bf16, or engine.name=ddp")
    if config.optim.implementation == "apex":
        raise AutodoError(
            "optim.implementation = apex: never tried with engine.name = deepspeed; set optim.implementation=torch or "
            "torch_fused, or engine.name=ddp"
        )
    if engine.stage > 0 and config.optim.name in LAYERWISE:
        raise AutodoError(
            f"optim.name = {config.optim.name}: a step needs the norm of each whole parameter, and engine.stage = "
            f"{engine.stage} keeps flat parts of them; set engine.stage=0, or engine.name=ddp"
        )
    if engine.stage == 3 and config.train.compile:
        raise AutodoError(
            "train.compile: DeepSpeed's hooks of engine.stage = 3 cut the encoder at each layer, and steps would be "
            "compiled anew; set engine.stage=2, or train.compile=false"
        )
    if engine.stage == 3 and config.train.average is not None:
        raise AutodoError(
            "train.average: needs whole weights, which engine.stage = 3 cuts over the ranks; set engine.stage=2, or "
            "train.average=null"
        )
    augment = config.learn.augment
    if engine.stage == 3 and config.hyper.way == "shared" and augment != "none" and config.solver != "fisher":
        raise AutodoError(
            f"engine.stage = 3: gathers weights for one backward a forward, and learn.augment = {augment} with "
            f"hyper.way = shared and {config.solver} takes two; set engine.stage=2, or hyper.way=separate"
        )


def check_optimizer(config: Config) -> None:
    """AutodoError for a setting that the optimizer does not read, or an implementation that it does not have."""
    optim, asked = config.optim, f"optim.implementation = {config.optim.implementation}"
    for name, readers in READ_BY.items():
        value = getattr(optim, name)
        if optim.name not in readers and value != Optim.model_fields[name].default:
            raise AutodoError(
                f"optim.{name} = {value}: {optim.name} does not read it, {' and '.join(readers)} would; leave it out"
            )
    if optim.implementation == "torch_fused" and optim.name in LAYERWISE:
        raise AutodoError(f"{asked}: PyTorch has no fused {optim.name}; set optim.implementation=torch")
    if optim.implementation != "apex":
        return
    if optim.name == "lars":
        raise AutodoError(f"{asked}: apex has no LARS (LARC left it in 2025); set optim.implementation=torch")
    if config.train.device == "cpu":
        raise AutodoError(f"{asked}: its kernels run on GPUs, and train.device = cpu; set one of them otherwise")
    if config.train.precision == "fp64":
        raise AutodoError(f"{asked}: it has no float64, train.precision = fp64; set optim.implementation=torch")
    if optim.name == "lamb" and optim.weight_decay == 0 and not optim.decay_norms:
        raise AutodoError(
            f"{asked}: FusedLAMB adapts the rate where there is weight decay, and optim.weight_decay = 0; set it, or "
            "optim.decay_norms=true, or optim.implementation=torch"
        )
