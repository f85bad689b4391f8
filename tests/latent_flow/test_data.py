"""Sources of sequences: factor sweeps, moving sprites, frame folders, the Shapes3D and picture files."""

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from common.datasets.base import FactorSet
from common.datasets.grids import SHAPES3D_FACTORS
from common.errors import UserError
from latent_flow.data import (
    MOVES,
    SWEPT,
    FactorPictures,
    FactorSequences,
    FrameSequences,
    open_source,
    split_rows,
    sweep_values,
)
from latent_flow.spikes import draw_spikes


def test_sprite_sweeps_move_one_factor():
    source = open_source("sprites", 6, size=32)
    assert source.names == SWEPT["sprites"]
    rows = np.random.default_rng(0).choice(len(source), 10)
    labels = torch.arange(10) % 5
    frames = source.labelled(rows, labels)
    assert frames.shape == (7, 10, 1, 32, 32) and frames.min() >= 0 and frames.max() <= 1
    factors = source.source.factors_of(rows)
    for b, k in enumerate(labels.tolist()):
        vectors = source.sweep(factors[b], k, 6)
        moved = (vectors != vectors[:1]).any(0)
        column = source.columns[k]
        assert moved.sum() == 1 and moved[column] and vectors[0, column] == 0
        assert (np.diff(vectors[:, column]) >= 0).all()
        whole = source.source.images_at(source.source.index_of(vectors)).float() / 255
        expected = torch.nn.functional.interpolate(whole, size=32, mode="area")
        torch.testing.assert_close(frames[:, b], expected)


def test_sweep_values():
    assert sweep_values(32, 6, "posX").tolist() == [0, 5, 10, 16, 21, 26, 31]
    assert sweep_values(10, 7, "floor_hue").tolist() == list(range(8))
    with pytest.raises(UserError, match="too few"):
        sweep_values(4, 4, "camera_height")


def test_moving_sprites_follow_their_spikes():
    source = open_source("sprites", 5)
    assert source.moving == ("posX", "posY", "orientation")
    rows = np.array([123_456, 7, 500_000])
    active = draw_spikes(5, 3, 0.3, 0.7, torch.Generator().manual_seed(0), 3)
    frames = source.composed(rows, active)
    assert frames.shape == (6, 3, 1, 64, 64)
    moved = (frames[1:] != frames[:-1]).flatten(2).any(-1)  # (T, B)
    turning_only = (active[..., :2].sum(-1) == 0) & (active[..., 2] > 0)
    assert moved[~turning_only].all()
    # centre of mass: a step of MOVES grid units of 31 over half the image
    mass = frames.flatten(2).sum(-1)
    x = (frames * torch.arange(64.0)).flatten(2).sum(-1) / mass
    step = MOVES["posX"] / 31 * 32
    torch.testing.assert_close(x[1:] - x[:-1], active[..., 0] * step, rtol=0, atol=0.7)
    fast = source.composed(rows, active, torch.full_like(active, 1.5))
    shift = (fast * torch.arange(64.0)).flatten(2).sum(-1) / fast.flatten(2).sum(-1)
    torch.testing.assert_close(shift[-1] - shift[0], active[..., 0].sum(0) * 1.5 * step, rtol=0, atol=1.0)


def test_folder_of_frames(tmp_path):
    for clip, count in (("a", 6), ("b", 4), ("short", 2)):
        (tmp_path / clip).mkdir()
        for i in range(count):
            Image.new("RGB", (20, 10), (10 * i, 100, 200)).save(tmp_path / clip / f"{i:03d}.png")
    source = FrameSequences(tmp_path, 3, 16)
    assert len(source) == 3 + 1
    frames = source.sequences(np.array([1, 3]))
    assert frames.shape == (4, 2, 3, 16, 16)
    assert torch.equal((frames[:, 0, 0, 0, 0] * 255).round().int(), torch.tensor([10, 20, 30, 40], dtype=torch.int32))
    (tmp_path / "b" / "001.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"001\.png as an image"):
        source.sequences(np.array([3]))
    with pytest.raises(UserError, match=r"001\.png as an image"):  # before anything is trained
        FrameSequences(tmp_path, 3, 16)
    with pytest.raises(UserError, match="frames that one sequence needs: lower --frame-stride or --num-timesteps"):
        FrameSequences(tmp_path, 9, 16)


@pytest.mark.parametrize("size", [30, 300, 600])
def test_a_damaged_gif_among_clips_is_named(tmp_path, size):
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)) for i in range(6)]
    pictures[0].save(tmp_path / "whole.gif", save_all=True, append_images=pictures[1:])
    assert len(FrameSequences(tmp_path, 3, 16)) == 3
    (tmp_path / "cut.gif").write_bytes((tmp_path / "whole.gif").read_bytes()[:size])
    with pytest.raises(UserError, match=r"cannot read .*cut\.gif"):
        FrameSequences(tmp_path, 3, 16)


def clips(folder, **lengths):
    """Clips whose picture number i has the red value i."""
    for name, count in lengths.items():
        (folder / name).mkdir(parents=True)
        for i in range(1, count + 1):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / f"{i}.png")
    return folder


def numbers(frames):
    return (frames[:, 0, 0, 0, 0] * 255).round().int().tolist()


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    clips(tmp_path, clip=12)
    assert numbers(open_source("frames", 11, size=8, root=str(tmp_path)).sequences(np.array([0]))) == list(range(1, 13))
    apart = open_source("frames", 3, size=8, root=str(tmp_path), stride=3)
    assert len(apart) == 3 and numbers(apart.sequences(np.array([2]))) == [3, 6, 9, 12]


def pictures_of(source, rows):
    """The files that the sequences `rows` show."""
    spans = ((number, range(start, start + source.span + 1)) for number, start in (source.starts[i] for i in rows))
    return {source.clips[number][i] for number, span in spans for i in span}


@pytest.mark.parametrize("seed", range(5))
def test_no_frame_is_both_trained_on_and_held_out(seed, tmp_path):
    clips(tmp_path, **{f"c{i}": 9 + i for i in range(6)}, short=3)
    source = FrameSequences(tmp_path, 4, 8)
    train, valid = source.split(seed)
    assert len(train) and len(valid) and sorted([*train, *valid]) == list(range(len(source)))
    assert not pictures_of(source, train) & pictures_of(source, valid)
    assert len({source.starts[i][0] for i in valid}) in (1, 2, 3)  # whole clips: about a fifth of six
    again = FrameSequences(tmp_path, 4, 8).split(seed)
    assert (again[0] == train).all() and (again[1] == valid).all()


def test_a_single_clip_is_cut_in_time(tmp_path):
    source = FrameSequences(clips(tmp_path / "long", clip=40), 4, 8)
    train, valid = source.split(0)
    trained, held = pictures_of(source, train), pictures_of(source, valid)
    assert not trained & held and len(held) == 8 and len(trained) == 32
    two = FrameSequences(clips(tmp_path / "two", a=5, b=5), 4, 8).split(0)
    assert [len(part) for part in two] == [1, 1]
    least = FrameSequences(clips(tmp_path / "least", clip=10), 4, 8).split(0)
    assert [len(part) for part in least] == [1, 1]
    with pytest.raises(UserError, match=r"only clip has 9 pictures.*take 10"):
        FrameSequences(clips(tmp_path / "less", clip=9), 4, 8).split(0)


class Dial(FactorSet):
    """One factor, shown as the grey level of its pictures."""

    def __init__(self, name):
        super().__init__(name, "all", {"orientation": 15}, (3, 4, 4))

    def _fetch(self, rows):
        return torch.from_numpy(rows.astype(np.uint8))[:, None, None, None].expand(-1, 3, 4, 4)


@pytest.mark.parametrize(
    ("name", "places"), [("shapes3d", [5, 7, 9, 11, 13, 14, 14]), ("sprites", [5, 7, 9, 11, 13, 1, 3])]
)
def test_only_a_whole_turn_goes_round(name, places):
    """The orientation of Shapes3D goes from -30 to 30 degrees and stops there; that of sprites turns on."""
    moved = FactorSequences(Dial(name), ("orientation",), 6).composed([10], torch.ones(6, 1, 1))
    assert (moved[:, 0, 0, 0, 0] * 255).round().int().tolist() == places


def test_nothing_to_switch_on_is_refused():
    with pytest.raises(UserError, match="no transformation"):
        draw_spikes(3, 0, 0.3, 0.7, torch.Generator(), 2)


def test_shapes3d_is_read_row_by_row(tmp_path):
    path = tmp_path / "3dshapes.h5"
    count = int(np.prod(list(SHAPES3D_FACTORS.values())))
    with h5py.File(path, "w") as file:  # chunks that are never written take no space
        images = file.create_dataset("images", (count, 64, 64, 3), "uint8", chunks=(1, 64, 64, 3), fillvalue=7)
        images[15 * 4 + 3] = np.arange(64 * 64 * 3).reshape(64, 64, 3) % 251
    sequences = open_source("shapes3d", 7, root=str(tmp_path))
    frames = sequences.labelled(np.array([3, 400_000]), torch.tensor([3, 4]))
    assert frames.shape == (8, 2, 3, 64, 64)
    # item 3 has scale 0, so the sweep of the scale passes row 60 + 3 at scale 1
    expected = (np.arange(64 * 64 * 3).reshape(64, 64, 3) % 251).transpose(2, 0, 1)
    np.testing.assert_allclose(frames[1, 0] * 255, expected, atol=1e-4)
    np.testing.assert_allclose(frames[0, 1] * 255, 7, atol=1e-4)


def test_factor_pictures(tmp_path):
    for i in range(6):
        Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(tmp_path / f"{i:06d}.png")
    source = FactorPictures("Tiny", tmp_path, {"slow": 2, "fast": 3}, 8)
    sequences = FactorSequences(source, ("slow", "fast"), 1)
    frames = sequences.labelled([5, 5], torch.tensor([0, 1]))
    assert (frames[:, 0, 0, 0, 0] * 255 / 40).round().int().tolist() == [2, 5]
    assert (frames[:, 1, 0, 0, 0] * 255 / 40).round().int().tolist() == [3, 4]
    with pytest.raises(UserError, match="holds 6 pictures, Tiny has 8"):
        FactorPictures("Tiny", tmp_path, {"a": 2, "b": 4}, 8)


class Grid(FactorSet):
    """A set of factors without pictures."""

    def __init__(self, name, **factors):
        super().__init__(name, "all", factors, (1, 8, 8))


GRIDS = {
    "sweeps alone": Grid("falcor3d", a=6, b=5, c=6, d=6),
    "moving too": Grid("sprites", shape=3, scale=4, orientation=10, posX=8, posY=8),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", GRIDS)
def test_no_picture_of_a_held_out_sweep_is_trained_on(name, seed):
    grid = GRIDS[name]
    source = FactorSequences(grid, tuple(grid.factor_names), 4 if "a" in grid.factor_names else 2)
    train, valid = source.split(seed)
    again = FactorSequences(grid, source.names, source.steps).split(seed)
    assert (again[0] == train).all() and (again[1] == valid).all()
    assert len(valid) and len(train) > len(grid) / 3 and not set(train) & set(valid)

    def swept(rows):
        factors = grid.factors_of(rows)
        every = [source.sweep(one, k, source.steps) for one in factors for k in range(len(source.names))]
        return set(grid.index_of(np.concatenate(every)).tolist())

    assert not swept(train) & swept(valid)
    assert (source.split(seed + 10)[1] != valid).any()
    if source.moving:  # a moving sprite keeps its shape and its scale
        trained, held = ({tuple(one) for one in grid.factors_of(rows)[:, :2].tolist()} for rows in (train, valid))
        assert not trained & held


def test_a_set_too_small_to_hold_sweeps_out():
    with pytest.raises(UserError, match="too small for sweeps of 2 frames"):
        FactorSequences(Grid("tiny", a=2, b=2), ("a", "b"), 1).split(0)


def test_split_is_seeded_and_complete():
    train, valid = split_rows(1000, 3)
    assert len(train) == 800 and sorted([*train, *valid]) == list(range(1000))
    again, _ = split_rows(1000, 3)
    other, _ = split_rows(1000, 4)
    assert (train == again).all() and (train != other).any()


def test_unknown_data_set():
    with pytest.raises(UserError, match="did you mean 'sprites'"):
        open_source("sprits", 3)
