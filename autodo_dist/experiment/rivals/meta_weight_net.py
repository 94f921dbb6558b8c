"""Meta-Weight-Net (Shu, Xie, Yi, Zhao, Zhou, Xu & Meng, NeurIPS 2019): a small network maps a loss to a weight.

The weight of train sample i is V(l_i; Θ), V one hidden layer of 100 ReLUs and a sigmoid. Each step (eqs. 3 to 5), with
learning rate α, learns Θ from a clean batch of m pictures through a virtual step of the classifier's weights θ,

    θ̂(Θ) = θ − α (1/n) Σ V(l_i(θ); Θ) ∇l_i(θ)        Θ ← Adam(Θ, ∇_Θ (1/m) Σ l_j(θ̂(Θ)))

and then takes the real one on (1/n) Σ V(l_i(θ); Θ) l_i(θ), by the run's own optimizer. V reads losses as numbers: no
gradient goes through its input. The virtual step is plain SGD; BatchNorm uses the batch's statistics in it and leaves
the running ones alone. The clean pictures come as the trainer's own validation gradient has them: shuffled, with the
window of evaluation, without logit adjustment. The authors train on the train part alone; with data.train_on=all clean
pictures are trained on, too.

Shapes: B train pictures, M clean ones, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from autodo_dist.build import Parts
from autodo_dist.data.loader import endless
from autodo_dist.errors import AutodoError
from autodo_dist.experiment.rivals.loop import Phase, Rule, Site, phase
from autodo_dist.models import Classifier

HIDDEN = 100
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Options:
    """The authors'. lr, weight_decay: of Adam on the weight network."""

    lr: float = 1e-3
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise AutodoError(f"meta_weight_net: {field.name} = {value:g}: not a finite number of at least 0")


def phases(options: Options, here: Site, parts: Parts) -> list[Phase]:
    """All epochs on what data.train_on names, the clean part being the meta set."""
    here.check_clean("meta_weight_net", ("train", "all"))
    for name, refused in (
        ("train.precision = fp16", here.config.train.precision == "fp16"),
        ("train.compile", here.config.train.compile),
    ):
        if refused:
            raise AutodoError(f"{name}: meta_weight_net differentiates through gradients; set bf16, or do not compile")
    rule = MetaWeightNet(options, here, parts)
    return [phase(here, parts.loaders.task, here.split.train, here.split.label_N, rule)]


class MetaWeightNet(Rule):
    """Cross entropy, weighted by a network that learns from the clean part before each step."""

    def __init__(self, options: Options, here: Site, parts: Parts) -> None:
        super().__init__(here.config.train.label_smoothing)
        self.net = weight_net(here.config.train.seed).to(here.ranks.device, parts.dtype)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=options.lr, weight_decay=options.weight_decay)
        self._model, self._clean = parts.model, endless(parts.loaders.hyper_validation, 0)
        self._pictures, self._dtype = parts.pictures, parts.dtype

    def prepare(self, images_BCHW: torch.Tensor, labels_B: torch.Tensor, adjustment_C: torch.Tensor, lr: float) -> None:
        """A step of Adam on the weight network, by the clean loss after a virtual step."""
        batch, logits = next(self._clean), logits_of(self._model)
        clean_MCHW = self._pictures.plain(batch.images_BCHW.to(self._dtype))

        def train_losses(weights: Weights) -> torch.Tensor:
            seen_BC = logits(weights, images_BCHW) + adjustment_C
            return F.cross_entropy(seen_BC, labels_B, reduction="none", label_smoothing=self.smoothing)

        def clean_loss(weights: Weights) -> torch.Tensor:
            return F.cross_entropy(logits(weights, clean_MCHW), batch.labels_B)

        weights = {name: value.detach().requires_grad_() for name, value in self._model.named_parameters()}
        found = meta_gradient(train_losses, clean_loss, weights, self.net, lr)
        for parameter, grad in zip(self.net.parameters(), found, strict=True):
            parameter.grad = grad
        self.optimizer.step()

    def losses(self, logits_BC: torch.Tensor, labels_B: torch.Tensor, ids_B: torch.Tensor) -> torch.Tensor:
        """V(l_i) l_i, with the weight as a number."""
        loss_B = super().losses(logits_BC, labels_B, ids_B)
        return sample_weights(self.net, loss_B).detach() * loss_B


def weight_net(seed: int) -> nn.Sequential:
    """V with start weights drawn from `seed`: losses (B × 1) to weights (B × 1) between 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1), nn.Sigmoid())


def sample_weights(net: nn.Module, loss_B: torch.Tensor) -> torch.Tensor:
    """V of each sample's loss, which is read as a number."""
    weight_B1: torch.Tensor = net(loss_B.detach()[:, None])
    return weight_B1[:, 0]


def logits_of(model: Classifier) -> Callable[[Mapping[str, torch.Tensor], torch.Tensor], torch.Tensor]:
    """The model as a function of its weights and pictures; statistics that it changes are copies."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    def logits(weights: Mapping[str, torch.Tensor], images_BCHW: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = functional_call(model, {**weights, **buffers}, (images_BCHW,))[1]
        return found

    return logits


def meta_gradient(
    train_losses: Callable[[Weights], torch.Tensor],
    clean_loss: Callable[[Weights], torch.Tensor],
    weights: Weights,
    net: nn.Module,
    lr: float,
) -> tuple[torch.Tensor, ...]:
    """∇_Θ of the clean loss at θ̂(Θ), for each parameter of `net`, by a backward through the virtual step's backward.

    train_losses: θ -> l_i (B). clean_loss: θ -> mean loss. `weights` are leaves that need gradients.
    """
    loss_B = train_losses(weights)
    weighted = (sample_weights(net, loss_B) * loss_B).mean()
    grads = torch.autograd.grad(weighted, list(weights.values()), create_graph=True)
    moved = {name: value - lr * grad for (name, value), grad in zip(weights.items(), grads, strict=True)}
    return torch.autograd.grad(clean_loss(moved), list(net.parameters()))
