"""The original code's warp, against what kornia 0.4.1 made of a small and a large picture."""

from __future__ import annotations

import pytest
import torch

from autodo_dist.method import compat

# Made with kornia 0.4.1 in float64 (its create_meshgrid, always float32, made float64 too) as the original code calls
# it: get_rotation_matrix2d about (W//2, H//2) with scales 1 + s, composed to shear · translation · rotation; for the
# small picture resize to 4H × 4W, warp_perspective with border_mode="border", resize to H × W; for the large one
# warp_perspective alone. The last row of strengths asks for nothing.
STRENGTHS = torch.tensor(
    [
        [0.30, 0.20, -0.15, 0.20, -0.10, 0.25, -0.20],
        [-0.45, -0.10, 0.25, -0.12, 0.22, -0.30, 0.15],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ],
    dtype=torch.float64,
)
SMALL = [
    [
        [0.256925521312, 0.423001570197, 0.385984531218, 0.227759087263, 0.399686478420, 0.269622552087],
        [0.494754496806, 0.420016225313, 0.832378299667, 0.462238474754, 0.102766303738, 0.234978619167],
        [0.761433739868, 0.906321102101, 0.713931227820, 0.512291741737, 0.167690380323, 0.275972027250],
        [0.677892657631, 0.477865110023, 0.291101637306, 0.337607083696, 0.267577889801, 0.165005131621],
        [0.243027966064, 0.200000000000, 0.200000000000, 0.257100316599, 0.362674592893, 0.165019886693],
        [0.200000000000, 0.200000000000, 0.200000000000, 0.205349040442, 0.328989333719, 0.279213418929],
    ],
    [
        [0.000000000000, 0.164623661541, 0.163035373582, 0.434472244669, 0.466468014509, 0.890886331080],
        [0.213554519158, 0.230110119163, 0.302469340657, 0.435852087986, 0.807511761031, 0.900000000000],
        [0.238322046931, 0.184164037875, 0.475904950143, 0.631800582408, 0.900000000000, 0.900000000000],
        [0.300460197652, 0.653483274183, 0.653246455857, 0.824019133118, 0.900000000000, 0.900000000000],
        [0.267409635433, 0.386401883728, 0.628419147890, 0.490796110549, 0.747922502095, 0.897925209545],
        [0.242339944040, 0.512308050187, 0.897469970894, 0.768212679999, 0.484202192123, 0.652806049061],
    ],
    [
        [0.035473586661, 0.253392862417, 0.139242674858, 0.476110586011, 0.471743007148, 0.864526413339],
        [0.586018357160, 0.211491131557, 0.139531213079, 0.655441613008, 0.693264303225, 0.493601208058],
        [0.392889369683, 0.816097774397, 0.208156973653, 0.736396982810, 0.294297170369, 0.895425847708],
        [0.922218181415, 0.777387501477, 0.153931910149, 0.105726089910, 0.485561458826, 0.489848180529],
        [0.574391540643, 0.562328686200, 0.145640359168, 0.253654632857, 0.693893438386, 0.117508344164],
        [0.221741714910, 0.370994801512, 0.141735586011, 0.362178602020, 0.273350735468, 0.565064722649],
    ],
]
LARGE = [  # of 224 × 224, at the pixels below
    [0.112892853034, 0.189274843036, 0.505022864250, 0.706789636041],
    [0.000000000000, 0.442754098508, 0.464927943146, 0.385507465640],
]
ROWS, COLUMNS = [30, 90, 140, 170], [40, 100, 60, 200]


def picture(side: int, samples: int = 1) -> torch.Tensor:
    """One channel of tenths, the same for each sample."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    tenths = (7 * row + 3 * column**2 + 2 * row * column) % 11
    return (tenths.double() / 10).expand(samples, 1, side, side)


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_small_pictures_are_kornias() -> None:
    near(compat.warp(picture(6, 3), STRENGTHS)[:, 0], torch.tensor(SMALL, dtype=torch.float64))


def test_large_pictures_are_kornias() -> None:
    """Without the enlargement."""
    found = compat.warp(picture(224, 2), STRENGTHS[:2])[:, 0, ROWS, COLUMNS]
    near(found, torch.tensor(LARGE, dtype=torch.float64))


def test_small_pictures_change_where_nothing_is_asked_for() -> None:
    images = picture(6)
    near(compat.resample(images)[:, 0], torch.tensor(SMALL[2:], dtype=torch.float64))
    assert (compat.resample(images) - images).abs().max() > 0.05


@pytest.mark.parametrize("size", [(224, 224), (100, 224), (256, 32)], ids=str)
def test_large_pictures_are_left_alone_where_nothing_is_asked_for(size: tuple[int, int]) -> None:
    images = torch.zeros(1, 1, *size)
    assert compat.resample(images) is images


def test_each_sample_and_channel_has_its_own_warp() -> None:
    images = torch.stack([picture(6, 3)[:, 0], 1 - picture(6, 3)[:, 0]], 1)
    found = compat.warp(images, STRENGTHS)
    near(found[:, 1], 1 - found[:, 0])
    near(found, torch.cat([compat.warp(images[i : i + 1], STRENGTHS[i : i + 1]) for i in range(3)]))


@pytest.mark.parametrize("size", [(6, 6), (5, 7)], ids=str)
def test_derivative_against_finite_differences(size: tuple[int, int]) -> None:
    """At strengths where no sampling point lies within a step of a pixel's border, where bilinear sampling bends."""
    images, strengths = picture(7, 2)[..., : size[0], : size[1]], STRENGTHS[:2].clone().requires_grad_()
    (grad,) = torch.autograd.grad(compat.warp(images, strengths).square().sum(), strengths)
    assert (grad != 0).all()
    assert torch.autograd.gradcheck(lambda s: compat.warp(images, s), strengths, eps=1e-7, atol=1e-6, rtol=1e-6)


def test_float32_is_close_to_float64() -> None:
    found = compat.warp(picture(6, 3).float(), STRENGTHS.float())
    assert found.dtype == torch.float32
    near(found[:, 0].double(), torch.tensor(SMALL, dtype=torch.float64), 1e-5)


@pytest.mark.parametrize("side", [8, 224])
def test_a_rank_without_samples_warps_nothing(side: int) -> None:
    """The last batch of a pass may leave a rank's piece empty; a backward runs there too."""
    images, strengths = torch.zeros(0, 3, side, side), torch.zeros(0, 7, requires_grad=True)
    found = compat.warp(images, strengths)
    assert found.shape == images.shape
    (grad,) = torch.autograd.grad(found.sum(), strengths)
    assert grad.shape == strengths.shape
    assert compat.resample(images).shape == images.shape
