"""Batched transforms against the per-image PIL operations of torchvision."""

import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from nfpi import augment


def images(channels=3, side=32, count=12, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), generator=rng, dtype=torch.uint8)


def pil(x):
    return TF.to_pil_image(x)


def tensor(image):
    return TF.pil_to_tensor(image)


def test_jitter_is_pil_s():
    x = images()
    recipe = augment.RECIPES["cifar"]
    draws = augment.Draws.make(recipe, len(x), torch.Generator().manual_seed(1))
    got = augment.color_jitter(x, draws.factors, draws.order)
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    for i in range(len(x)):
        image = pil(x[i])
        for which in draws.order[i].tolist():
            image = operations[which](image, float(draws.factors[i, which]))
        difference = (tensor(image).int() - got[i].int()).abs()
        assert difference.max() <= 1 and (difference == 0).float().mean() > 0.99


@pytest.mark.parametrize(("name", "side"), [("mnist", 28), ("cifar", 32), ("tinyimagenet", 64)])
def test_geometry_is_pil_s(name, side):
    recipe = augment.RECIPES[name]
    x = images(1, side)
    draws = augment.Draws.make(recipe, len(x), torch.Generator().manual_seed(2))
    x = augment.for_test(x, recipe)
    got = augment.rotate_and_crop(x, draws.radians, draws.offset, recipe.edge_pad, recipe.margin)
    size = x.shape[-1]
    for i in range(len(x)):
        image = TF.pad(pil(x[i]), recipe.edge_pad, padding_mode="edge")
        image = TF.rotate(image, float(torch.rad2deg(draws.radians[i])), Image.Resampling.NEAREST, fill=0)
        image = TF.center_crop(image, size + recipe.margin)
        top, left = draws.offset[i].tolist()
        want = tensor(TF.crop(image, top, left, size, size))
        assert (want == got[i]).float().mean() > 0.995


def test_outside_of_the_canvas_is_black():
    x = torch.full((1, 1, 8, 8), 200, dtype=torch.uint8)
    turned = augment.rotate_and_crop(x, torch.tensor([torch.pi / 4]), torch.zeros(1, 2).long(), 0, 0)
    assert turned[0, 0, 0, 0] == 0 and turned[0, 0, 4, 4] == 200


def test_draws_cover_their_ranges():
    recipe = augment.RECIPES["cifar"]
    draws = augment.Draws.make(recipe, 20000, torch.Generator().manual_seed(0))
    assert abs(draws.flip.float().mean() - 0.5) < 0.02
    for column, width in enumerate(recipe.jitter):
        factor = draws.factors[:, column]
        assert factor.min() >= 1 - width - 1e-6 and factor.max() <= 1 + width + 1e-6
        assert abs(factor.mean() - 1) < 0.003 and factor.std() > 0.5 * width
    assert torch.equal(draws.order.sort(1).values, torch.arange(3).expand(20000, 3))
    assert draws.offset.min() == 0 and draws.offset.max() == recipe.margin
    counts = torch.bincount(draws.offset.flatten()).float() / draws.offset.numel()
    assert (counts - 1 / (recipe.margin + 1)).abs().max() < 0.02
    assert torch.rad2deg(draws.radians).abs().max() <= recipe.degrees
    part = draws.rows(5, 9)
    assert torch.equal(part.radians, draws.radians[5:9])


def test_shift_flip_and_posterize():
    x = images(3, 8, 300)
    same = augment.shift_and_flip(x, 0, False, False, torch.Generator().manual_seed(0))
    assert torch.equal(same, x)
    moved = augment.shift_and_flip(x, 2, False, False, torch.Generator().manual_seed(0))
    canvas = torch.nn.functional.pad(x, (2,) * 4)
    places = [
        [torch.equal(canvas[i, :, r : r + 8, c : c + 8], moved[i]) for r in range(5) for c in range(5)]
        for i in range(300)
    ]
    assert all(any(row) for row in places)
    assert {row.index(True) for row in places} == set(range(25))
    flipped = augment.shift_and_flip(x, 0, True, True, torch.Generator().manual_seed(0))
    kinds = [(), (2,), (1,), (1, 2)]
    seen = {
        next(k for k in range(4) if torch.equal(flipped[i], x[i].flip(kinds[k]) if kinds[k] else x[i]))
        for i in range(300)
    }
    assert seen == {0, 1, 2, 3}
    for bits in (1, 5, 8):
        assert torch.equal(augment.posterize(x[0], bits), tensor(TF.posterize(pil(x[0]), bits)))


def test_recipes():
    for name, recipe in augment.RECIPES.items():
        side = 64 if name == "tinyimagenet" else 28 if name == "mnist" else 32
        x = images(1 if name in ("mnist", "noise", "none") else 3, side, 4)
        out = augment.for_training(x, recipe, augment.Draws.make(recipe, 4, torch.Generator().manual_seed(0)))
        assert out.dtype == torch.uint8 and out.shape[-1] == side + 2 * recipe.zero_pad
        assert torch.equal(out, x) is (name in ("none", "noise"))
