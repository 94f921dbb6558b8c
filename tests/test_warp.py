"""Learnt operations: warps against scipy's resampling, colour against torchvision, gates against their definition."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms.v2 import functional as F

from autodo_dist.method import warp

SIZES = pytest.mark.parametrize("size", [(9, 9), (8, 8), (7, 12), (12, 7)], ids=str)
EACH = pytest.mark.parametrize("operations", [7, 10])
GENERIC = (0.31, -0.17, 0.11, 0.23, -0.19, 0.29, -0.37)


def pictures(size: tuple[int, int], samples: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size[0] * 100 + size[1])
    return torch.rand(samples, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def one_strength(operation: str, value: float) -> torch.Tensor:
    strengths = torch.zeros(1, len(warp.AFFINE), dtype=torch.float64)
    strengths[0, warp.AFFINE.index(operation)] = value
    return strengths


def resampled(image: torch.Tensor, linear: np.ndarray, shift: tuple[float, float]) -> torch.Tensor:
    """C × H × W through scipy: output pixel (x, y) about the centre reads input linear @ (x, y) + shift, in pixels."""
    height, width = image.shape[1:]
    swap = np.array([[0, 1], [1, 0]])  # scipy counts rows before columns
    to_rows = swap @ linear @ swap
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    offset = centre + np.array(shift)[::-1] - to_rows @ centre
    planes = [ndimage.affine_transform(p, to_rows, offset, order=1, mode="nearest") for p in image.numpy()]
    return torch.from_numpy(np.stack(planes))


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------- single operations


@SIZES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_strengths_of_zero_give_the_picture_back(size: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    images = pictures(size, 2, dtype)
    near(warp.warp(images, torch.zeros(2, 7, dtype=dtype)), images, tolerance)


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_quarter_turn_is_rot90(side: int, quarters: int) -> None:
    """Counter-clockwise as one sees it."""
    images = pictures((side, side))
    turned = warp.warp(images, one_strength("rotate", quarters * math.pi / 2))
    near(turned, torch.rot90(images, quarters, (2, 3)))


@SIZES
@pytest.mark.parametrize("pixels", [-3, -1, 2, 5])
@pytest.mark.parametrize("axis", [2, 3], ids=["translate_y", "translate_x"])
def test_translation_is_a_share_of_the_side(size: tuple[int, int], pixels: int, axis: int) -> None:
    images = pictures(size)
    side = images.shape[axis]
    name = {2: "translate_y", 3: "translate_x"}[axis]
    read = (torch.arange(side) + pixels).clamp(0, side - 1)
    near(warp.warp(images, one_strength(name, pixels / side)), images.index_select(axis, read))


@SIZES
@pytest.mark.parametrize("value", [-0.5, -0.2, 0.1, 0.45])
@pytest.mark.parametrize("operation", warp.AFFINE)
def test_each_operation_against_scipy(operation: str, value: float, size: tuple[int, int]) -> None:
    """Where a picture is not square, rotation and shear act on it stretched to a square and are stretched back."""
    height, width = size
    cos, sin, slope = math.cos(value), math.sin(value), width / height
    linear = {
        "rotate": [[cos, -sin * slope], [sin / slope, cos]],
        "shear_x": [[1, value * slope], [0, 1]],
        "shear_y": [[1, 0], [value / slope, 1]],
        "scale_x": [[math.exp(value), 0], [0, 1]],
        "scale_y": [[1, 0], [0, math.exp(value)]],
    }.get(operation, [[1, 0], [0, 1]])
    shift = {"translate_x": (value * width, 0.0), "translate_y": (0.0, value * height)}.get(operation, (0.0, 0.0))
    images = pictures(size)
    found = warp.warp(images, one_strength(operation, value))[0]
    near(found, resampled(images[0], np.array(linear), shift))
    assert (found - images[0]).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------------- composition


@SIZES
def test_all_operations_make_one_map_about_the_centre(size: tuple[int, int]) -> None:
    """Output to input: scale first, then shear, rotate and translate; one sampling."""
    height, width = size
    angle, right, down, shear_x, shear_y, log_x, log_y = GENERIC
    rotate = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    square = rotate @ np.array([[1, shear_x], [shear_y, 1]]) @ np.diag([math.exp(log_x), math.exp(log_y)])
    stretch = np.diag([width, height])
    linear = stretch @ square @ np.linalg.inv(stretch)
    images = pictures(size)
    found = warp.warp(images, torch.tensor([GENERIC], dtype=torch.float64))[0]
    near(found, resampled(images[0], linear, (right * width, down * height)))


@pytest.mark.parametrize("size", [(9, 9), (7, 13)], ids=str)
def test_the_centre_stays_without_translation(size: tuple[int, int]) -> None:
    strengths = torch.tensor([GENERIC], dtype=torch.float64)
    strengths[:, 1:3] = 0
    images = pictures(size)
    moved = warp.warp(images, strengths)
    centre = (slice(None), slice(None), size[0] // 2, size[1] // 2)
    near(moved[centre], images[centre])
    assert (moved - images).abs().mean() > 0.1


def test_each_sample_has_its_own_warp() -> None:
    images = pictures((8, 8), len(GENERIC))
    strengths = torch.diag_embed(torch.tensor(GENERIC, dtype=torch.float64))
    alone = [warp.warp(images[i : i + 1], strengths[i : i + 1]) for i in range(len(images))]
    near(warp.warp(images, strengths), torch.cat(alone))


# ---------------------------------------------------------------------------------------------------- gates, magnitudes


def draws(samples: int, operations: int, seed: int = 0) -> torch.Tensor:
    """Two uniform numbers an operation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(samples, 2 * operations, generator=generator, dtype=torch.float64)


def ranges(operations: int) -> torch.Tensor:
    return torch.tensor(warp.RANGES[:operations], dtype=torch.float64)


def parts(gate_logit: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The relaxed gate, sigmoid(logit + G₁ − G₀), and N(0, 1), by their definitions."""
    u, v = uniform.tensor_split(2, 1)
    normal = torch.tensor([[NormalDist().inv_cdf(x) for x in row] for row in v.tolist()], dtype=torch.float64)
    return torch.sigmoid(gate_logit + torch.log(u) - torch.log1p(-u)), normal


def test_start_values() -> None:
    gate, magnitude = torch.tensor(warp.start_logits(), dtype=torch.float64).sigmoid().tolist()
    assert gate == pytest.approx(0.2, rel=1e-14)
    assert magnitude == pytest.approx(0.5, rel=1e-14)
    assert len(warp.AFFINE) == 7
    assert (math.pi / 6, 0.45, 0.45, 0.30, 0.30, 0.50, 0.50, *[0.50] * len(warp.COLOR)) == warp.RANGES


@EACH
def test_strength_is_exactly_zero_or_the_whole_magnitude(operations: int) -> None:
    """The gate is 0 or 1 to the last bit: 1 where the relaxed gate is above 1/2."""
    uniform = draws(2000, operations)
    gate_logit = torch.linspace(-2, 2, operations, dtype=torch.float64).expand(2000, -1)
    magnitude_logit = torch.linspace(-1, 3, operations, dtype=torch.float64).expand(2000, -1)
    soft, normal = parts(gate_logit, uniform)
    found = warp.strengths(gate_logit, magnitude_logit, uniform)
    whole = torch.sigmoid(magnitude_logit) * normal * ranges(operations)
    torch.testing.assert_close(found, torch.where(soft > 0.5, whole, 0.0), rtol=1e-9, atol=0)
    # Gates of logit 50 and -50 are open and shut whatever is drawn, so the rest cancels exactly.
    opened = warp.strengths(torch.full_like(gate_logit, 50.0), magnitude_logit, uniform)
    shut = warp.strengths(torch.full_like(gate_logit, -50.0), magnitude_logit, uniform)
    assert torch.equal(shut, torch.zeros_like(shut))
    assert torch.equal(found, torch.where(soft > 0.5, opened, 0.0))


def test_gates_open_with_the_sigmoid_of_their_logit() -> None:
    """40,000 draws of each: within five deviations; so are magnitudes' variances, and gates do not hang together."""
    samples = 40_000
    gate_logit = torch.tensor([-3, -1.4, -0.5, 0, 0.5, 1.4, 3], dtype=torch.float64).expand(samples, -1)
    strengths = warp.strengths(gate_logit, torch.zeros_like(gate_logit), draws(samples, 7, 1))
    opened = (strengths != 0).double()
    probability = torch.sigmoid(gate_logit[0])
    assert ((opened.mean(0) - probability).abs() < 5 * (probability * (1 - probability) / samples).sqrt()).all()
    for k, extent in enumerate(ranges(7)):
        values = strengths[strengths[:, k] != 0, k] / (0.5 * extent)
        assert abs(values.mean()) < 5 / math.sqrt(len(values))
        assert abs(values.square().mean() - 1) < 5 * math.sqrt(2 / len(values))
    for a, b in itertools.combinations(range(7), 2):
        assert abs(torch.corrcoef(opened[:, [a, b]].T)[0, 1]) < 5 / math.sqrt(samples)


@EACH
def test_gate_derivative_is_that_of_the_relaxed_gate(operations: int) -> None:
    """Straight-through: also where the hard gate is shut."""
    uniform = draws(50, operations, 2)
    logit = torch.linspace(-2, 2, operations, dtype=torch.float64).repeat(50, 1).requires_grad_()
    magnitude_logit = torch.full_like(logit, 0.3).detach()
    soft, normal = parts(logit, uniform)
    expected = soft * torch.sigmoid(magnitude_logit) * normal * ranges(operations)
    found = warp.strengths(logit, magnitude_logit, uniform)
    assert ((soft > 0.5).any(0) & (soft < 0.5).any(0)).all()
    (a,), (b,) = (torch.autograd.grad(value.sum(), logit) for value in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


@EACH
def test_magnitude_derivative_against_finite_differences(operations: int) -> None:
    uniform, step = draws(20, operations, 3), 1e-5
    gate_logit = torch.zeros(20, operations, dtype=torch.float64)
    logit = torch.linspace(-2, 2, operations, dtype=torch.float64).repeat(20, 1).requires_grad_()
    (found,) = torch.autograd.grad(warp.strengths(gate_logit, logit, uniform).sum(), logit)
    up, down = (warp.strengths(gate_logit, logit.detach() + sign * step, uniform) for sign in (1, -1))
    near(found, (up - down) / (2 * step), 1e-9)
    assert ((found == 0) == (up == 0)).all()
    assert (found == 0).any()
    assert (found != 0).any()


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_at_the_ends_give_finite_strengths(dtype: torch.dtype, operations: int) -> None:
    ends = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)), dtype=torch.float64)
    ends = ends.repeat_interleave(operations, 1)
    logits = torch.zeros(2, 4, operations, dtype=dtype, requires_grad=True)
    found = warp.strengths(logits[0], logits[1], ends)
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert (found[:2] == 0).all()
    assert (found[2] < 0).all()
    assert (found[3] > 0).all()
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------------- colour


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ADJUST = {"brightness": F.adjust_brightness, "contrast": F.adjust_contrast, "saturation": F.adjust_saturation}
STRENGTHS = torch.tensor([[0.21, -0.34, 0.27], [-0.41, 0.28, -0.36]], dtype=torch.float64)


def normalised(pixels: torch.Tensor, back: bool = False) -> torch.Tensor:
    """(x − mean)/std by channel, or x from it."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return pixels * std + mean if back else (pixels - mean) / std


def middling(samples: int, size: tuple[int, int] = (7, 12)) -> torch.Tensor:
    """Pixels in 0.3..0.6, which the strengths above leave within 0..1, so that torchvision cuts nothing off."""
    return 0.3 + 0.3 * pictures(size, samples)


def colored(pixels: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    return normalised(warp.color(normalised(pixels), strengths, MEAN, STD), back=True)


def adjusted(pixels: torch.Tensor, strengths: torch.Tensor, order: tuple[str, ...]) -> torch.Tensor:
    """By torchvision, one operation after the other."""
    for operation in order:
        factors = strengths[:, warp.COLOR.index(operation)].exp().tolist()
        pairs = zip(pixels, factors, strict=True)
        pixels = torch.stack([ADJUST[operation](picture, factor) for picture, factor in pairs])
        assert 0 < pixels.min() < pixels.max() < 1
    return pixels


@pytest.mark.parametrize("operation", warp.COLOR)
def test_each_color_operation_against_torchvision(operation: str) -> None:
    pixels, strengths = middling(2), torch.zeros(2, 3, dtype=torch.float64)
    column = warp.COLOR.index(operation)
    strengths[:, column] = STRENGTHS[:, column]
    found = colored(pixels, strengths)
    near(found, adjusted(pixels, strengths, (operation,)))
    assert (found - pixels).abs().amax((1, 2, 3)).min() > 0.02


@pytest.mark.parametrize("order", list(itertools.permutations(warp.COLOR)), ids="-".join)
def test_color_operations_follow_each_other(order: tuple[str, ...]) -> None:
    """Each on what the one before leaves. In any order: without a cut at 0 and 1 they commute."""
    pixels = middling(2)
    near(colored(pixels, STRENGTHS), adjusted(pixels, STRENGTHS, order))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_color_strengths_of_zero_give_the_picture_back(dtype: torch.dtype, tolerance: float) -> None:
    images = normalised(pictures((8, 8), 2, dtype))
    found = warp.color(images, torch.zeros(2, 3, dtype=dtype), MEAN, STD)
    assert found.dtype == dtype
    near(found, images, tolerance)


def test_colors_are_not_cut_off() -> None:
    """Twice as bright is twice as bright, above 1 too."""
    pixels = pictures((8, 8))
    found = colored(pixels, torch.tensor([[math.log(2), 0, 0]], dtype=torch.float64))
    near(found, 2 * pixels)
    assert found.max() > 1.5


def test_color_derivatives_against_finite_differences() -> None:
    images, strengths = normalised(pictures((4, 3), 2)).requires_grad_(), STRENGTHS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: warp.color(images.detach(), s, MEAN, STD), strengths)
    assert torch.autograd.gradcheck(lambda x: warp.color(x, strengths.detach(), MEAN, STD), images)


def test_augment_warps_and_then_colors() -> None:
    """Seven strengths: the warp alone; ten: colour after it."""
    images = normalised(pictures((9, 8), 2))
    affine = torch.tensor([GENERIC, GENERIC[::-1]], dtype=torch.float64)
    warped = warp.warp(images, affine)
    assert torch.equal(warp.augment(images, affine, MEAN, STD), warped)
    found = warp.augment(images, torch.cat([affine, STRENGTHS], 1), MEAN, STD)
    assert torch.equal(found, warp.color(warped, STRENGTHS, MEAN, STD))
    assert (found - warped).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------------- derivatives


@SIZES
def test_warp_derivative_against_finite_differences(size: tuple[int, int]) -> None:
    """At strengths where no sampling point lies within a step of a pixel's border, where bilinear sampling bends."""
    images = pictures(size, 2)[:, :1]
    strengths = torch.tensor([GENERIC, GENERIC[::-1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: warp.warp(images, s), strengths, eps=1e-7, atol=1e-6, rtol=1e-6)


def test_pictures_get_a_gradient_only_if_asked() -> None:
    images = pictures((5, 5))
    strengths = torch.tensor([GENERIC], dtype=torch.float64, requires_grad=True)
    warp.warp(images, strengths).sum().backward()
    assert images.grad is None
    assert strengths.grad is not None
    assert torch.autograd.gradcheck(lambda x: warp.warp(x, strengths.detach()), images.requires_grad_())


@EACH
def test_a_rank_without_samples_augments_nothing(operations: int) -> None:
    """The last batch of a pass may leave a rank's piece empty; a backward runs there too."""
    images = torch.zeros(0, 3, 8, 8, dtype=torch.float64)
    strengths = torch.zeros(0, operations, dtype=torch.float64, requires_grad=True)
    found = warp.augment(images, strengths, MEAN, STD)
    assert found.shape == images.shape
    (grad,) = torch.autograd.grad(found.sum(), strengths)
    assert grad.shape == strengths.shape
