"""ELR: early-learning regularization (Liu, Niles-Weed, Razavian & Fernandez-Granda, NeurIPS 2020).

A network first learns what the right labels have in common and memorises the wrong ones later. Targets t_i, a running
average of the network's own predictions, keep what was learnt early; the loss (eq. 6)

    L = (1/n) Σ CE(p_i, y_i) + (λ/n) Σ log(1 − ⟨p_i, t_i⟩)

pulls predictions towards them: its gradient cancels that of wrong labels. With every visit of sample i (eq. 9)

    t_i ← β t_i + (1 − β) p̄_i,    t_i = 0 at first,

p̄_i being p_i clamped to [1e-4, 1 − 1e-4], normalised to a sum of 1 and detached. The loss reads the clamped p_i and
the new t_i, as the authors' code does.

Shapes: B samples, C classes, N samples trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from autodo_dist.build import Parts
from autodo_dist.errors import AutodoError
from autodo_dist.experiment.rivals.loop import Phase, Rule, Site, phase, places

CLAMP = 1e-4


@dataclass(frozen=True)
class Options:
    """The authors' for CIFAR-10 with uniform noise.

    coefficient: λ. momentum: β, the share of a target that a visit keeps, 0 <= β < 1.
    """

    coefficient: float = 3.0
    momentum: float = 0.7

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise AutodoError(f"elr: coefficient = {self.coefficient:g}: not a number of at least 0; 3 is usual")
        if not 0 <= self.momentum < 1:
            raise AutodoError(f"elr: momentum = {self.momentum:g}: not at least 0 and below 1; 0.7 is usual")


def phases(options: Options, here: Site, parts: Parts) -> list[Phase]:
    """All epochs with the targets' loss."""
    ids, label_N, classes = here.split.train, here.split.label_N, len(here.manifest.classes)
    target_NC = torch.zeros(len(ids), classes, dtype=parts.dtype, device=here.ranks.device)
    rule = Elr(options, torch.from_numpy(ids).to(here.ranks.device), target_NC, here.config.train.label_smoothing)
    return [phase(here, parts.loaders.task, ids, label_N, rule)]


class Elr(Rule):
    """Cross entropy with the regularisation, and a target for each of the sorted ids."""

    def __init__(self, options: Options, ids_N: torch.Tensor, target_NC: torch.Tensor, smoothing: float) -> None:
        super().__init__(smoothing)
        self.options, self.ids_N, self.target_NC = options, ids_N, target_NC

    def losses(self, logits_BC: torch.Tensor, labels_B: torch.Tensor, ids_B: torch.Tensor) -> torch.Tensor:
        """See the module; renews the targets of these samples first."""
        place_B = places(self.ids_N, ids_B)
        target_BC = renewed(self.target_NC[place_B], logits_BC, self.options.momentum)
        self.target_NC[place_B] = target_BC
        return losses(logits_BC, labels_B, target_BC, self.options.coefficient, self.smoothing)


def renewed(target_BC: torch.Tensor, logits_BC: torch.Tensor, momentum: float) -> torch.Tensor:
    """The targets after a visit with these logits."""
    p_BC = clamped(logits_BC.detach())
    return momentum * target_BC + (1 - momentum) * p_BC / p_BC.sum(1, keepdim=True)


def losses(
    logits_BC: torch.Tensor, labels_B: torch.Tensor, target_BC: torch.Tensor, coefficient: float, smoothing: float = 0.0
) -> torch.Tensor:
    """CE(p, y) + λ log(1 − ⟨p, t⟩) of each sample."""
    cross_entropy_B = F.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=smoothing)
    return cross_entropy_B + coefficient * torch.log1p(-(clamped(logits_BC) * target_BC).sum(1))


def clamped(logits_BC: torch.Tensor) -> torch.Tensor:
    """Probabilities away from 0 and 1, so that the logarithm stays finite."""
    return logits_BC.softmax(1).clamp(CLAMP, 1 - CLAMP)
