"""The users' commands, tiny and in a temporary folder: train, resume, evaluate, generate, and what they refuse."""

import csv
import json
import os
import pickle
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import NonFiniteError, UserError, run_command
from common.options import from_tokens
from lbae import celeba, cifar10, command, mnist
from lbae.experiment import Latents, read_checkpoint
from lbae.options import Params

TINY = ["dataset=digits", "width=2", "zsize=16", "batch_size=32", "batch_size_test=128", "lr=1e-2", "dec_in_channels=4",
        "device=cpu", "train_images=384", "test_images=70"]  # fmt: skip
BATCHES = 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two epochs on digits. Tests that write into it use file names of their own."""
    folder = tmp_path_factory.mktemp("lbae") / "exp"
    mnist.main([*TINY, f"exp={folder}", "epochs_max=2"])
    return folder


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(trained, tmp_path / "exp"))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".jpg"))


def same_training(first: Path, second: Path) -> None:
    """Bit for bit: weights, Adam's moments, latents, logged losses."""
    one, two = (read_checkpoint(folder / "models/last.cp") for folder in (first, second))
    for part in ("enc", "gen"):
        assert all(torch.equal(one[part][key], two[part][key]) for key in one[part])
    for index, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(value, two["optimizer"]["state"][index][key]) for key, value in moments.items())
    assert (one["epoch"], one["iter"], one["best"]) == (two["epoch"], two["iter"], two["best"])
    assert rows(first) == rows(second)
    for name in ("latents-last.npz", "latents.npz", "latents-eval.npz"):
        ours, theirs = (Latents.load(folder / name) for folder in (first, second))
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.labels, theirs.labels)


def test_training_writes_what_the_readme_lists(trained):
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert {
        "config.json", "metrics.csv", "log.txt", "log/train-log-0.txt",
        "models/weights-0.cp", "models/weights-1.cp", "models/last.cp", "models/best.cp", "models/best.safetensors",
        "models/best.json", "latents-last.npz", "latents.npz", "latents-eval.npz",
        "reconstructed_train/sample_0_0.jpg", "reconstructed_train/sample_1_0.jpg",
        "reconstructed_eval/sample_0_0.jpg", "reconstructed_eval/sample_1_0.jpg",
    } <= files  # fmt: skip
    table = rows(trained)
    losses = [float(row["losses/Train_loss"]) for row in table if row["losses/Train_loss"]]
    assert len(losses) == 2 * BATCHES
    assert losses[-1] < losses[0] - 20
    assert all(0 < float(row["losses/Train_QERR"]) < 1 for row in table if row["losses/Train_QERR"])
    tests = [float(row["losses/Eval_reco_loss"]) for row in table if row["losses/Eval_reco_loss"]]
    state = read_checkpoint(trained / "models/last.cp")
    assert (state["epoch"], state["iter"], state["loss_eval"]) == (1, 2 * BATCHES * 32, tests[-1])
    assert state["best"] == min(tests)
    latents = Latents.load(trained / "latents-last.npz")
    assert latents.codes.shape == (BATCHES * 32, 16)
    assert (latents.epoch, latents.iter) == (1, 2 * BATCHES * 32)
    records = (trained / "log/train-log-0.txt").read_text().split("\n")
    assert records[:2] == ["", "ts epoch iter stage reco_loss loss QERR"]
    assert records[2].split()[1:4] == ["0", "32", "Train"]
    assert any(line.split()[1:4] == ["1", "768", "Eval"] for line in records if line)


def test_resume_equals_an_uninterrupted_run(trained, tmp_path):
    folder = tmp_path / "exp"
    mnist.main([*TINY, f"exp={folder}", "epochs_max=1"])
    mnist.main(["l", f"exp={folder}", "epochs_max=2", "device=cpu"])  # the rest comes from the saved configuration
    same_training(trained, folder)
    log = (folder / "log.txt").read_text()
    assert "changed epochs_max: 1 -> 2" in log
    assert "resumed at epoch 1, batch 0" in log


@pytest.mark.parametrize("vae", [False, True])
def test_resume_in_the_middle_of_an_epoch(tmp_path, vae):
    extra = ["vae=1", "kl_weight=2"] if vae else []
    mnist.main([*TINY, *extra, f"exp={tmp_path / 'whole'}", "epochs_max=2"])

    folder, pid = tmp_path / "stopped", os.getpid()

    def stop_after_some_batches():
        while not (folder / "metrics.csv").exists() or len((folder / "metrics.csv").read_text().split("\n")) < 4:
            time.sleep(0.001)
        os.kill(pid, signal.SIGTERM)

    watcher = threading.Thread(target=stop_after_some_batches)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        mnist.main([*TINY, *extra, f"exp={folder}", "epochs_max=2"])
    watcher.join()
    stopped = read_checkpoint(folder / "models/last.cp")
    assert (stopped["epoch"], stopped["batch"]) != (1, 0)
    mnist.main(["l", f"exp={folder}", "device=cpu"])
    same_training(tmp_path / "whole", folder)


def test_taking_up_an_earlier_epoch(copy):
    before = rows(copy)
    mnist.main(["reload=0", f"exp={copy}", "epochs_max=2", "device=cpu", "keep_last_models=1"])
    assert rows(copy) == before
    assert sorted(path.name for path in (copy / "models").glob("weights-*")) == ["weights-1.cp"]


def test_an_old_experiment_is_not_overwritten(copy):
    state = (copy / "models/last.cp").read_bytes()
    with pytest.raises(UserError, match="already holds an experiment"):
        mnist.main([*TINY, f"exp={copy}", "epochs_max=1"])
    assert (copy / "models/last.cp").read_bytes() == state
    mnist.main([*TINY, f"exp={copy}", "epochs_max=1", "overwrite=1", "seed=1"])
    assert sorted(path.name for path in (copy / "models").glob("weights-*")) == ["weights-0.cp"]
    assert len(rows(copy)) == BATCHES + 1


def test_a_diverging_run_stops_and_keeps_its_state(tmp_path):
    with pytest.raises(NonFiniteError, match=r"loss is nan at step \d+ .*non-finite"):
        mnist.main([*TINY, f"exp={tmp_path / 'exp'}", "epochs_max=3", "lr=1e12", "vae=1"])
    assert read_checkpoint(tmp_path / "exp/models/crash.cp")["iter"] > 0


def test_evaluation_and_every_generator(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)  # inside the experiment, as `python3 ../mnist.py eval`
    mnist.main(["eval", "device=cpu"])
    assert len(pictures(trained / "reco")) == len(pictures(trained.parent / "digits_eval")) == 70
    assert (trained / "reconstructed_eval/sample_0_0.jpg").exists()
    tokens = dict(token.split(":") for token in (trained / "fid-epoch.txt").read_text().split())
    assert tokens["e"] == "1"
    last = float([row["losses/Eval_reco_loss"] for row in rows(trained) if row["losses/Eval_reco_loss"]][-1])
    assert float(tokens["loss_eval"]) == pytest.approx(last, rel=1e-6)
    # the reference images are the test set as the network sees it
    note = json.loads((trained.parent / "digits_eval/written.json").read_text())
    assert (note["images"], note["size"]) == (70, 32)
    assert np.asarray(Image.open(trained.parent / "digits_eval/0.png")).shape == (32, 32)

    base = ["eval", "gen", "device=cpu"]
    for method in ("cov", "random", "independent"):
        mnist.main([*base, f"sample_method={method}", "gen_imgs=70", "batch_size_test=40"])
        assert pictures(trained / f"generated/samples_{method}") == sorted(f"{i}.png" for i in range(70))
        assert (trained / f"generated/sample_1_{method}.jpg").exists()
        assert len({(trained / f"generated/samples_{method}/{i}.png").read_bytes() for i in range(70)}) > 10
    several = [*base, "sample_method=int", "gen_imgs=20", "batch_size_test=3", "interpolate_steps=4"]
    mnist.main(several)
    assert len(pictures(trained / "generated/samples_int")) == 20
    assert (trained / "generated/sample_1_int.jpg").exists()
    first = (trained / "generated/samples_int/0.png").read_bytes()
    second = (trained / "generated/samples_int/1.png").read_bytes()
    mnist.main([*several, "int_endpoints=0", "split=mean"])
    assert (trained / "generated/samples_int/0.png").read_bytes() != first
    mnist.main([*several, "int_endpoints=0"])  # the same paths without their first image
    assert (trained / "generated/samples_int/0.png").read_bytes() == second
    mnist.main([*several, "int_source=test", "latents=refresh"])
    assert (trained / "generated/samples_int/0.png").read_bytes() != first
    mnist.main([*several, "set_attr=3", "attr_mode=contrast", "attr_threshold=0.2", "img_format=jpg", "stretch=1"])
    assert len(pictures(trained / "generated/samples_int_attr_3")) == 20
    assert (trained / "generated/sample_0_int_attr_3.0.jpg").exists()
    stored = np.load(trained / "prob_dim_3.npz")
    assert (np.diff(stored["means"]) >= 0).all()
    assert "eigenvalues negative" in capsys.readouterr().out

    mnist.main(["eval", "eval_train", "device=cpu"])
    assert len(pictures(trained.parent / "digits_train")) == 384
    assert Latents.load(trained / "latents-train.npz").source == "evaluation pass"


def test_fewer_images_replace_the_old_ones_and_other_settings_the_reference(copy):
    run = ["eval", f"exp={copy}", "device=cpu"]
    mnist.main([*run, "gen", "gen_imgs=12"])
    mnist.main([*run, "gen", "gen_imgs=5"])
    assert len(pictures(copy / "generated/samples_cov")) == 5
    mnist.main(run)
    mnist.main([*run, "test_images=11", "img_format=jpg"])
    assert pictures(copy.parent / "digits_eval") == sorted(f"{i}.jpg" for i in range(11))


def test_latents_of_other_weights_are_reported(copy, capsys):
    mnist.main(["eval", "gen", "reload=0", f"exp={copy}", "gen_imgs=4", "device=cpu"])
    assert "latents are of epoch 1, the weights of epoch 0" in capsys.readouterr().out
    (copy / "latents-last.npz").unlink()
    with pytest.raises(UserError, match="latents=refresh"):
        mnist.main(["eval", "gen", f"exp={copy}", "gen_imgs=4", "device=cpu"])
    mnist.main(["eval", "gen", f"exp={copy}", "gen_imgs=4", "device=cpu", "latents=refresh"])


def test_the_vae(tmp_path):
    run = [*TINY, "cfg=mnist_vae", f"exp={tmp_path / 'exp'}"]
    mnist.main([*run, "epochs_max=1"])
    row = rows(tmp_path / "exp")[0]
    total = float(row["losses/Train_reco_loss"]) + float(row["losses/Train_kld_loss"])
    assert float(row["losses/Train_loss"]) == pytest.approx(total, rel=1e-5)
    assert Latents.load(tmp_path / "exp/latents-last.npz").codes.dtype == torch.float32
    mnist.main(["eval", f"exp={tmp_path / 'exp'}", "device=cpu"])
    mnist.main(["eval", "gen", f"exp={tmp_path / 'exp'}", "gen_imgs=6", "device=cpu"])  # random is its default
    assert len(pictures(tmp_path / "exp/generated/samples_random")) == 6
    for method in ("cov", "int", "independent"):
        with pytest.raises(UserError, match="needs bits"):
            mnist.main(["eval", "gen", f"exp={tmp_path / 'exp'}", f"sample_method={method}", "device=cpu"])


def test_published_files_are_read(copy, tmp_path, capsys):
    state = read_checkpoint(copy / "models/last.cp")
    latents = Latents.load(copy / "latents-last.npz")
    old = tmp_path / "old"
    for name in ("models", "log"):
        (old / name).mkdir(parents=True)
    published = {key: state[key] for key in ("epoch", "iter", "loss_eval")}
    published |= {part: {f"module.{key}": value for key, value in state[part].items()} for part in ("enc", "gen")}
    torch.save(published, old / "models/last.cp")
    config = json.loads((copy / "config.json").read_text())
    kept = {key: config[key] for key in ("cfg", "dataset", "img_size", "channels", "zsize", "vae", "width")}
    kept |= {
        "lr": [1e-4],
        "vae_model": "ConvResBlock32",
        "kde_bw": None,
        "dec_in_channels": 4,
        "binary_reco_loss": True,
    }
    (old / "log/cfg-0-0.json").write_text(json.dumps(kept))
    (old / "latents-last.pk").write_bytes(
        pickle.dumps([latents.codes.numpy().astype(np.float32), latents.labels.numpy()])
    )
    for folder in (copy, old):
        mnist.main(["eval", "gen", f"exp={folder}", "gen_imgs=9", "device=cpu"])
    for i in range(9):
        ours, theirs = (folder / f"generated/samples_cov/{i}.png" for folder in (copy, old))
        assert ours.read_bytes() == theirs.read_bytes()
    mnist.main(["l", f"exp={old}", "epochs_max=3", "device=cpu", *TINY])  # training goes on from published weights
    assert read_checkpoint(old / "models/last.cp")["epoch"] == 2


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_hostile_pickles_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latents.pk").write_bytes(pickle.dumps([_Evil(), _Evil()]))
    with pytest.raises(UserError, match="refused"):
        Latents.load(Path("latents.npz"))
    assert not Path("evil").exists()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["sampel_method=cov"], r"unknown option sampel_method \(did you mean 'sample_method'\?\)"),
        (["sample_method=covv"], "did you mean 'cov'"),
        (["zsize"], "zsize: a value is missing"),
        (["zsize=1.5"], "expected a whole number"),
        (["lr=fast"], "expected a number"),
        (["vae=maybe"], "vae=maybe: expected true"),
        (["batch_size=0"], "at least 1"),
        (["cfg=celeba_bae"], "this script has mnist_bae, mnist_vae"),
        (["gen"], "write `eval gen`"),
        (["eval", "gen", "gen_imgs=0"], "gen_imgs=0: expected a whole number of at least 1"),
        (["img_size=48"], r"48 pixels|img_size=48"),
        (["device=tpu"], "device=tpu"),
        (["channels=3"], "the model takes 3"),
        (["cuda_device=0", "device=cpu"], "contradicts"),
        (["batch_size=5000"], "exceeds"),
    ],
)
def test_wrong_commands_stop_at_once(tmp_path, tokens, message):
    with pytest.raises(UserError, match=message):
        mnist.main([*TINY, f"exp={tmp_path / 'exp'}", *tokens] if "eval" not in tokens else tokens)
    assert not (tmp_path / "exp/models").exists()


def test_wrong_generation_commands(trained):
    run = ["eval", "gen", f"exp={trained}", "device=cpu"]
    for tokens, message in (
        (["set_attr=3"], "goes with sample_method=int"),
        (["sample_method=int", "set_attr=77"], "set_attr=77: no training latent has the .* class 77; known: 0, 1"),
        (["sample_method=int", "batch_size_test=200", "gen_imgs=5000"], "lower batch_size_test"),
        (["width=4"], r"does not fit this model .*expected"),
        (["zsize=8"], "does not fit this model"),
        (["reload=9"], r"no checkpoint at .*weights-9.cp; there are best.cp"),
        (["cfg=mnist_vae"], "holds a mnist_bae experiment"),
    ):
        with pytest.raises(UserError, match=message):
            mnist.main([*run, *tokens])
    with pytest.raises(UserError, match="the name says which script"):
        celeba.main(run)


def test_evaluation_never_makes_an_experiment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["mnist.py", "eval", f"exp={tmp_path / 'none'}"])
    assert run_command(mnist.main) == 2
    assert "no experiment at" in capsys.readouterr().err
    for name in ("models", "log"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"no checkpoint at models/last\.cp"):
        mnist.main(["eval"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "models"]
    (tmp_path / "models/last.cp").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"last.cp is (truncated|refused)"):
        mnist.main(["eval"])


def test_where_an_experiment_lies(tmp_path, monkeypatch):
    def resolve(configs, script, argv):
        return command.resolve(configs, script, from_tokens(Params, argv)[1])

    script = tmp_path / "lbae/mnist.py"
    name = "mnist_bae_res32_ConvResBlock32-qae-z200-m169"
    monkeypatch.chdir(tmp_path)
    assert resolve(mnist.CONFIGS, script, [])[1] == tmp_path / "lbae" / name
    assert resolve(mnist.CONFIGS, script, ["zsize=64"])[1].name == name.replace("z200", "z64")
    assert resolve(mnist.CONFIGS, script, ["exp=elsewhere"])[1] == Path("elsewhere")
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert resolve(mnist.CONFIGS, script, [])[1] == Path(".")
    other = tmp_path / "exp"
    (other / "models").mkdir(parents=True)
    (other / "log").mkdir()
    saved = {"cfg": "mnist_vae", "zsize": 7, "width": 3, "vae": True, "lr": 0.5, "dataset": "digits"}
    (other / "log/cfg-2-0.json").write_text("{}")
    (other / "log/cfg-10-0.json").write_text(json.dumps(saved))
    monkeypatch.chdir(other)
    params, folder = resolve(mnist.CONFIGS, script, ["eval", "gen"])
    assert (folder, params.cfg, params.zsize, params.width, params.sample_method) == (
        Path("."),
        "mnist_vae",
        7,
        3,
        "random",
    )
    assert params.lr == 1e-4  # a training key: not taken for an evaluation
    assert resolve(mnist.CONFIGS, script, ["l", "epochs_max=9"])[0].lr == 0.5
    assert resolve(mnist.CONFIGS, script, ["eval", "zsize=5"])[0].zsize == 5


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        mnist.main(["help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("attr_threshold=0.12", "split=margin", "one of cov, int", "mnist_vae"))


# --------------------------------------------------------------------------------------- other data, real file layouts


def test_cifar10_in_its_own_layout(tmp_path):
    folder = tmp_path / "data/cifar-10-batches-py"
    folder.mkdir(parents=True)
    g = np.random.default_rng(0)
    for name, n in [(f"data_batch_{i}", 8) for i in range(1, 6)] + [("test_batch", 10)]:
        batch = {b"data": g.integers(0, 256, (n, 3072), dtype=np.uint8), b"labels": list(range(n))}
        (folder / name).write_bytes(pickle.dumps(batch))
    run = [f"data_root={tmp_path / 'data'}", f"exp={tmp_path / 'exp'}", "device=cpu", "width=2", "zsize=8"]
    cifar10.main([*run, "batch_size=20", "epochs_max=1"])
    cifar10.main(["eval", *run[:3]])
    cifar10.main(["eval", "gen", *run[:3], "gen_imgs=4", "latents=best"])
    assert len(pictures(tmp_path / "cifar10_eval")) == 10
    with Image.open(tmp_path / "exp/generated/samples_cov/3.png") as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")


def test_celeba_in_its_own_layout(tmp_path):
    base = tmp_path / "data/celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    g = np.random.default_rng(0)
    names = [f"{i:06d}.jpg" for i in range(1, 31)]
    for name in names:
        pixels = g.integers(0, 256, (218, 178, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / "img_align_celeba" / name)
    labels = np.where(g.random((30, 40)) < 0.5, 1, -1)
    labels[:4, 15] = 1
    head = ["30", " ".join(f"Attribute_{i}" for i in range(40))]
    lines = [f"{name}  {' '.join(map(str, row))}" for name, row in zip(names, labels, strict=True)]
    (base / "list_attr_celeba.txt").write_text("\n".join([*head, *lines]) + "\n")
    parts = [f"{name} {0 if i < 20 else 2}" for i, name in enumerate(names)]
    (base / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    run = [f"data_root={tmp_path / 'data'}", f"exp={tmp_path / 'exp'}", "device=cpu"]
    celeba.main([*run, "width=2", "zsize=8", "batch_size=10", "epochs_max=1"])
    assert Latents.load(tmp_path / "exp/latents-last.npz").labels.shape == (20, 40)
    celeba.main(["eval", *run])
    celeba.main(["eval", "gen", *run, "gen_imgs=12", "batch_size_test=2", "sample_method=int", "set_attr=15",
                 "interpolate_steps=4"])  # fmt: skip
    assert len(pictures(tmp_path / "exp/generated/samples_int_attr_15")) == 12
    assert (tmp_path / "exp/generated/sample_0_int_attr_15.0.jpg").exists()
    assert len(pictures(tmp_path / "celeba_eval")) == 10


def test_sprites_and_their_factors_as_attributes(tmp_path):
    run = [f"exp={tmp_path / 'exp'}", "device=cpu"]
    celeba.main([*run, "dataset=sprites", "channels=1", "width=2", "zsize=8", "batch_size=32", "epochs_max=1",
                 "train_images=64", "test_images=20", "binary_reco_loss=1"])  # fmt: skip
    labels = Latents.load(tmp_path / "exp/latents-last.npz").labels
    assert labels.shape == (64, 3 + 6 + 40 + 32 + 32)
    assert bool((labels[:, :3].sum(1) == 1).all())
    celeba.main(["eval", "gen", *run, "gen_imgs=8", "batch_size_test=2", "sample_method=int", "set_attr=2"])
    assert len(pictures(tmp_path / "exp/generated/samples_int_attr_2")) == 8


def test_absent_data_name_the_path_and_the_command(tmp_path):
    with pytest.raises(UserError, match=r"MNIST.*common.datasets.prepare mnist"):
        mnist.main([f"data_root={tmp_path}", f"exp={tmp_path / 'exp'}", "device=cpu", "width=2"])


def test_a_release_gives_the_same_images(trained, tmp_path):
    from lbae import release

    file = tmp_path / "tiny.safetensors"
    release.main(["pack", str(trained), str(file)])
    release.main(["unpack", str(file), str(tmp_path / "exp")])
    for folder in (trained, tmp_path / "exp"):
        mnist.main(["eval", "gen", f"exp={folder}", "gen_imgs=7", "seed=5", "device=cpu"])
    for i in range(7):
        ours, theirs = (folder / f"generated/samples_cov/{i}.png" for folder in (trained, tmp_path / "exp"))
        assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(UserError, match="not empty"):
        release.main(["unpack", str(file), str(tmp_path / "exp")])
    with pytest.raises(UserError, match="was not written by"):
        release.main(["unpack", str(trained / "models/best.safetensors"), str(tmp_path / "other")])
