"""SOP: sparse over-parameterization (Liu, Zhu, Qu & You, "Robust Training under Label Noise by Over-parameterization",
ICML 2022).

Wrong labels are sparse, so they are explained by a noise term of each sample that gradient descent from near 0 keeps
sparse,

    s_i = u_i∘u_i∘y_i − v_i∘v_i∘(1 − y_i),    u_i, v_i ∈ [−1, 1]^C,

beside the network's probabilities p_i. Cross entropy moves network and u, a squared error v:

    L_CE  = (1/B) Σ −log φ(p_i + s_i)_{y_i},    φ(x) = max(x, ε) / ‖max(x, ε)‖₁,    by θ and u_i
    L_MSE = (1/B) Σ ‖h_i + s_i − y_i‖²,         h_i the one-hot likeliest class,    by v_i

by SGD with a constant rate and no momentum for u and v, which start at N(0, 1e-8²) and are cut back to [−1, 1]. Of u_i
only the given label's entry enters, so one number is kept. ε = 1e-4 as in the authors' code; the extensions that make
SOP+ (consistency, class balance) are left out.

Shapes: B samples, C classes, N samples trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from autodo_dist.build import Parts
from autodo_dist.errors import AutodoError
from autodo_dist.experiment.rivals.loop import Phase, Rule, Site, phase, places

EPSILON = 1e-4
START = 1e-8  # standard deviation of u and v at first


@dataclass(frozen=True)
class Options:
    """The authors' for CIFAR-10 with uniform noise and batches of 128.

    lr_u, lr_v: learning rates of u and v. A sample's gradient is that of the batch's mean loss: it is 1/B of its own.
    """

    lr_u: float = 10.0
    lr_v: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise AutodoError(f"sop: {field.name} = {value:g}: not a finite number of at least 0; 10 is usual")


def phases(options: Options, here: Site, parts: Parts) -> list[Phase]:
    """All epochs with the noise terms' losses."""
    ids, label_N, device = here.split.train, here.split.label_N, here.ranks.device
    generator = torch.Generator().manual_seed(here.config.train.seed)
    start = START * torch.randn(len(ids), 1 + len(here.manifest.classes), generator=generator, dtype=torch.float64)
    u_N, v_NC = start[:, 0].to(device, parts.dtype), start[:, 1:].to(device, parts.dtype)
    rule = Sop(options, torch.from_numpy(ids).to(device), u_N, v_NC, here.config.train.label_smoothing)
    return [phase(here, parts.loaders.task, ids, label_N, rule)]


class Sop(Rule):
    """Both losses, with u and v of each of the sorted ids."""

    def __init__(
        self, options: Options, ids_N: torch.Tensor, u_N: torch.Tensor, v_NC: torch.Tensor, smoothing: float
    ) -> None:
        super().__init__(smoothing)
        self.options, self.ids_N, self.u_N, self.v_NC = options, ids_N, u_N, v_NC
        self._place_B, self._leaves = ids_N[:0], (u_N[:0], v_NC[:0])

    def losses(self, logits_BC: torch.Tensor, labels_B: torch.Tensor, ids_B: torch.Tensor) -> torch.Tensor:
        """See the module; the leaves are u and v of these samples."""
        self._place_B = places(self.ids_N, ids_B)
        u_B, v_BC = self.u_N[self._place_B].requires_grad_(), self.v_NC[self._place_B].requires_grad_()
        self._leaves = u_B, v_BC
        return losses(logits_BC, labels_B, u_B, v_BC, self.smoothing)

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's u (B) and v (B × C)."""
        return self._leaves

    @torch.no_grad()
    def after_backward(self) -> None:
        """A step of SGD on u and v, cut back to [−1, 1]."""
        for table, leaf, lr in zip(
            (self.u_N, self.v_NC), self._leaves, (self.options.lr_u, self.options.lr_v), strict=True
        ):
            assert leaf.grad is not None
            table[self._place_B] = (leaf - lr * leaf.grad).clamp(-1, 1)


def losses(
    logits_BC: torch.Tensor, labels_B: torch.Tensor, u_B: torch.Tensor, v_BC: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """l_CE + l_MSE of each sample: u and θ get a gradient from the first alone, v from the second alone."""
    classes = logits_BC.shape[1]
    given_BC = F.one_hot(labels_B, classes).to(logits_BC.dtype)
    added_BC, taken_BC = u_B.square()[:, None] * given_BC, v_BC.square() * (1 - given_BC)
    seen_BC = (logits_BC.softmax(1) + added_BC - taken_BC.detach()).clamp(min=EPSILON)
    soft_BC = (1 - smoothing) * given_BC + smoothing / classes
    cross_entropy_B = -(soft_BC * (seen_BC / seen_BC.sum(1, keepdim=True)).log()).sum(1)
    likeliest_BC = F.one_hot(logits_BC.detach().argmax(1), classes).to(logits_BC.dtype)
    squared_B = (likeliest_BC + added_BC.detach() - taken_BC - given_BC).square().sum(1)
    return cross_entropy_B + squared_B
