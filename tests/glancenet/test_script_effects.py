"""Every option of the scripts beside main.py changes what it says: an array, a table, a picture or printed lines."""

import contextlib
import functools
import hashlib
import os

import numpy as np
import pytest
from option_table import run_inside
from PIL import Image

from common.checkpoint import load_weights
from glancenet import (
    cluster,
    compare,
    evaluate,
    labels,
    leakage,
    mnist_parity,
    prepare_celeba,
    prepare_clusters,
    prepare_dsprites_leakage,
    prepare_mpi3d,
    traverse,
)

pytestmark = pytest.mark.usefixtures("narrow")
SHORT = "-- --encoder ShallowGaussianLinear --decoder ShallowLinear --warmup_epochs 0 --batch_size 8 --max_iter 3 "
SHORT += "--file_save false --test_iter 100"
GRID = f"{SHORT} --sprites_sizes 3 1 1 3 3 --metric_train 100 --metric_eval 100 --evaluation_metric mig"
# script, its words (W: the folder of the fixture `world`): its options, each with another value
TABLE = [
    (prepare_mpi3d, "--in W/mpi.npz --out . --small 9 --sizes 2 2 2 1 2 2 2", {
        "source": "--in W/other.npz", "out": "--out there", "small": "--small 8", "seed": "--seed 1",
        "sizes": "--sizes 2 2 2 2 1 2 2"}),
    (prepare_celeba, "--in W/faces --out . --n_classes 3", {
        "source": "--in W/other_faces", "out": "--out there", "unique_hair": "--unique_hair true",
        "n_classes": "--n_classes 4", "seed": "--seed 2"}),
    (prepare_dsprites_leakage, "--source sprites --sizes 3 2 4 32 32 --out . --test_images 40", {
        "out": "--out there", "test_images": "--test_images 41", "seed": "--seed 1", "sizes": "--sizes 2 2 4 32 32"}),
    (cluster, "--dset_name celebA --dset_dir . --rows 60 --restarts 1", {
        "dset_name": "--dset_name mpi3d_toy", "dset_dir": "--dset_dir there", "n_classes": "--n_classes 5",
        "seed": "--seed 3", "restarts": "--restarts 9", "rows": "--rows 9"}),
    (evaluate, "--log W/runs/compare/logs/sprites__CBNM --out .", {
        "log": "--log W/runs/compare/logs/sprites__GlanceNet", "out": "--out there", "dataset": "--dataset celeba",
        "model": "--model glancenet", "as_json": "--json"}),
    (traverse, "--weights W/one.safetensors --steps 3 --out .", {
        "weights": "--weights W/two.safetensors", "out": "--out there", "latents": "--latents 1", "min": "--min -9",
        "max": "--max 9", "steps": "--steps 4"}),
    (leakage, "--checkpoints W/one --dset_dir W", {
        "checkpoints": "--checkpoints W/two", "osr_quantile": "--osr_quantile 0.3", "osr_sample": "--osr_sample true"}),
    (leakage, f"--dset_dir W --models cbnm --seeds 1 {SHORT}", {
        "models": "--models vae", "seeds": "--seeds 4", "out": "--out there", "dset_dir": "--dset_dir W/few"}),
    (compare, f"--dset_dir W --settings fair_1 --supervision 100 --models CBNM --seeds 1 {GRID}", {
        "settings": "--settings fair_7", "supervision": "--supervision 20", "models": "--models GlanceNet",
        "seeds": "--seeds 2", "out": "--out there"}),
    (mnist_parity, "--data_root DIGITS --limit 400 --max_iter 40 --models glancenet --out . --reuse true", {
        "quantile": "--quantile 0.4", "threshold_search": "--threshold_search true", "sampled": "--sampled false",
        "sampled_reconstruction": "--sampled_reconstruction true", "stale": "--stale false"}),
    (mnist_parity, "--data_root DIGITS --limit 200 --max_iter 2 --models cbnm", {
        "models": "--models vae", "seeds": "--seeds 3", "epochs": "--max_iter 9 --epochs 2", "max_iter": "--max_iter 1",
        "limit": "--limit 300", "data_root": "--data_root nowhere", "out": "--out there"}),
]  # fmt: skip
ELSEWHERE = {
    prepare_dsprites_leakage: {"source", "source_dir"},  # the published file: test_scripts
    prepare_clusters: {"source", "out"},  # test_prepare
    leakage: {"resume", "other_dir"},  # test_leakage; front/test_your_data
    mnist_parity: {"reuse", "resume"},  # test_leakage
    compare: {"dset_name", "dset_dir", "resume"},  # the published file: test_scripts; test_evaluate
}
EVERYWHERE = {"device", "dry_run"}  # test_devices, test_options
CASES = [(row, name) for row, (_, _, options) in enumerate(TABLE) for name in options]


def test_every_option_has_a_line():
    for module in {row[0] for row in TABLE} | set(ELSEWHERE):
        tried = {name for other, _, options in TABLE if other is module for name in options}
        known = set(module.Config.model_fields) - EVERYWHERE
        assert tried | ELSEWHERE.get(module, set()) == known, module.__name__


def faces(folder, seed: int):
    """Sixty images with attributes as CelebA's archive has them."""
    rng, names = np.random.default_rng(seed), [f"{i:06d}.jpg" for i in range(60)]
    (folder / "img_align_celeba").mkdir(parents=True)
    rows = np.where(rng.random((60, 10)) < 0.5, 1, -1)
    for i, name in enumerate(names):
        Image.fromarray(np.full((218, 178, 3), 3 * i + seed, np.uint8)).save(folder / "img_align_celeba" / name)
    lines = ["60", " ".join(labels.CELEBA_ATTRIBUTES)]
    lines += [f"{name} {' '.join(map(str, row))}" for name, row in zip(names, rows, strict=True)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    parts = [f"{name} {0 if i < 40 else 1 if i < 50 else 2}\n" for i, name in enumerate(names)]
    (folder / "list_eval_partition.txt").write_text("".join(parts))


@pytest.fixture(scope="module")
def world(narrow, tmp_path_factory, mnist_root):
    """Small data sets of every kind, and trained models."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    for name in ("mpi", "other"):
        np.savez(folder / f"{name}.npz", images=rng.integers(0, 256, (64, 64, 64, 3), dtype=np.uint8))
    faces(folder / "faces", 0)
    faces(folder / "other_faces", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for test_images, out in (("60", "."), ("30", "few")):
            words = ["--source", "sprites", "--sizes", "2", "2", "2", "32", "32", "--test_images", test_images]
            prepare_dsprites_leakage.main([*words, "--out", out])
        for seed, name in ((1, "one"), (2, "two")):
            out = folder / "runs/leakage_dsprites/checkpoints" / f"glancenet_{seed}"
            leakage.main(["--dset_dir", ".", "--models", "glancenet", "--seeds", str(seed), "--device", "cpu",
                          *SHORT.split()])  # fmt: skip
            (out / "final").rename(folder / name)
            for suffix in ("safetensors", "json"):
                (out / f"model.{suffix}").rename(folder / f"{name}.{suffix}")
        words = ["--dset_dir", ".", "--settings", "fair_1", "--supervision", "100", "--device", "cpu", *GRID.split()]
        compare.main(words)
        prepare_celeba.main(["--in", "faces", "--out", "."])
        prepare_celeba.main(["--in", "other_faces", "--out", "there"])
        prepare_mpi3d.main(["--in", "mpi.npz", "--out", ".", "--sizes", *"2221222"])
        words = ["--data_root", str(mnist_root), "--limit", "400", "--max_iter", "40", "--models", "glancenet"]
        mnist_parity.main([*words, "--device", "cpu"])
    return folder


def words_of(base: str, change: str) -> list[str]:
    """The words of a call, those of `change` in place of their own kind; what follows `--` stays."""
    own, _, rest = base.partition("-- ")
    groups = {
        group.split()[0]: group.split() for text in (own, change) for group in f" {text}".split(" --") if group.strip()
    }
    words = [word for name, group in groups.items() for word in (f"--{name}", *group[1:])]
    return [*words, *(["--", *rest.split()] if rest else [])]


def digest(path) -> str:
    """Of what a file holds; a seed or a date in a name or a header is no effect."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return str([hashlib.sha256(arrays[name].tobytes()).hexdigest() for name in arrays])
    if path.suffix == ".safetensors":
        tensors = load_weights(path)[0]
        return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def left(world, mnist_root, tmp_path_factory):
    """What a call leaves in a folder of its own: (exit code, what its files hold, their names, printed lines)."""

    @functools.cache
    def call(module, base: str, change: str):
        folder = tmp_path_factory.mktemp("call")
        kinds = {".safetensors"} if module is compare else {".npz", ".csv", ".png", ".gif", ".safetensors"}
        if module is cluster:
            for name in ("celebA", "mpi3d_toy", "there"):
                os.symlink(world / name, folder / name)
        if "--reuse" in base:
            os.symlink(world / "runs/mnist_parity/0", folder / "0")
        words = [word.replace("W", str(world), 1) if word.startswith("W") else word for word in words_of(base, change)]
        words = [str(mnist_root) if word == "DIGITS" else word for word in words]
        if "device" in module.Config.model_fields:
            words = ["--device", "cpu", *words]
        before = {path: path.stat().st_mtime_ns for path in world.rglob("clusters_*.npz")}
        with contextlib.chdir(folder):
            found = run_inside(module.main, words)
        files = [path for path in sorted(folder.rglob("*.*")) if path.suffix in kinds]
        files += [path for path in world.rglob("clusters_*.npz") if before.get(path) != path.stat().st_mtime_ns]
        said = found.out if module is evaluate else ""
        return found.code, sorted(map(digest, files)), [path.name for path in files], said

    return call


@pytest.mark.parametrize(("row", "name"), CASES, ids=[f"{TABLE[row][0].__name__}-{name}" for row, name in CASES])
def test_an_option_changes_what_it_says(row, name, left):
    module, base, options = TABLE[row]
    plain, changed = left(module, base, ""), left(module, base, options[name])
    assert plain[0] == 0 and plain[1]
    if name == "out":  # the same, elsewhere
        assert plain == changed
    elif name in ("dataset", "model", "data_root"):  # nothing is there
        assert changed[0] == 2
    else:
        assert changed[0] == 0 and changed != plain
