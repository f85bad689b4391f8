"""What a user sees: every option against its default, the mode and weights of each stage, orderings, labels.

Options that cannot show on a CPU or are judged elsewhere stand in `ELSEWHERE`, each with its reason.
"""

import dataclasses
import hashlib
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.batches import Batches
from common.images import to_uint8
from lbae import eval, mnist, sampler
from lbae import train as training
from lbae.data import as_input, load_split
from lbae.experiment import Latents, load_nets, read_checkpoint
from lbae.generate import Trained, code_source
from lbae.model import LBAE, build_model, kl_divergence, losses
from lbae.options import Params
from lbae.protocol import experiment_params
from lbae.results import Results, read_line

KEYS = {"dataset": "digits", "width": 2, "zsize": 24, "batch_size": 16, "batch_size_test": 12, "epochs_max": 2,
        "lr": 1e-2, "dec_in_channels": 4, "train_images": 96, "test_images": 24, "tensorboard": 0}  # fmt: skip
TINY = [*(f"{key}={value}" for key, value in KEYS.items()), "device=cpu"]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def outcome(root: Path) -> dict[str, str]:
    """What lies below a folder, without clocks and configurations: weights, images, codes, metrics, rows printed."""
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".cp":
            state = read_checkpoint(path)
            tensors = [state[part][key] for part in ("enc", "gen") for key in sorted(state[part])]
            found[name] = digest(b"".join(value.numpy().tobytes() for value in tensors))
        elif path.name == "log.txt":
            found[name] = str(len(path.read_text().splitlines()))
        elif path.suffix in (".png", ".jpg", ".npz", ".csv"):
            found[name] = digest(path.read_bytes())
        elif path.suffix not in (".json", ".txt", ".safetensors"):
            found[path.parent.name] = "here"  # TensorBoard's events
    return found


class Experiments:
    """Trained on demand, once for the same words."""

    def __init__(self, root: Path):
        self.root, self.made = root, {}

    def __call__(self, *words: str) -> Path:
        if words not in self.made:
            self.made[words] = self.root / str(len(self.made)) / "exp"
            mnist.main([*TINY, f"exp={self.made[words]}", *words])
        return self.made[words]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Experiments:
    return Experiments(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of a user's colour images."""
    folder, g = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(g.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


# ---- every option against its default

TRAIN = {
    "dataset": "dataset=sprites", "img_size": "img_size=64", "zsize": "zsize=9", "vae": "vae=1", "width": "width=3",
    "dec_in_channels": "dec_in_channels=2", "zround": "zround=1", "binary_reco_loss": "binary_reco_loss=0",
    "train_images": "train_images=48", "test_images": "test_images=8", "lr": "lr=0.02", "l2": "l2=0.5",
    "batch_size": "batch_size=8", "epochs_max": "epochs_max=1", "keep_last_models": "keep_last_models=1",
    "print_every_batch": "print_every_batch=1", "tensorboard": "tensorboard=1", "seed": "seed=1", "amp": "amp=1",
    "kl_weight": "vae=1 | kl_weight=5", "channels": "FOLDER channels=1 | channels=3",
    "img_crop_size": "FOLDER channels=3 | img_crop_size=20", "held_out_seed": "FOLDER channels=3 | held_out_seed=1",
}  # fmt: skip
EVALUATION = {
    "eval_train": "| eval_train", "reload": "| reload=0", "batch_size_test": "| batch_size_test=6",
    "img_format": "| img_format=jpg", "stretch": "| stretch=1",
}  # fmt: skip
INT = "gen sample_method=int batch_size_test=2 interpolate_steps=3"
GENERATION = {
    "gen": "| gen", "gen_imgs": "gen | gen_imgs=5", "sample_method": "gen | sample_method=independent",
    "latents": "gen | latents=refresh", "interpolate_steps": f"{INT} | interpolate_steps=4",
    "int_endpoints": f"{INT} | int_endpoints=0", "int_source": f"{INT} | int_source=test",
    "split": f"{INT} | split=mean", "set_attr": f"{INT} | set_attr=3",
    "attr_threshold": f"{INT} set_attr=3 | attr_threshold=1.5",
    "attr_mode": f"{INT} set_attr=3 | attr_mode=contrast",
    "zclamp": "gen sample_method=random | zclamp=-0.4", "zclamp_min": "gen sample_method=random | zclamp_min=0.4",
}  # fmt: skip
ELSEWHERE = {
    "device, cuda_device, parallel, tf32, cuda_graph": "a GPU's; test_device.py",
    "workers, hold, deterministic": "same result: the test below",
    "data_root, labels": "which data: test_files.py, front/test_your_data.py",
    "l, resume, overwrite, exp, cfg, exp_suffix": "which experiment: test_commands.py, test_resume.py",
    "eval, dry_run": "which command: test_commands.py, test_options.py",
    "vae_model": "has one value",
    "wandb": "tests/test_wandb.py",
}


def test_no_option_is_forgotten():
    elsewhere = {name for names in ELSEWHERE for name in names.split(", ")}
    assert set(TRAIN) | set(EVALUATION) | set(GENERATION) | elsewhere == set(Params.model_fields)


def sides(words: str, pictures: Path) -> tuple[list[str], list[str]]:
    """The words of both sides of a row."""
    before, _, change = words.rpartition("|")
    before = before.replace("FOLDER", f"dataset=folder data_root={pictures} train_images=0 test_images=0").split()
    return before, [*before, *change.split()]


@pytest.mark.parametrize("name", TRAIN)
def test_every_option_of_training_changes_what_it_says(name, trained, pictures):
    plain, changed = (trained(*words) for words in sides(TRAIN[name], pictures))
    one, two = outcome(plain), outcome(changed)
    assert one != two
    if name in ("keep_last_models", "epochs_max"):
        assert {path for path in one if "weights-" in path} > {path for path in two if "weights-" in path}
    elif name in ("test_images", "print_every_batch", "tensorboard"):  # what is trained stays
        assert one["models/last.cp"] == two["models/last.cp"]
    else:
        assert one["models/last.cp"] != two["models/last.cp"]


@pytest.mark.parametrize("words", ["workers=1", "hold=0", "deterministic=1"])
def test_an_option_of_the_machine_changes_no_result(words, trained):
    one, two = outcome(trained()), outcome(trained(words))
    torch.use_deterministic_algorithms(False)
    assert one == two


@pytest.mark.parametrize("name", [*EVALUATION, *GENERATION])
def test_every_option_of_evaluation_changes_what_it_says(name, trained, pictures, tmp_path):
    found = []
    for i, words in enumerate(sides({**EVALUATION, **GENERATION}[name], pictures)):
        copy = shutil.copytree(trained(), tmp_path / str(i) / "exp")
        mnist.main(["eval", "gen_imgs=9", "device=cpu", f"exp={copy}", *words])
        found.append(outcome(tmp_path / str(i)))
    assert found[0] != found[1]


@pytest.mark.parametrize("words", ["", "gen", f"{INT} set_attr=2", "gen sample_method=random"])
def test_what_is_evaluated_and_generated_hangs_on_the_stored_weights_alone(words, trained, tmp_path):
    found = []
    for i in range(3):
        copy = Path(shutil.copytree(trained(), tmp_path / str(i) / "exp"))
        if i == 1:
            torch.manual_seed(77)  # whatever ran before in the process
        if i == 2:  # trained on and back: other weights were there in between
            mnist.main(["l", "epochs_max=3", "device=cpu", f"exp={copy}"])
            shutil.copy(copy / "models/weights-1.cp", copy / "models/last.cp")
            shutil.copy(trained() / "latents-last.npz", copy / "latents-last.npz")
        mnist.main(["eval", "gen_imgs=7", "device=cpu", f"exp={copy}", *words.split()])
        found.append({name: value for name, value in outcome(tmp_path / str(i)).items()
                      if "/reco/" in name or "generated" in name or "digits_eval" in name})  # fmt: skip
    assert len(found[0]) > 6
    assert found[0] == found[1] == found[2]


# ---- the weights and the mode of each stage


def stored(folder: Path) -> tuple[Params, LBAE]:
    params, path = experiment_params(folder, {"eval": True}), folder / "models/last.cp"
    model = build_model(params)
    load_nets(model, read_checkpoint(path), path)
    return params, model.eval().requires_grad_(False)


def read_images(folder: Path, count: int) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{i}.png"), int) for i in range(count)])


def test_reconstructions_are_those_of_the_stored_weights_in_evaluation_mode(trained, tmp_path):
    copy = Path(shutil.copytree(trained(), tmp_path / "exp"))
    mnist.main(["eval", "device=cpu", f"exp={copy}", "batch_size_test=5"])
    params, model = stored(copy)
    data = load_split(params, "test")
    x = torch.stack([data[i][0] for i in range(len(data))])
    xr, encoded = model(x.float() / 255)
    assert np.abs(read_images(copy / "reco", 24) - to_uint8(xr)[:, 0]).max() <= 1
    assert np.array_equal(read_images(tmp_path / "digits_eval", 24), x.numpy()[:, 0])
    latents = Latents.load(copy / "latents-eval.npz")
    assert torch.equal(latents.codes, encoded.code.to(torch.int8))
    assert latents.labels[:, 0].tolist() == [int(data[i][1]) for i in range(24)]
    per_image = losses(xr, x.float() / 255, encoded, binary=True, training=False)["reco_loss"]
    written = float((copy / "fid-epoch.txt").read_text().split("loss_eval:")[1])
    assert written == pytest.approx(float(per_image.double().mean()), rel=1e-6)  # batches of 5, 5, 5, 5, 4


def test_reference_images_are_written_once_and_again_when_one_is_gone(trained, tmp_path):
    copy = Path(shutil.copytree(trained(), tmp_path / "exp"))
    run, reference = ["eval", "device=cpu", f"exp={copy}"], tmp_path / "digits_eval"
    mnist.main(run)
    made = {path.name: path.stat().st_mtime_ns for path in reference.iterdir()}
    (reference / "fid_stats.npz").write_bytes(b"the statistics of these images")
    mnist.main(run)
    assert made.items() <= {path.name: path.stat().st_mtime_ns for path in reference.iterdir()}.items()
    assert (reference / "fid_stats.npz").exists()
    (reference / "3.png").unlink()
    mnist.main(run)
    assert (reference / "3.png").exists() and not (reference / "fid_stats.npz").exists()


def test_generated_images_are_decoded_in_evaluation_mode(trained, tmp_path):
    copy = Path(shutil.copytree(trained(), tmp_path / "exp"))
    run = ["eval", "gen", "device=cpu", f"exp={copy}", "gen_imgs=7", "seed=4"]
    mnist.main([*run, "sample_method=random"])
    bits = sampler.fair_bits((7, 24), torch.Generator().manual_seed(4))
    _, model = stored(copy)
    assert np.abs(read_images(copy / "generated/samples_random", 7) - to_uint8(model.gen(bits))[:, 0]).max() <= 1


def test_the_codes_of_training_are_shuffled_and_keep_their_labels(trained):
    folder = trained()
    params, state = experiment_params(folder, {"batch_size": 16}), read_checkpoint(folder / "models/last.cp")
    data, latents = load_split(params, "train"), Latents.load(folder / "latents-last.npz")
    targets = np.array([int(data[i][1]) for i in range(len(data))])
    order = Batches(data, params.batch_size, params.seed).order(state["epoch"])
    assert latents.labels[:, 0].tolist() == targets[order].tolist() != targets.tolist()
    assert sorted(order) == list(range(96))
    assert order.tolist() != Batches(data, params.batch_size, params.seed).order(0).tolist()  # anew every epoch


@pytest.mark.parametrize("script", ["best.cp", "best.safetensors"])
def test_the_best_epoch_is_that_of_the_lowest_test_loss(script, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 1.5])
    run_set = training.run_set
    monkeypatch.setattr(training, "run_set", lambda *a, **k: dataclasses.replace(run_set(*a, **k), loss=next(scores)))
    mnist.main([*TINY, f"exp={tmp_path / 'exp'}", "epochs_max=3"])
    best, second = (read_checkpoint(tmp_path / "exp/models" / name) for name in (script, "weights-1.cp"))
    assert (best["epoch"], best["loss_eval"]) == (1, 1.0)
    assert all(torch.equal(best["gen"][key], second["gen"][key]) for key in second["gen"])
    assert Latents.load(tmp_path / "exp/latents.npz").epoch == 1
    assert Latents.load(tmp_path / "exp/latents-last.npz").epoch == 2
    last = read_checkpoint(tmp_path / "exp/models/last.cp")
    assert (last["epoch"], last["loss_eval"], last["best"]) == (2, 2.0, 1.0)
    mnist.main(["l", f"exp={tmp_path / 'exp'}", "epochs_max=4"])  # a training that goes on remembers what was best
    last = read_checkpoint(tmp_path / "exp/models/last.cp")
    assert (last["epoch"], last["loss_eval"], last["best"]) == (3, 1.5, 1.0)
    assert read_checkpoint(tmp_path / "exp/models" / script)["epoch"] == 1


def test_a_path_leads_from_one_image_s_code_to_another_s(trained, tmp_path):
    folder = Path(shutil.copytree(trained(), tmp_path / "exp"))
    latents, draw = Latents.load(folder / "latents-last.npz"), torch.Generator().manual_seed(0)
    marks, noise = torch.randn(10, 24, generator=draw), torch.randn(96, 24, generator=draw)
    codes = (marks[latents.labels[:, 0]] + noise).sign().to(torch.int8)  # 96 of their own: the model's often agree
    dataclasses.replace(latents, codes=codes).save(folder / "latents-last.npz")
    options = {"eval": True, "gen": True, "sample_method": "int", "batch_size_test": 3, "attr_threshold": 0.6}
    params = experiment_params(folder, options)
    state = read_checkpoint(folder / "models/last.cp")
    source = Trained(params, folder, stored(folder)[1], state, torch.device("cpu"))
    codes, columns, counted = code_source(source)(36)
    rows = codes.view(-1, columns, 24)
    assert (len(rows), columns, int(counted.sum())) == (3, 12, 36)
    assert bool((rows[:, 0] != rows[:, -1]).any(1).all())
    known = {tuple(code) for code in Latents.load(folder / "latents-last.npz").codes.tolist()}
    assert len(known) == 96
    assert all(tuple(rows[i, j].tolist()) in known for i in range(3) for j in (0, -1))
    # towards an attribute: the same beginnings, ends with the bits that mark it
    source.params = params.with_changes(set_attr=3)
    towards = code_source(source)(36)[0].view(-1, columns, 24)
    latents = Latents.load(folder / "latents-last.npz")
    mean = latents.codes[latents.labels[:, 0] == 3].double().mean(0)
    forced = mean.abs() > params.attr_threshold
    assert 0 < int(forced.sum()) < 24
    assert torch.equal(towards[:, 0], rows[:, 0])
    assert torch.equal(towards[:, -1, forced], mean[forced].sign().to(torch.int8).expand(3, -1))
    assert torch.equal(towards[:, -1, ~forced], towards[:, 0, ~forced])


@torch.no_grad()
def test_the_vae_draws_its_codes():
    torch.manual_seed(0)
    model, x = LBAE(32, 1, 6, width=2, vae=True).eval(), torch.rand(3, 1, 32, 32)
    (one, encoded), (two, _) = model(x), model(x)
    assert not torch.equal(one, two)
    noise = torch.randn(3, 6)
    model.randn_like = lambda mu: noise
    torch.testing.assert_close(model(x)[0], model.gen(encoded.mu + noise * (encoded.logvar / 2).exp()))
    terms = losses(one, x, encoded, binary=False, kl_weight=3.0)
    torch.testing.assert_close(terms["kld_loss"], 3 / 6 * kl_divergence(encoded.mu, encoded.logvar))
    torch.testing.assert_close(terms["loss"], terms["reco_loss"] + terms["kld_loss"])


# ---- images as the network sees them


def test_pixels_are_levels_of_255():
    assert as_input(torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)).flatten().tolist() == pytest.approx(
        [0, 0.2, 1]
    )


def test_mnist_is_framed_not_stretched(tmp_path):
    raw, images = tmp_path / "MNIST/raw", np.random.default_rng(0).integers(1, 256, (12, 28, 28), dtype=np.uint8)
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 12, 28, 28) + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 12) + bytes(range(10)) + b"\0\1")
    seen = load_split(Params(data_root=str(tmp_path)), "test").images_at(np.arange(12))[:, 0]
    assert np.array_equal(seen, np.pad(images, ((0, 0), (2, 2), (2, 2))))


def test_the_crop_of_celeba(tmp_path):
    base = tmp_path / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    face = np.zeros((218, 178, 3), np.uint8)
    face[59:159, 39:139] = 200  # a bright square of 100 pixels in the middle
    for i in (1, 2, 3):
        Image.fromarray(face).save(base / f"img_align_celeba/{i:06d}.jpg", quality=95)
    head, names = " ".join(f"A{i}" for i in range(40)), [f"{i:06d}.jpg" for i in (1, 2, 3)]
    (base / "list_attr_celeba.txt").write_text("\n".join(["3", head, *(f"{n} {'1 ' * 40}" for n in names)]) + "\n")
    (base / "list_eval_partition.txt").write_text("".join(f"{n} {i}\n" for i, n in enumerate(names)))
    options = {"dataset": "celeba", "img_size": 64, "channels": 3, "data_root": str(tmp_path)}
    whole, cropped = (load_split(Params(**options, img_crop_size=crop), "test").images_at(np.array([0]))
                      for crop in (0, 100))  # fmt: skip
    assert whole.min() < 10 and whole.max() > 190  # the square and what is around it
    assert cropped.min() > 180


# ---- scores


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    """Squares of all places as `ref`; `few` shows a handful of them, `blurred` all of them with noise."""
    root, g = tmp_path_factory.mktemp("squares") / "shown", np.random.default_rng(0)
    for name, n, noise in (("ref", 120, 0), ("few", 3, 0), ("blurred", 120, 60)):
        (root / name).mkdir(parents=True)
        for i in range(120):
            x, y = np.random.default_rng(i % n + 1000 * (name == "blurred")).integers(0, 24, 2)
            image = g.integers(0, 5 + noise * 3, (32, 32)).astype(np.uint8)
            image[x : x + 8, y : y + 8] = 250
            Image.fromarray(image).save(root / name / f"{i}.png")
    return root


def scored(squares: Path, folder: Path, *words: str) -> Results:
    """The line of results of the squares in a new folder."""
    shutil.copytree(squares, folder, copy_function=os.link)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("METRICS_CACHE", str(folder / "cache"))
        eval.main(["s=ref", "t=few,blurred", "feat=pixel-pca16", "kid_subsets=5", "kid_size=60", "device=cpu", *words])
    return read_line((folder / "results.txt").read_text())


@pytest.fixture(scope="module")
def plain(squares) -> Results:
    return scored(squares, squares.with_name("plain"))


def test_scores_hang_on_the_images_alone(plain, squares, tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)
    assert str(scored(squares, tmp_path / "again")) == str(plain)


def test_f8_is_recall_and_its_inverse_precision(plain):
    few, blurred = plain.sections
    assert few.f8[0] < 0.5 * few.f8[1]  # what is shown is right, but little is shown
    assert few.f8[0] < blurred.f8[0]


@pytest.mark.parametrize("words", ["prd=0", "kid_subsets=9", "kid_size=50", "limit=70", "feat=pixel-pca8", "t=few"])
def test_every_option_of_the_scores_changes_what_it_says(words, plain, squares, tmp_path):
    changed = scored(squares, tmp_path / "changed", words)
    assert str(plain) != str(changed)
    if words in ("kid_subsets=9", "kid_size=50", "prd=0"):
        assert [s.fid for s in plain.sections] == [s.fid for s in changed.sections]
    if words == "limit=70":
        assert [s.ntest for s in changed.sections] == [70, 70]
