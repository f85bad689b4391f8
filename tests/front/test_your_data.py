"""docs/your_data.md: the five papers' commands on a folder of pictures of one's own, with labels from a CSV.

The pictures are bars of three colours and any height on black, in frames of different sizes, so that a test knows what
every label means.
"""

import csv
import gzip
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import unicodedata
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import glancenet
import latent_flow
import lbae
import nfpi
from common.datasets import load, prepare
from common.datasets.download import Remote
from common.datasets.folder import check_split, held_out_rows
from common.errors import UserError, run_command
from glancenet import evaluate, leakage
from glancenet import main as glance_main
from glancenet import options as glance_options
from glancenet.data import load_data
from glancenet.records import load_arrays
from inv_flow import inv_flow_mnist
from latent_flow import show_flows, train_vae_scratch, train_vae_scratch_weakly
from latent_flow.data import open_source
from lbae import folder as lbae_folder
from lbae import mnist as lbae_mnist
from lbae import protocol
from nfpi import main as nfpi_main

COLOURS = ("blue", "green", "red")


def draw(root, n=60, layout="flat", grey=False, ext="png", size=None):
    """n pictures in `root`, flat, in class sub-folders, or below train/ and test/; and labels.csv: file, y (the class),
    bright, colour, size. A seventh of the cells of `bright` is empty.
    """
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        height, width = size or rng.integers(20, 40, 2)
        share, colour, brightness = rng.uniform(0.3, 0.9), int(rng.integers(3)), 100 + 150 * (i % 2)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[int(height * (1 - share) / 2) : int(height * (1 + share) / 2), width // 4 :, 2 - colour] = brightness
        place = {"flat": "", "classes": f"k{i % 3}/", "splits": f"{'train' if i % 5 else 'test'}/k{i % 3}/"}[layout]
        path = root / f"{place}im{i}.{ext}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("L" if grey else "RGB").save(path)
        rows.append([f"{place}im{i}.{ext}", f"k{i % 3}", "" if i % 7 == 6 else i % 2, COLOURS[colour], f"{share:.3f}"])
    with open(root / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file", "y", "bright", "colour", "size"], *rows])
    return root


def refusal(capsys, main, *words):
    """The one line in which a command refuses."""
    assert run_command(lambda: main([str(word) for word in words])) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---- the reader that all five share


@pytest.mark.parametrize("layout", ["flat", "classes", "splits"])
def test_labels_follow_their_pictures(tmp_path, layout):
    root, seen = draw(tmp_path, layout=layout), []
    for split in ("train", "test"):
        images = load("folder", root, split, held_out=0.2, labels="labels.csv", class_column="y", channels=0,
                      image_size=20, need_classes=True)  # fmt: skip
        bright, colour, size = images.table.concepts
        assert (bright.kind, colour.kind, size.kind) == ("binary", "categorical", "continuous")
        assert colour.categories == COLOURS and images.classes == ["k0", "k1", "k2"]
        for path, pixels, target, is_bright, code in zip(
            images.paths, images.arrays()[0], images.targets, bright.values, colour.values, strict=True
        ):
            number = int(path.stem[2:])
            assert target == number % 3
            assert np.isnan(is_bright) if number % 7 == 6 else is_bright == number % 2
            assert pixels.amax((1, 2)).argmax() == 2 - code
            seen.append(path)
        assert set(images.targets.tolist()) == {0, 1, 2}
    assert sorted(seen) == sorted(tmp_path.rglob("*.png"))  # each once, in one of the parts


def test_what_is_held_out_follows_from_the_seed_alone(tmp_path):
    draw(tmp_path, layout="classes")
    parts = [load("folder", tmp_path, "test", held_out=0.25, seed=seed, image_size=8).paths for seed in (1, 1, 2)]
    assert parts[0] == parts[1] != parts[2]
    assert {path.parent.name for path in parts[0]} == {"k0", "k1", "k2"}


def test_images_that_are_added_move_none_from_training_to_what_is_held_out(tmp_path):
    folders = ((tmp_path / "mine", 200), (tmp_path / "more", 300))
    held = []
    for folder, n in folders:
        draw(folder, n, "classes")
        paths = load("folder", folder, "test", held_out=0.1, image_size=8).paths
        held.append({path.relative_to(folder) for path in paths})
    before = {path.relative_to(folders[0][0]) for path in folders[0][0].rglob("*.png")}
    assert held[1] & before == held[0] and held[1] > held[0]
    assert 10 <= len(held[0]) <= 30 and 18 <= len(held[1]) <= 42  # a tenth, drawn: twice the deviation of a binomial
    names = [f"{i}.png" for i in range(300)]
    for count, code in ((2, 0), (1, 1), (297, 2)):
        rows = held_out_rows(names[:count], np.full(count, code), 0.9, 0)
        assert 1 <= len(rows) <= max(1, count - 1), "one at least of each class, and one stays"
    assert 250 <= len(rows) <= 285
    assert len(held_out_rows(names, np.arange(300) % 3, 1e-9, 0)) == 3


def test_an_evaluation_of_the_training_s_images_keeps_its_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "mine", 20)
    draw(tmp_path / "parted", 20, "splits")
    with pytest.raises(UserError, match="seed is 5, but was 0 in training"):
        check_split("mine", 5, tmp_path / "mine", 0, "seed")
    check_split("mine", 0, "mine", 0, "seed")
    with pytest.raises(UserError, match="seed is 5"):
        check_split("moved", 5, "moved", 0, "seed")
    check_split("parted", 5, "parted", 0, "seed")
    check_split("mine", 5, "parted", 0, "seed")


def test_a_grey_folder_is_grey(tmp_path):
    draw(tmp_path, grey=True, ext="jpg")
    assert load("folder", tmp_path, held_out=0.1, channels=0, image_size=8).channels == 1
    Image.new("RGB", (9, 9), "red").save(tmp_path / "im9.jpg")
    assert load("folder", tmp_path, held_out=0.1, channels=0, image_size=8).channels == 3


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["file,y", "im0.png,a", "no.png,b"], "names no.png, which is not an image of"),
        (["file,y", "im0.png,a", "im0.png,a"], "names im0.png twice"),
        (["file,y", "im0.png,a,b"], "line 2: 3 cells, the header has 2"),
        (["file,y", "im0.png,"], "column 'y' is empty"),
        (["file,y", "im0.png,a"], "gives no class of"),
        (["file,x", "im0.png,a"], "no column 'y'"),
        (["file,y,note", *(f"im{i}.png,{i % 2},n{i}" for i in range(120))], "120 different words"),
        (["file"], "no table of labels"),
        (["<html><body>no"], "is a web page"),
        (["im0.png,a", "im1.png,b"], r"begins with an image \(im0.png\), not with a header"),
        (["file,y,size", 'im0.png,a,"1,000"', "im1.png,a,3"], "'size' holds '1,000': write numbers with a point"),
        (["file,y,size", "im0.png,a,1_0", "im1.png,a,3"], "'size' holds '1_0'"),
        (["file,y,size", "im0.png,a,5 %", "im1.png,a,7 %"], "'size' holds '5 %'"),
        (["file;y;size", "im0.png;a;1.000,5"], "'size' holds '1.000,5'"),
        (["file,y,note", 'im0.png,a,"open', *(f"im{i}.png,a,n" for i in range(1, 40))], "line 2 .*close the quotes"),
        (["file,y,hair,hair=b", "im0.png,a,a,0", "im1.png,a,b,1"], "make two concepts 'hair=b': rename one"),
        (["file,y", "im0.png,none", "im1.png,a"], "im0.png .*is empty, or reads nan, na, n/a, none"),
        (["file,y,y", "im0.png,a,b"], "two columns 'y': rename one"),
        (["file,y,note", "im0.png,a,3", "im1.png,a,unknown"], "column 'note' holds numbers and words \\('unknown'"),
        (["file,y", "im0.png,Größe"], "is no UTF-8 text: save it as CSV UTF-8"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_its_line_or_column(tmp_path, lines, words):
    draw(tmp_path, 120, size=(8, 8))
    (tmp_path / "labels.csv").write_text("\n".join(lines), encoding="latin-1")
    with pytest.raises(UserError, match=words):
        load("folder", tmp_path, labels="labels.csv", class_column="y")


def test_a_name_is_found_in_either_spelling_of_its_accents(tmp_path):
    draw(tmp_path, 12, size=(8, 8))
    (tmp_path / "im0.png").rename(tmp_path / unicodedata.normalize("NFD", "é.png"))
    (tmp_path / "labels.csv").write_text("file,x\n" + unicodedata.normalize("NFC", "é.png") + ",\u22123\nim1.png,5\n")
    images = load("folder", tmp_path, "all", image_size=8, labels="labels.csv")
    (column,) = images.table.concepts
    found = {path.name: value for path, value in zip(images.paths, column.values, strict=True)}
    assert found[unicodedata.normalize("NFD", "é.png")] == -3 and found["im1.png"] == 5
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "im2.png", tmp_path / name)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    (tmp_path / "labels.csv").write_text("file,x\nim2.png,5")
    with pytest.raises(UserError, match=r"stands in several sub-folders of .*: write the sub-folder before the name"):
        load("folder", tmp_path, "all", image_size=8, labels="labels.csv")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("header", "line", "encoding"),
    [
        ("File; Class;bright;colour;size", "im{0}.png;k{1};{1}.0;{2};0,{3}", "utf-8"),
        ("file\tCLASS\tbright\tcolour\tsize", "./im{0}.png\tk{1}\t{1}\t{2}\t0.{3}", "utf-8"),
        (",image,class,bright,colour,size", "{0},im{0}.png,k{1},{1},{2},.{3}", "utf-8-sig"),
        ("name,class,bright,colour,size,", ".\\im{0}.png,k{1},{1},{2},.{3},", "utf-8"),
    ],
    ids=["semicolons and decimal commas", "tabs", "an index without a name", "Windows paths, an empty column"],
)
def test_tables_are_read_as_other_programs_write_them(tmp_path, header, line, encoding, end):
    draw(tmp_path, 12, size=(8, 8))
    lines = [header, *(line.format(i, i % 2, "N/A" if i == 5 else COLOURS[i % 3], 10 + i) for i in range(12))]
    (tmp_path / "labels.csv").write_bytes(end.join(lines).encode(encoding))
    images = load("folder", tmp_path, held_out=0.1, image_size=8, labels="labels.csv")
    bright, colour, size = images.table.concepts
    assert (bright.name, bright.kind, colour.kind, size.kind) == ("bright", "binary", "categorical", "continuous")
    assert images.classes == ["k0", "k1"] and size.span == (0.1, 0.21)
    for row, path in enumerate(images.paths):
        i = int(path.stem[2:])
        assert images.targets[row] == bright.values[row] == i % 2 and size.values[row] == (10 + i) / 100
        assert np.isnan(colour.values[row]) if i == 5 else colour.categories[int(colour.values[row])] == COLOURS[i % 3]


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    def refused(words, **options):
        with pytest.raises(UserError, match=words):
            load("folder", tmp_path, "train", held_out=0.1, need_classes=True, image_size=8, **options)

    draw(tmp_path, 3, "classes")
    refused("holds 3 image")
    with pytest.raises(UserError, match=r"no folder of images at .*/moved"):
        load("folder", tmp_path / "moved", "test", held_out=0.1, image_size=8)
    draw(tmp_path, 12)  # flat, beside sub-folders
    refused("images beside sub-folders")
    for name in ("k0", "k1", "k2"):
        shutil.rmtree(tmp_path / name)
    refused("has no classes")
    (tmp_path / "only").mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(tmp_path / "only" / path.name)
    refused(r"has one class \(only\)")
    shutil.rmtree(tmp_path / "only")
    draw(tmp_path, 60, "splits")
    shutil.rmtree(tmp_path / "test" / "k1")
    refused("test has no image of class k1")
    shutil.rmtree(tmp_path / "test")
    refused("holds train/ alone")
    (tmp_path / "train").rename(tmp_path / "Train")
    refused("holds Train/: call it train/")


# ---- LBAE

TINY_LBAE = ("width=4", "zsize=16", "img_size=32", "batch_size=16", "epochs_max=1", "device=cpu", "tensorboard=0")


def test_lbae(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METRICS_CACHE", str(tmp_path / "cache"))
    # relative places: the evaluation below is called from another folder
    lbae_folder.main(["data_root=mine", "labels=mine/labels.csv", "exp=exp/own", *TINY_LBAE])
    said = capsys.readouterr().err
    assert "56 training and 4 test images" in said and "3 classes by y" not in said
    assert "bright (binary); colour (categorical: blue, green, red); size (continuous, 0.302 to 0.898)" in said
    stored = json.loads((tmp_path / "exp/own/models/best.json").read_text())["attribute_names"]
    assert stored == ["y=k0", "y=k1", "y=k2", "bright", "colour=blue", "colour=green", "colour=red"]
    assert (lbae.load("exp/own").concept_names, lbae.load("exp/own").class_names) == (tuple(stored), ())
    words = ["eval", "gen", "exp=exp/own", "sample_method=int", "gen_imgs=9", "batch_size_test=2", "device=cpu"]
    lbae_folder.main([*words, "set_attr=colour=red"])
    named = np.load(tmp_path / "exp/own/prob_dim_6.npz")["means"]
    with np.load(tmp_path / "exp/own/latents-last.npz") as latents:
        codes = np.unpackbits(latents["codes"], axis=1, count=16) * 2.0 - 1
        red = codes[latents["labels"][:, 6] == 1].mean(0)
    np.testing.assert_allclose(np.sort(red), named)
    assert "did you mean 'colour=red'" in refusal(capsys, lbae_folder.main, *words, "set_attr=colour=rad")
    line = refusal(capsys, lbae_folder.main, "eval", "exp=exp/own", "held_out_seed=5", "device=cpu")
    assert "held_out_seed is 5, but was 0 in training" in line  # its test images would be training images
    monkeypatch.chdir(tmp_path / "exp/own")
    protocol.main(["methods=cov", "device=cpu", "kid_subsets=3"])  # scores 4 images, which 64 components do not fit
    assert "feat:pixel-pca3" in Path("results.txt").read_text()
    assert Path("reconstructed_eval/sample_0_0.jpg").stat().st_size > 500


def test_lbae_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "mine", 20)
    (tmp_path / "mine/im7.png").write_bytes(b"\x89PNG no")
    line = refusal(capsys, lbae_folder.main, "data_root=mine", "exp=e", *TINY_LBAE)
    assert "mine/im7.png as an image" in line and not (tmp_path / "e/models").exists()
    assert "goes with dataset=folder" in refusal(capsys, lbae_mnist.main, "labels=x.csv")


# ---- Inverse-Flow

TINY_FLOW = ("--dataset", "folder", "--block_size", "1", "--coupling_width", "4", "--split_width", "4", "--epochs", "1",
             "--n_samples", "4", "--device", "cpu", "--out", "run")  # fmt: skip


def test_inverse_flow_pads_what_does_not_squeeze_and_counts_the_real_dimensions(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "mine", grey=True, ext="jpg", size=(15, 21))
    monkeypatch.chdir(tmp_path)
    inv_flow_mnist.main(["--data_root", "mine", "--batch_size", "8", *TINY_FLOW])
    text = capsys.readouterr().err
    assert "images 1x15x21 are padded to 16x24" in text and "count the 315 real dimensions" in text
    inv_flow_mnist.main(["--evaluate", "--dataset", "folder", "--data_root", "mine", "--out", "run", "--device", "cpu"])
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert found["test_bpd"] == pytest.approx(found["test_nll"] / (315 * np.log(2)), rel=1e-6)
    assert found["recon_images"] == 4 and found["recon_max_grey"] < 0.01
    with Image.open(tmp_path / "run/samples/evaluation.png") as picture:
        assert picture.size == (10 * (21 + 2) + 2, 10 * (15 + 2) + 2)  # cropped to the real ones


def test_inverse_flow_makes_pictures_of_many_sizes_one(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "mine", layout="splits")
    monkeypatch.chdir(tmp_path)
    inv_flow_mnist.main(["--data_root", "mine", "--batch_size", "8", "--resolution", "12", *TINY_FLOW])
    assert json.loads((tmp_path / "run/config.json").read_text())["image_size"] == [3, 12, 12]
    (tmp_path / "mine/train/k1/im1.png").write_bytes(b"no")
    words = ["--data_root", "mine", "--batch_size", "8", *TINY_FLOW, "--overwrite"]
    assert "k1/im1.png as an image" in refusal(capsys, inv_flow_mnist.main, *words)


# ---- NFPI

TINY_NFPI = ("--config-path=___configs/folder", "--config-name=mean", "data_path=mine", "device=cpu", "num_levels=2",
             "num_flows=[1,1]", "num_blocks=[1,1]", "hidden_channels=[4,4]", "train.epochs=1", "train.warmup_steps=1",
             "classification.folder.epochs=1", "classification.resnet_version=18", "classification.stem=imagenet",
             "temperature_sampling_for_results=0")  # fmt: skip


def test_nfpi(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "mine", layout="classes", size=(18, 13))
    monkeypatch.chdir(tmp_path)
    nfpi_main.main(list(TINY_NFPI))
    assert "52 training and 8 test images of 3x12x12, 3 classes" in capsys.readouterr().err
    (results,) = tmp_path.glob("outputs/folder/mean/*/_/version_0/results.json")
    found = json.loads(results.read_text())
    assert found["finished"] and found["config"]["dataset_info"]["folder"]["num_classes"] == 3
    assert 0 <= found["nf"]["acc"] <= 1 and 0 <= found["cnn"]["1.0"] <= 1
    for weights in (*results.parent.glob("checkpoints/flow.safetensors"), *results.parent.glob("checkpoints/*.pt")):
        assert nfpi.load(weights).class_names == ("k0", "k1", "k2")
    assert nfpi.load(results.parent).class_names == nfpi.load("outputs").class_names == ("k0", "k1", "k2")
    with Image.open(results.parent / "pictures/samples_2.png") as picture:
        assert picture.size == (8 * 14 + 2, 8 * 14 + 2)


def test_nfpi_takes_test_from_its_folder_and_grey_from_the_files(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "mine", layout="splits", grey=True, size=(8, 16))
    monkeypatch.chdir(tmp_path)
    nfpi_main.main([*TINY_NFPI, "train_classifier=0", "test_nf_alone=0"])
    assert "48 training and 12 test images of 1x8x16" in capsys.readouterr().err


def test_nfpi_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "mine", layout="classes")
    (tmp_path / "mine/k1/im4.png").write_bytes(b"no")
    assert "k1/im4.png as an image" in refusal(capsys, nfpi_main.main, *TINY_NFPI)
    shutil.rmtree(tmp_path / "mine/k1")
    shutil.rmtree(tmp_path / "mine/k0")
    assert "mine has one class (k2)" in refusal(capsys, nfpi_main.main, *TINY_NFPI, "dry_run=1")
    assert not list(tmp_path.rglob("version_*"))


# ---- latent-flow

TINY_FLOWS = ("--image-size", "8", "--latent-size", "4", "--num-timesteps", "4", "--batch-size", "8", "--max-iter", "2",
              "--eval-images", "6", "--device", "cpu", "--out", "run")  # fmt: skip


@pytest.mark.parametrize("grey", [False, True])
def test_latent_flow_turns_single_pictures(tmp_path, monkeypatch, grey):
    draw(tmp_path / "mine", layout="classes", grey=grey, size=(24, 24))
    monkeypatch.chdir(tmp_path)
    train_vae_scratch.main(["--dataset", "folder", "--data-dir", "mine", *TINY_FLOWS])
    assert set(json.loads((tmp_path / "run/eval.json").read_text())["equivariance"]) == {"scale", "rotation", "hue"}
    assert latent_flow.load("run").concept_names == ("scale", "rotation", "hue")
    show_flows.main(["--exp", "run", "--device", "cpu"])
    assert list((tmp_path / "run/pictures").glob("*.png"))
    source = open_source("folder", 6, size=24, root="mine")
    assert len(source) == 57 and len(open_source("folder", 6, size=24, root="mine", split="test")) == 3
    train, valid = source.split(0)
    shutil.copy(tmp_path / "mine/k0/im0.png", tmp_path / "mine/k0/more.png")
    more = open_source("folder", 6, size=24, root="mine")
    assert {source.files[i] for i in train} == {more.files[i] for i in more.split(0)[0]} - {"k0/more.png"}
    assert 5 < len(valid) < 20, "about a fifth"
    (tmp_path / "mine/k0/more.png").unlink()
    before, *_, after = source.labelled(np.arange(54), torch.full((54,), 2))  # hue, 120 degrees: red to green to blue
    lit = before.sum(1) > 0.2
    if grey:
        assert bool((before[:, 1:] < 1e-3).all())  # drawn red
    torch.testing.assert_close(after.roll(-1, 1) * lit[:, None], before * lit[:, None], rtol=0, atol=1e-3)


def write_gif(path, numbers):
    """A clip of one grey level a frame."""
    frames = [Image.new("L", (20, 12), number) for number in numbers]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def test_latent_flow_reads_videos(tmp_path, monkeypatch, capsys, caplog):
    clips = tmp_path / "clips"
    (clips / "b").mkdir(parents=True)
    write_gif(clips / "a.gif", range(0, 120, 10))
    write_gif(clips / "b/c.gif", range(120, 240, 10))
    write_gif(clips / "b/still.gif", [7])  # one frame: a picture
    source = open_source("frames", 3, size=8, root=str(clips), stride=2)
    assert "left out, shorter than the 7 frames of a sequence: b" in caplog.text
    assert [len(clip) for clip in source.clips] == [0, 12, 1, 12]
    levels = (source.sequences(np.arange(len(source)))[:, :, 0, 4, 4] * 255).round().int().T.tolist()
    assert levels == [[10 * (k + 2 * t) for t in range(4)] for k in (*range(6), *range(12, 18))]
    monkeypatch.chdir(tmp_path)
    train_vae_scratch_weakly.main(["--dataset", "frames", "--data-dir", "clips/a.gif", "-K", "2", "--frame-stride", "1",
                                   *TINY_FLOWS, "--batch-size", "2"])  # fmt: skip
    assert (tmp_path / "run/final.pt").is_file()
    (clips / "b/d.mp4").write_bytes(b"no film")
    words = ["--dataset", "frames", "--data-dir", "clips", *TINY_FLOWS, "--out", "other"]
    line = refusal(capsys, train_vae_scratch_weakly.main, *words)
    assert "clips/b/d.mp4" in line and ("pip install imageio[ffmpeg]" in line or "as a video" in line)
    (clips / "b/d.mp4").unlink()
    (clips / "a.gif").write_bytes((clips / "a.gif").read_bytes()[:300])
    assert "a.gif as a" in refusal(capsys, train_vae_scratch_weakly.main, *words)


# ---- GlanceNets

TINY_GLANCE = ("--dset_name", "folder", "--dset_dir", "mine", "--concepts", "labels.csv", "--class_column", "y",
               "--encoder", "PadlessGaussianConv64", "--decoder", "ShallowLinear", "--z_dim", "6", "--batch_size", "16",
               "--max_iter", "2", "--max_epoch", "2", "--warmup_epochs", "0", "--device", "cpu", "--name", "x",
               "--out_path", "x", "--mc_samples", "0")  # fmt: skip


def glance(alg="GlanceNet", *more):
    return glance_main.main(["--alg", alg, *TINY_GLANCE, *more])


def test_glancenet(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "mine", 600, "splits", size=(9, 9))
    monkeypatch.chdir(tmp_path)
    log = glance("GlanceNet", "--conditional_prior", "true", "--traverse_l", "true", "--evaluation_metric", "dci")
    names = ["bright", "colour=blue", "colour=green", "colour=red", "size"]
    stored = json.loads((tmp_path / "checkpoints/x/model.json").read_text())
    assert (stored["concept_names"], stored["class_names"]) == (names, ["k0", "k1", "k2"])
    model = glancenet.load("checkpoints/x/model.safetensors")
    assert glancenet.load("checkpoints/x").concept_names == model.concept_names  # the run's folder
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        glancenet.load("mine")
    assert list(model.concept_names)[:5] == names and model.class_names == ("k0", "k1", "k2")
    # training pictures without `bright` train without concepts, test pictures without it are left out
    held_out = [i for i in range(600) if i % 5 == 0]
    _, z, concepts = load_arrays(log / "eval_results/latents_obtained.npy", 3)
    assert len(z) == sum(i % 7 != 6 for i in held_out) == len(concepts)
    counts = json.loads((log / "commandline_args.txt").read_text())
    assert 0 < counts["train_images"] - counts["supervised_images"] < 0.2 * counts["train_images"]
    found = evaluate.main([str(log)])[0]  # alignment and explicitness by trees and by least squares
    assert {"alignment", "explicitness", "alignment_linear", "explicitness_linear"} <= found.keys()
    assert {path.suffix for path in (tmp_path / "train_outputs/x").iterdir()} == {".png", ".jpg", ".gif"}

    draw(tmp_path / "other", 180, "classes", size=(12, 12))
    shutil.rmtree(tmp_path / "other/k2")
    words = ["--checkpoints", "checkpoints/x/final", "--device", "cpu", "--out", "leak"]
    capsys.readouterr()
    leakage.main([*words, "--other_dir", "other"])
    said = capsys.readouterr().out
    assert "other images rejected" in said and "paper" not in said  # whose figures are of other images
    assert "probe fitted on 96 images, leakage on the other 24" in said and "+/-" not in said, "of one model"
    written = json.loads((tmp_path / "leak/leakage.json").read_text())
    assert written["runs"][0]["rejection"].keys() == {"none", "distance", "reconstruction", "both"}
    assert "paper_leakage_percent" not in written
    for path in list((tmp_path / "other/k0").iterdir())[:30]:
        path.unlink()
    assert "100 images at least are needed to say what leaks, not 90" in refusal(
        capsys, leakage.main, *words, "--other_dir", "other"
    )
    assert "there are 3" in refusal(capsys, leakage.main, *words, "--other_dir", "mine/test")


def test_glancenet_takes_concepts_by_name(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "mine", size=(30, 30))
    monkeypatch.chdir(tmp_path)
    glance("CBNM", "--include_labels", "size", "bright")
    stored = json.loads((tmp_path / "checkpoints/x/model.json").read_text())
    assert stored["concept_names"] == ["size", "bright"]
    words = ["--alg", "CBNM", *TINY_GLANCE, "--include_labels", "size", "bright", "--test", "true"]
    words += ["--ckpt_load", "checkpoints/x/last", "--seed"]
    assert f"--seed is 55, but was {stored['seed']}" in refusal(capsys, glance_main.main, *words, "55")
    glance_main.main([*words, str(stored["seed"]), "--overwrite", "true"])
    data = load_data(glance_options.parse(["--alg", "CBNM", *TINY_GLANCE, "--include_labels", "size"]))
    shown = (data.train.images.fetch(data.train.rows).amax(1) > 0)[..., -1].float().mean(1)  # the height of the bar
    assert np.corrcoef(shown, data.train.concepts[:, 0])[0, 1] > 0.97
    assert float(data.train.concepts.min()) >= 0 and float(data.train.concepts.max()) <= 1


def test_glancenet_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    draw(tmp_path / "mine", size=(9, 9))
    monkeypatch.chdir(tmp_path)

    def refused(*words):
        return refusal(capsys, glance_main.main, "--alg", "GlanceNet", *TINY_GLANCE, *words)

    assert "did you mean 'bright'" in refused("--include_labels", "brigth")
    assert "training and test images with concepts are needed, not 37 and 3" in refused("--evaluation_metric", "mig")
    assert "no column 'class'" in refused("--class_column", "class")
    assert "5 concepts" in refused("--z_dim", "3")
    assert "belong to --dset_name folder" in refused("--dset_name", "sprites")
    (tmp_path / "mine/im3.png").write_bytes(b"no")
    assert "im3.png as an image" in refused()
    assert not (tmp_path / "checkpoints").exists()


# ---- small public sets


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """MNIST's four files, of 40 images each, on a server that `prepare` takes for the published one."""
    files, remotes = tmp_path / "files", []
    files.mkdir()
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        content = {
            "images-idx3": struct.pack(">4i", 2051, 40, 28, 28) + rng.bytes(40 * 784),
            "labels-idx1": struct.pack(">2i", 2049, 40) + bytes(i % 10 for i in range(40)),
        }
        for name, data in content.items():
            (files / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(data))
    handler = partial(SimpleHTTPRequestHandler, directory=str(files))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    web = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=partial(web.serve_forever, poll_interval=0.01), daemon=True).start()
    for path in sorted(files.iterdir()):
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        remotes.append(Remote(path.name, (f"http://127.0.0.1:{web.server_port}/{path.name}",), "md5", digest))
    source = prepare.SOURCES["mnist"]
    monkeypatch.setitem(prepare.SOURCES, "mnist", replace(source, remotes=tuple(remotes)))
    monkeypatch.setenv("OFFLINE", "0")
    yield web
    web.shutdown()
    web.server_close()


TRAIN_MNIST = ("width=2", "zsize=8", "batch_size=20", "epochs_max=1", "device=cpu", "tensorboard=0")


def test_a_training_gets_mnist_by_itself(tmp_path, mirror, capsys):
    words = (f"data_root={tmp_path / 'data'}", f"exp={tmp_path / 'e'}", *TRAIN_MNIST)
    lbae_mnist.main(list(words))
    said = [line for line in capsys.readouterr().err.splitlines() if "getting it" in line]
    assert len(said) == 1 and "12 MB" in said[0] and "127.0.0.1" in said[0]
    assert len(load("mnist", tmp_path / "data", "test")) == 40


def test_a_download_with_another_digest_is_not_kept(tmp_path, mirror, monkeypatch, capsys):
    source = prepare.SOURCES["mnist"]
    wrong = tuple(replace(remote, digest="0" * 32) for remote in source.remotes)
    monkeypatch.setitem(prepare.SOURCES, "mnist", replace(source, remotes=wrong))
    words = (f"data_root={tmp_path / 'data'}", f"exp={tmp_path / 'e'}", *TRAIN_MNIST)
    assert "not the published one" in refusal(capsys, lbae_mnist.main, *words)
    assert not list((tmp_path / "data").rglob("*ubyte*"))


@pytest.mark.parametrize("why", ["OFFLINE=1", "no network", "evaluation"])
def test_without_network_or_training_nothing_is_downloaded(tmp_path, mirror, monkeypatch, capsys, why):
    words = [f"data_root={tmp_path / 'data'}", f"exp={tmp_path / 'e'}", *TRAIN_MNIST]
    if why == "OFFLINE=1":
        monkeypatch.setenv("OFFLINE", "1")
    elif why == "no network":
        mirror.shutdown()
        mirror.server_close()
    if why == "evaluation":
        line = refusal(capsys, lambda argv: load("mnist", tmp_path / "data", "test"))
    else:
        line = refusal(capsys, lbae_mnist.main, *words)
    assert "mnist is not there" in line and "common.datasets.prepare mnist" in line
    assert not list(tmp_path.glob("data/*"))


def test_without_network_the_dsprites_script_goes_on_with_rendered_ones(tmp_path):
    root = Path(__file__).resolve().parents[2]
    words = "--max_iter 2 --max_epoch 1 --encoder PadlessGaussianConv64 --decoder ShallowLinear --device cpu"
    words += " --sprites_sizes 3 2 2 4 4 --evaluation_metric --evaluate_iter 9 --test_iter 9 --batch_size 48"
    (tmp_path / "data").mkdir()

    def run(**more):
        environment = {
            **os.environ,
            "OFFLINE": "1",
            "DATA_ROOT": str(tmp_path / "data"),
            "PYTHON": sys.executable,
            **more,
        }
        command = ["bash", str(root / "scripts/glancenet_dsprites.sh"), *words.split()]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    absent = run()
    assert absent.returncode == 2 and "DATASET_NAME=sprites" in absent.stderr.splitlines()[-1]
    rendered = run(DATASET_NAME="sprites")
    assert rendered.returncode == 0, rendered.stderr
    assert list((tmp_path / "checkpoints").glob("*/model.safetensors"))
