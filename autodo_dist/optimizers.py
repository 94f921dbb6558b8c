"""The optimizer of the model: which class, which parameter groups, and how its state is saved.

A step along the gradient g of a parameter tensor w, with learning rate γ and weight decay β (for a norm or a bias 0,
unless `decay_norms`):

    sgd    m ← μ m + g + β w;  w ← w − γ m                                          torch.optim.SGD
    adamw  w ← (1 − γ β) w − γ m̂ / (√v̂ + ε)                                         torch.optim.AdamW
    lars   m ← μ m + λ (g + β w),  λ = η |w| / (|g| + β |w| + 1e-8);  w ← w − γ m   timm.optim.Lars
    lamb   r = m̂ / (√v̂ + ε) + β w;  w ← w − γ (|w| / |r|) r                         timm.optim.Lamb

lars: You et al. 2017, algorithm 1, but for γ, which stands there inside m: the same while γ is constant. lamb: You et
al. 2020, algorithm 2, with φ(x) = x. λ and |w| / |r| are 1 where a norm is 0, and for parameters that `decay_norms`
leaves out: they get plain sgd, or Adam. timm's and apex's own clipping of LAMB's gradient is switched off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from autodo_dist import nvidia_apex
from autodo_dist.config import LAYERWISE, Optim
from autodo_dist.errors import AutodoError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def build_optimizer(model: torch.nn.Module, optim: Optim, lr: float) -> torch.optim.Optimizer:
    """The optimizer of these settings over the model's parameters; lr: the peak, which `optim.lr` may be scaled to.

    Its state_dict holds everything that changes as tensors by parameter. AutodoError if its package is not there.
    """
    groups = parameter_groups(model, optim)
    made = optimizer_class(optim)(groups, lr=lr, **arguments(optim))
    if optim.name == "lamb" or (optim.implementation == "apex" and optim.name == "adamw"):
        step_by_parameter(made)
    scaled = f" (optim.lr = {optim.lr:g} for a batch of {optim.lr_batch_size})" if optim.lr_batch_size else ""
    log.info(
        "optimizer %s (%s): peak learning rate %g%s, weight decay %g on %d of %d parameter tensors",
        *(optim.name, optim.implementation, lr, scaled, optim.weight_decay),
        *(len(groups[0]["params"]), sum(len(group["params"]) for group in groups)),
    )
    return made


def optimizer_class(optim: Optim) -> Callable[..., torch.optim.Optimizer]:
    """The class, from the package that has it. AutodoError if that is not there, or lacks what this machine needs."""
    if optim.implementation == "apex":
        return nvidia_apex.optimizer(optim.name)
    if optim.name in LAYERWISE:
        try:
            from timm.optim.lamb import Lamb
            from timm.optim.lars import Lars
        except ImportError as error:
            raise AutodoError(
                f"optim.name = {optim.name}: timm, which has it, cannot be imported ({error}); "
                "pip install -r requirements.txt"
            ) from error
        return Lars if optim.name == "lars" else Lamb
    import torch

    return torch.optim.SGD if optim.name == "sgd" else torch.optim.AdamW


def parameter_groups(model: torch.nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """Parameters with weight decay, then, where norms and biases get none, those of one dimension or none."""
    every = list(model.parameters())
    decayed = [each for each in every if optim.decay_norms or each.ndim > 1]
    others = [each for each in every if not (optim.decay_norms or each.ndim > 1)]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": optim.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    if optim.name in LAYERWISE and optim.implementation == "torch":
        groups[0]["always_adapt"] = True  # timm would leave out groups without weight decay
    return groups


def arguments(optim: Optim) -> dict[str, Any]:
    """What the class is given beside groups and learning rate."""
    if optim.name in ("sgd", "lars"):
        # Nesterov's form of no momentum is refused by all of them.
        found: dict[str, Any] = {"momentum": optim.momentum, "nesterov": optim.nesterov and optim.momentum > 0}
    else:
        found = {"betas": optim.betas, "eps": optim.eps}
    if optim.implementation == "torch_fused":
        found["fused"] = True
    if optim.name == "lars":
        found["trust_coeff"] = optim.trust_coefficient
    if optim.name == "lamb" and optim.implementation == "torch":
        found["max_grad_norm"] = None
    if optim.name == "lamb" and optim.implementation == "apex":
        # use_nvlamb: the rate is adapted where there is no weight decay, too.
        found |= {"max_grad_norm": float("inf"), "use_nvlamb": optim.weight_decay == 0}
    if optim.implementation == "apex" and optim.name != "sgd":
        found["adam_w_mode"] = True
    return found


def numbers_per_parameter(optim: Optim) -> int:
    """How many numbers the optimizer keeps for each of the model's."""
    if optim.name in ("adamw", "lamb"):
        return 2
    return int(optim.momentum > 0 or optim.implementation == "apex")


def step_by_parameter(optimizer: torch.optim.Optimizer) -> None:
    """Have its state_dict hold the count of steps with each parameter, as a tensor, as torch.optim.AdamW's does.

    timm's Lamb and apex's FusedAdam and FusedLAMB count per parameter group, among the settings, which a checkpoint
    leaves out; without it their correction of the moments' bias would begin anew at a resume.
    """
    optimizer.register_state_dict_post_hook(_steps_to_state)
    optimizer.register_load_state_dict_pre_hook(_steps_to_groups)


def _steps_to_state(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    import torch

    state, groups = dict(state_dict["state"]), []  # what lies in them is the optimizer's own
    for group in state_dict["param_groups"]:
        step = torch.tensor(float(group.get("step", 0)))
        state |= {key: state[key] | {"step": step} for key in group["params"] if key in state}
        groups.append({name: value for name, value in group.items() if name != "step"})
    return state_dict | {"state": state, "param_groups": groups}


def _steps_to_groups(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state, groups = dict(state_dict["state"]), []
    for group in state_dict["param_groups"]:
        (step,) = {int(state[key]["step"]) for key in group["params"] if key in state} or {0}
        for key in group["params"]:
            state[key] = {name: value for name, value in state.get(key, {}).items() if name != "step"}
        groups.append(group | {"step": step})
    return state_dict | {"state": state, "param_groups": groups}
