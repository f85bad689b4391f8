"""Rendered sprites against closed forms, and the factor grid's own arithmetic."""

import numpy as np
import pytest
import torch

from common.datasets import load
from common.datasets.prepare import write_sprites
from common.datasets.sprites import (
    ELLIPSE_RATIO,
    REACH,
    SQUARE_HALF_SIDE,
    UNIT,
    Sprites,
    pack,
    render,
    unpack,
)
from common.errors import UserError

SQUARE, ELLIPSE, HEART = range(3)


@pytest.fixture(scope="module")
def sprites():
    return load("sprites")


def areas(grid, factors):
    return (grid.images_at(grid.index_of(factors)) > 0).sum(dim=(1, 2, 3)).numpy()


def render_ref(shape, scale, turn, x, y, side=64):
    """One sprite, sample by sample in float64."""
    image = np.zeros((side, side), np.uint8)
    radius, cos, sin = UNIT * side * scale, np.cos(turn), np.sin(turn)
    for row in range(side):
        for column in range(side):
            hits = 0
            for dv in (0.25, 0.75):
                for du in (0.25, 0.75):
                    u = (column + du - (0.25 + 0.5 * x) * side) / radius
                    v = (row + dv - (0.25 + 0.5 * y) * side) / radius
                    a, b = cos * u + sin * v, -sin * u + cos * v
                    if shape == 1:
                        hits += max(abs(a), abs(b)) < SQUARE_HALF_SIDE
                    elif shape == 2:
                        hits += a**2 + (b / ELLIPSE_RATIO) ** 2 < 1
                    else:
                        p, q = 1.15 * a, -1.15 * b
                        hits += (p**2 + q**2 - 0.7) ** 3 - p**2 * q**3 < 0
            image[row, column] = 255 * (hits >= 2)
    return image


@pytest.mark.parametrize("shape", [1, 2, 3])
def test_render_equals_the_plain_rendering(shape):
    rng = np.random.default_rng(shape)
    for _ in range(4):
        scale, turn, x, y = rng.uniform(0.5, 1), rng.uniform(0, 2 * np.pi), rng.uniform(), rng.uniform()
        drawn = render(np.array([shape]), np.array([scale]), np.array([turn]), np.array([x]), np.array([y]))
        # a sample within float32 rounding of the outline may fall on either side
        assert (drawn[0] != render_ref(shape, scale, turn, x, y)).sum() <= 1


def test_a_batch_equals_its_items(sprites):
    rows = np.random.default_rng(0).integers(0, len(sprites), 200)
    batch = sprites.images_at(rows)
    assert torch.equal(batch, torch.stack([sprites[int(row)][0] for row in rows]))
    assert set(np.unique(batch)) == {0, 255}


def test_areas_grow_with_the_square_of_the_scale(sprites):
    scales = np.linspace(0.5, 1, 6)
    radius = UNIT * 64
    unit = {SQUARE: (2 * SQUARE_HALF_SIDE * radius) ** 2, ELLIPSE: np.pi * ELLIPSE_RATIO * radius**2}
    # the heart's area by a fine sum over its inequality
    p, q = np.meshgrid(*[(np.arange(1000) + 0.5) * 0.003 - 1.5] * 2)
    unit[HEART] = ((p * p + q * q - 0.7) ** 3 < p * p * q * q * q).mean() * 9 * (radius / 1.15) ** 2
    for shape, expected in unit.items():
        # the mean over orientations and positions takes the pixel grid out
        places = [(o, x, y) for o in range(0, 39, 3) for x in (3, 14, 25) for y in (5, 16)]
        means = [areas(sprites, [(shape, code, *place) for place in places]).mean() for code in range(6)]
        # a pixel half covered is white, which adds a rim: area = quadratic * scale^2 + rim * scale
        (quadratic, rim), *_ = np.linalg.lstsq(np.stack([scales**2, scales], axis=1), np.array(means), rcond=None)
        assert abs(quadratic / expected - 1) < 0.03
        assert 0 < rim < 0.2 * 4 * np.sqrt(expected)  # at most 0.2 pixels along the outline


def test_orientation_covers_a_whole_turn(sprites):
    factors = np.array([(HEART, 5, o, 16, 16) for o in range(40)])
    images = sprites.images_at(sprites.index_of(factors))[:, 0]
    assert torch.equal(images[0], images[39])  # 0 and 2 pi, as in dSprites
    assert len({bytes(image.numpy()) for image in images}) == 39
    # the heart's centre of mass is not its origin, and turns about it
    rows, columns = np.mgrid[:64, :64]
    centre = 16 + 32 * 16 / 31
    angles = []
    for image in (images > 0).numpy():
        angles.append(np.arctan2(rows[image].mean() + 0.5 - centre, columns[image].mean() + 0.5 - centre))
    turned = np.unwrap(angles)
    steps = np.diff(turned)
    assert abs(turned[-1] - turned[0] - 2 * np.pi) < 1e-9
    assert np.abs(steps - 2 * np.pi / 39).max() < 0.45  # one way round, in about equal steps


def test_a_half_turn_leaves_ellipses_and_a_quarter_squares():
    for shape, turn in ((1, np.pi / 2), (2, np.pi)):
        start = np.linspace(0.1, 1, 10)
        fixed = [np.full(10, shape), np.full(10, 0.8)]
        place = [np.full(10, 0.3), np.full(10, 0.6)]
        a, b = render(*fixed, start, *place), render(*fixed, start + turn, *place)
        assert (a != b).sum(axis=(1, 2)).max() <= 1


@pytest.mark.parametrize("shape", [SQUARE, ELLIPSE, HEART])
def test_centroids_are_affine_in_the_position(sprites, shape):
    positions = np.arange(32)
    rows, columns = np.mgrid[:64, :64]
    for axis, mesh, other in ((3, columns, rows), (4, rows, columns)):
        factors = np.tile([shape, 5, 0, 9, 20], (32, 1))
        factors[:, axis] = positions
        masks = (sprites.images_at(sprites.index_of(factors))[:, 0] > 0).numpy()
        moving = np.array([mesh[mask].mean() for mask in masks])
        still = np.array([other[mask].mean() for mask in masks])
        slope, offset = np.polyfit(positions, moving, 1)
        assert abs(slope - 32 / 31) < 0.02
        assert np.abs(moving - (slope * positions + offset)).max() < 0.5
        assert np.ptp(still) < 0.5
        if shape != HEART:  # the centre of mass is the centre: at 0.25 of the side, in pixel centres
            assert abs(offset - 15.5) < 0.3


def test_no_sprite_reaches_the_border_nor_beyond_its_patch():
    corners = np.array([(x, y) for x in (0, 1) for y in (0, 1)], float)
    for shape, reach in enumerate(REACH, start=1):
        for turn in np.linspace(0, 2 * np.pi, 40):
            images = render(np.full(4, shape), np.ones(4), np.full(4, turn), *corners.T)
            assert not images[:, [0, -1]].any() and not images[:, :, [0, -1]].any()
            rows, columns = np.nonzero(images[0])
            distance = np.hypot(rows + 0.5 - 16, columns + 0.5 - 16).max()
            assert distance < reach * UNIT * 64 + 0.8


def test_grid_arithmetic(sprites):
    assert sprites.factor_names == ["shape", "scale", "orientation", "posX", "posY"]
    assert sprites.factor_sizes == (3, 6, 40, 32, 32) and len(sprites) == 737280
    rows = np.random.default_rng(1).integers(0, len(sprites), 1000)
    factors = sprites.factors_of(rows)
    np.testing.assert_array_equal(sprites.index_of(factors), rows)
    bases = np.array([245760, 40960, 1024, 32, 1])  # the last factor varies fastest
    np.testing.assert_array_equal(factors @ bases, rows)
    assert sprites[245760][1].tolist() == [1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="factors"):
        sprites.index_of([1, 2, 3])
    with pytest.raises(ValueError):
        sprites.index_of([3, 0, 0, 0, 0])
    assert sprites.targets.shape == (737280, 5) and torch.equal(sprites.targets[rows], torch.from_numpy(factors))


def test_latents_follow_dsprites(sprites):
    values = sprites.latents_values([0, 737279, 245760])
    np.testing.assert_allclose(values[0], [1, 1, 0.5, 0, 0, 0])
    np.testing.assert_allclose(values[1], [1, 3, 1, 2 * np.pi, 1, 1])
    np.testing.assert_array_equal(sprites.latents_classes([245760])[0], [0, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(sprites.latents_values([1024])[0, 3], 2 * np.pi / 39)


def test_small_grids_and_sizes():
    grid = load("sprites", sizes=(3, 4, 1, 12, 12), image_size=32)
    assert len(grid) == 1728 and grid.image_size == 32
    images, targets = grid.arrays()
    assert images.shape == (1728, 1, 32, 32) and targets[:, 2].eq(0).all()
    np.testing.assert_allclose(grid.latents_values([0])[0], [1, 1, 0.5, 0, 0, 0])
    assert len({bytes(image) for image in images.numpy()}) == 1728  # every combination looks different
    alone = Sprites(sizes=(1, 1, 1, 1, 1))
    np.testing.assert_allclose(alone.latents_values([0])[0], [1, 1, 1, 0, 0.5, 0.5])
    for wrong in ((4, 1, 1, 1, 1), (3, 6, 40), (3, 0, 1, 1, 1)):
        with pytest.raises(UserError):
            load("sprites", sizes=wrong)


def test_rendering_is_deterministic(sprites):
    assert sprites.fingerprint() == load("sprites").fingerprint() == load("sprites", split="test").fingerprint()
    rows = np.arange(0, len(sprites), 3001)
    assert torch.equal(sprites.images_at(rows), load("sprites").images_at(rows[::-1].copy()).flip(0))
    # white pixels of every 3001st image, all machines alike but for samples within rounding of an outline
    assert abs(int((sprites.images_at(rows) > 0).sum()) - 34688) <= 2


def test_bits_and_the_prepared_file(tmp_path):
    small = Sprites(sizes=(3, 2, 3, 4, 4))
    images = small.images_at(np.arange(len(small)))
    assert torch.equal(unpack(pack(images[:, 0].numpy())), images)
    path = write_sprites(tmp_path, small)
    read = load("sprites", tmp_path, sizes=(3, 2, 3, 4, 4))
    assert read._bits is not None and torch.equal(read.arrays()[0], images)
    assert load("sprites", tmp_path, sizes=(3, 2, 3, 4, 5))._bits is None  # another grid: rendered
    content = bytearray(path.read_bytes())
    content[-512:] = bytes(512)
    path.write_bytes(content)
    assert load("sprites", tmp_path, sizes=(3, 2, 3, 4, 4))._bits is None  # not these sprites: rendered
