import imageio.v3 as iio
import numpy as np
import pytest
import torch

from common.errors import UserError
from common.images import mosaic, save_gif, save_image, save_images, to_uint8


def test_to_uint8_rounds_half_up_clips_and_leaves_its_input(tmp_path):
    x = torch.tensor([-0.1, 0.0, 0.5 / 255, 0.4999 / 255, 1.0, 1.7])
    kept = x.clone()
    assert to_uint8(x).tolist() == [0, 0, 1, 0, 255, 255]
    assert torch.equal(x, kept)
    levels = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_uint8(levels / 255.0), levels)
    assert np.array_equal(to_uint8(torch.from_numpy(levels).float() / 255), levels)
    with pytest.raises(TypeError):
        to_uint8(np.arange(3))


def test_mosaic_places_each_image(tmp_path):
    x = torch.stack([torch.full((1, 3, 4), 0.2 * i) for i in range(5)])
    picture = mosaic(x, columns=2, padding=1)
    assert picture.shape == (3 * 4 + 1, 2 * 5 + 1, 3)
    assert picture[1 + 4, 1 + 5, 0] == to_uint8(torch.tensor([0.6]))[0]
    assert picture[0].max() == 0
    assert np.array_equal(mosaic(to_uint8(x), 2, 1), picture)


def test_stretch_uses_the_whole_range_of_each_image():
    x = torch.rand(3, 1, 4, 4) * torch.tensor([0.1, 0.5, 1.0]).view(3, 1, 1, 1)
    picture = mosaic(x, columns=3, padding=0, stretch=True)
    for i in range(3):
        assert picture[:, 4 * i : 4 * i + 4].min() == 0
        assert picture[:, 4 * i : 4 * i + 4].max() == 255
    with pytest.raises(ValueError, match="at least one column"):
        mosaic(x, columns=0)


def test_writers_read_back(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    save_image(tmp_path / "a.png", colour)
    assert np.array_equal(iio.imread(tmp_path / "a.png"), colour)
    save_image(tmp_path / "grey.jpg", colour[:, :, :1])
    assert iio.imread(tmp_path / "grey.jpg").shape == (5, 6)
    with pytest.raises(UserError, match=r"\.png or \.jpg"):
        save_image(tmp_path / "a.bmp", colour)
    save_images(tmp_path / "many", torch.rand(3, 1, 4, 4), start=7)
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["7.png", "8.png", "9.png"]
    frames = [np.full((6, 6, 3), value, dtype=np.uint8) for value in (0, 120, 255)]
    save_gif(tmp_path / "a.gif", frames, fps=5)
    movie = iio.imread(tmp_path / "a.gif", index=None)
    assert [int(frame.mean()) for frame in movie] == [0, 120, 255]
    assert iio.immeta(tmp_path / "a.gif")["duration"] == 200
