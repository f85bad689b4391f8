import struct
import zlib

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.images import (
    list_pictures,
    mosaic,
    natural_sorted,
    open_picture,
    read_picture,
    save_gif,
    save_image,
    save_images,
    to_uint8,
)

RNG = np.random.default_rng(5)


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


# ---- reading


def test_natural_order_of_any_names():
    ordered = natural_sorted(["f10.png", "f9.png", "²3.png", "f1.png", "½.png", "10.png", "9.png"])
    assert [name for name in ordered if name[0] == "f"] == ["f1.png", "f9.png", "f10.png"]
    assert ordered.index("9.png") < ordered.index("10.png")
    same = ["01.png", "1.png", "001.png", "É2.png", "É10.png", "a b.png", "a\nb.png", "٣.png"]
    for _ in range(5):
        assert natural_sorted(RNG.permutation(same).tolist()) == natural_sorted(same)  # whatever order a disk lists


def test_pictures_of_a_folder(tmp_path):
    for name in ("10.png", "9.JPG", "²3.png", ".hidden.png", "notes.txt", "a b.webp", "n\nl.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert {path.name for path in list_pictures(tmp_path)} == {"10.png", "9.JPG", "²3.png", "a b.webp", "n\nl.png"}
    names = [path.name for path in list_pictures(tmp_path)]
    assert names.index("9.JPG") < names.index("10.png")
    with pytest.raises(UserError, match="is no folder"):
        list_pictures(tmp_path / "10.png")


def test_a_turned_picture_is_read_upright(tmp_path):
    upright = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees against the clock
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "a.png"), upright.transpose(2, 0, 1))


def test_transparency_shows_white(tmp_path):
    colour = np.zeros((2, 2, 4), np.uint8)
    colour[0, 0] = 200, 100, 0, 255
    colour[0, 1] = 200, 100, 0, 127
    Image.fromarray(colour).save(tmp_path / "a.png")
    seen = read_picture(tmp_path / "a.png")
    assert seen[:, 0, 0].tolist() == [200, 100, 0] and seen[:, 1, 1].tolist() == [255, 255, 255]
    assert np.abs(seen[:, 0, 1].astype(int) - [228, 178, 128]).max() <= 1
    Image.fromarray(np.uint8([[[80, 255], [80, 0]]])).save(tmp_path / "grey.png")
    assert read_picture(tmp_path / "grey.png").tolist() == [[[80, 255]]]  # still grey
    palette = Image.fromarray(np.uint8([[0, 1]]), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "p.png", transparency=1)
    assert read_picture(tmp_path / "p.png").tolist() == [[[10, 255]], [[20, 255]], [[30, 255]]]


def test_channels_are_the_files_unless_asked_for(tmp_path):
    grey = RNG.integers(0, 256, (3, 5), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_picture(tmp_path / "grey.png"), grey[None])
    assert open_picture(tmp_path / "grey.png", 3).mode == "RGB" and open_picture(tmp_path / "grey.png", 1).mode == "L"
    Image.fromarray(grey > 99).save(tmp_path / "bits.png")
    assert np.array_equal(read_picture(tmp_path / "bits.png"), (grey > 99)[None] * 255)
    Image.fromarray(grey).convert("CMYK").save(tmp_path / "cmyk.tif")
    assert read_picture(tmp_path / "cmyk.tif").shape == (3, 3, 5)
    Image.fromarray(grey.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png.*convert it to 8 bits"):
        read_picture(tmp_path / "deep.png")


def png_claiming(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, body)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_small_file_that_claims_a_huge_picture_is_refused(tmp_path):
    for side in (9000, 50_000, 10**9):
        (tmp_path / "bomb.png").write_bytes(png_claiming(side, side))
        with pytest.raises(UserError, match=r"bomb\.png"):
            read_picture(tmp_path / "bomb.png")


def test_what_is_no_picture_is_named(tmp_path):
    save_image(tmp_path / "a.png", RNG.integers(0, 256, (40, 40), dtype=np.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    for content in (b"", whole[:60], whole[:-200], whole[20:], b"\xff\xd8\xff\xe0" + whole):
        (tmp_path / "b c\n.png").write_bytes(content)
        with pytest.raises(UserError, match="b c"):
            read_picture(tmp_path / "b c\n.png")
    (tmp_path / "page.png").write_text("<!doctype html><title>Quota exceeded</title>")
    with pytest.raises(UserError, match=r"page\.png is a web page"):
        read_picture(tmp_path / "page.png")
    with pytest.raises(UserError, match="cannot read"):
        read_picture(tmp_path)
