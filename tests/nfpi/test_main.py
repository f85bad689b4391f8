"""The user's commands, tiny, on the digits set that scikit-learn ships."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from front import children
from omegaconf import OmegaConf

from common import training
from common.checkpoint import load_state, load_weights
from common.errors import UserError, run_command
from nfpi import data, main
from nfpi.conditional import STATE_KIND, ConditionalFlow
from nfpi.config import CONFIGS, plain_argv, resolve
from nfpi.fit_gaussians import gaussians_move
from nfpi.train import learning_rate

REPOSITORY = Path(main.__file__).resolve().parents[1]
DIGITS = ["--config_path=___configs/digits", "--config-name=smoke"]
TINY = [
    "device=cpu",
    "num_flows=[1,1]",
    "hidden_channels=[4,4]",
    "train.batch_size=60",
    "train.init_batch_size=60",
    "dataset_info.items_per_class_train=12",
    "dataset_info.items_per_class_val=12",
    "save_every_n_epochs=0",
    "temperature_sampling_for_results=0",
    "test_every_n_epochs=5",
]
FLOW_ONLY = ["test_nf_alone=0", "train_classifier=0"]
pytestmark = pytest.mark.usefixtures("undrawn", "narrow_cnn")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def folder(extra="_", lam=1000):
    return Path("outputs/digits/smoke") / f"{lam}_{lam}" / extra / "version_0"


def metrics(path):
    with open(path / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_all_stages_by_the_documented_command(capsys, drawn):
    small = [a for a in TINY if not a.startswith(("save_every", "test_every"))]
    main.main(
        [
            *DIGITS,
            *small,
            "save_every_n_epochs=3",
            "train.epochs=3",
            "extra=new_experiment",
            "num_test_alone=2",
            "only_T=1",
            "T=0.9",
            "classification.digits.epochs=1",
            "num_imgs_scale=0.1",
            "classification.stem=imagenet",
        ]
    )
    run = folder("new_experiment")
    results = json.loads((run / "results.json").read_text())
    assert set(results["cnn"]) == {"0.9"} and 0 <= results["cnn"]["0.9"] <= 1
    nf = results["nf"]
    assert nf["repeats"] == 2 and nf["acc"] > 0.3 and nf["acc"] <= nf["top5"]
    assert nf["bpd_std"] > 0  # another draw of the dequantisation noise each time
    gap = nf["bpd_marginal"] - nf["bpd"]  # at most ln K / (D ln 2): D = 64
    assert -1e-9 <= gap <= np.log2(10) / 64 + 1e-9
    assert "cnn T=0.9 accuracy" in capsys.readouterr().out
    fitted = [r for r in metrics(run) if r["kl_min"]]
    assert len(fitted) == 1 and fitted[0]["fpi_converged"] == "1"
    with open(run / "fpi_epoch0000.csv") as file:
        fpi = list(csv.DictReader(file))
    assert {"mean_change", "var_change", "kl_min", "kl_mean", "kl_max"} <= set(fpi[0])
    assert float(fpi[-1]["mean_change"]) <= 0.1 and float(fpi[-1]["kl_min"]) > float(fpi[0]["kl_min"])
    for name in ("samples_0", "mean_0", "var_0", "pairwise_kl", "tsne_latents", "fpi_epoch0000"):
        assert (run / "pictures" / f"{name}.png").stat().st_size > 500
    made = data.load_generated(run / "0_exp_0_T0.9/pickle_datasets/ds_0.pickle", ())
    assert torch.bincount(made.targets).tolist() == [14] * 10 and made.images.shape[1:] == (1, 8, 8)
    cnn = run / "0_exp_0_T0.9/nf_datasets"
    assert (cnn / "confusion.png").exists() and load_weights(cnn / "cnn.safetensors")[1]["temperature"] == 0.9
    # the weights file: the averaged weights, the Gaussians after the iteration
    model = ConditionalFlow.load(run / "checkpoints/flow.safetensors")
    state = load_state(run / "checkpoints/state_epoch0003.pt", STATE_KIND)
    assert bool(state["ema"]["initted"])
    name = "blocks.0.0.actnorm.shift"
    assert torch.equal(model.flow.state_dict()[name], state["ema"][f"ema_model.{name}"])
    assert not torch.equal(model.flow.state_dict()[name], state["flow"][name])
    assert torch.equal(model.gaussians.mean, state["gaussians"]["mean"])
    # test and CNN from the checkpoint, without copying a configuration; a resampled and a mixed set
    reload = [*DIGITS, *TINY, "train_nf=0", f"nf_load_path={run}/checkpoints/flow.safetensors", "extra=ckpt_test"]
    main.main([*reload, "num_test_alone=2", "train_classifier=0"])
    again = json.loads((folder("ckpt_test") / "results.json").read_text())
    assert again["nf"] == nf
    short = [
        "test_nf_alone=0",
        "only_T=1",
        "T=1.0",
        "classification.digits.epochs=2",
        "num_imgs_scale=0.05",
        "mixing_nbr=0.05",
        "dataset_info.digits.train_size=1000",
        "classification.digits.imgs_per_class=10",
        "classification.stem=imagenet",
    ]
    for i, (strategy, count) in enumerate((("nf_datasets_resample", 50), ("mix_datasets_resample", 150))):
        main.main([*reload, *short, f"classifier_nf_strategy={strategy}"])
        version = folder("ckpt_test").with_name(f"version_{i + 1}")
        first, second = (
            data.load_generated(version / f"0_exp_0_T1.0/pickle_datasets/ds_{e}.pickle", ()) for e in (0, 1)
        )
        assert len(first) == 50 and not torch.equal(first.images, second.images)
        assert f"{count} training images" in (version / "0_exp_0_T1.0" / strategy / "log.txt").read_text()


def test_real_data_classifier_needs_no_flow():
    main.main(
        [
            *DIGITS,
            *TINY,
            "train_nf=0",
            "test_nf_alone=0",
            "classifier_nf_strategy=do_not_use",
            "classification.digits.epochs=6",
            "classification.resnet_version=18",
            "classification.stem=imagenet",
            "classification.digits.imgs_per_class=40",
        ]
    )
    results = json.loads((folder() / "results.json").read_text())
    assert set(results["cnn"]) == {"1.0"} and results["cnn"]["1.0"] > 0.3
    weights = folder() / "0_exp_0_T1.0/do_not_use/cnn.safetensors"
    main.main(
        [
            *DIGITS,
            *TINY,
            "train_nf=0",
            "test_nf_alone=0",
            "classifier_nf_strategy=do_not_use",
            "classification.resnet_version=18",
            "classification.stem=imagenet",
            f"cnn_load_path={weights}",
        ]
    )
    again = json.loads((folder().with_name("version_1") / "results.json").read_text())
    assert again["cnn"] == results["cnn"]


def test_stopped_run_resumes_exactly(monkeypatch):
    """A run stopped in the middle of epoch 1 and resumed gives the weights and metrics of the uninterrupted run."""
    base = [*DIGITS, *TINY, *FLOW_ONLY, "train.batch_size=40", "train.epochs=3"]
    main.main([*base, "extra=whole"])

    class StopAfter(training.StopSignal):
        count = 0

        def __bool__(self):
            StopAfter.count += 1
            return StopAfter.count == 5  # epochs have three batches: in the middle of epoch 1

    with monkeypatch.context() as patch:
        patch.setattr(training, "StopSignal", StopAfter)
        with pytest.raises(KeyboardInterrupt):
            main.main([*base, "extra=parts"])
    parts = folder("parts")
    assert not (parts / "checkpoints/flow.safetensors").exists()
    state = next((parts / "checkpoints").glob("state_*.pt"))
    assert load_state(state, STATE_KIND)["place"] == {"step": 5, "epoch": 1, "images": 80}
    main.main([*base, "extra=parts", f"nf_ckpt_path={state}"])
    whole, resumed = (load_weights(folder(e) / "checkpoints/flow.safetensors")[0] for e in ("whole", "parts"))
    assert set(whole) == set(resumed)
    for key in whole:
        torch.testing.assert_close(resumed[key], whole[key], rtol=1e-6, atol=1e-6)
    rows = [metrics(folder(e)) for e in ("whole", "parts")]
    assert [(r["step"], r["loss"][:8]) for r in rows[0]] == [(r["step"], r["loss"][:8]) for r in rows[1]]


def test_weights_do_not_depend_on_when_it_ran():
    """Two runs of one seed agree to the last bit; another seed does not."""
    for extra, seed in (("a", 3), ("b", 3), ("c", 4)):
        main.main([*DIGITS, *TINY, *FLOW_ONLY, "train.epochs=1", f"seed={seed}", f"extra={extra}"])
    a, b, c = (load_weights(folder(e) / "checkpoints/flow.safetensors")[0] for e in "abc")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["gaussians.mean"], c["gaussians.mean"])


@pytest.mark.parametrize(
    "options",
    [
        ["val.gmm.training_algorithm=glem", "val.gmm.merge_datasets_after=2", "val.gmm.n_loops=2"],
        ["val.gmm.training_algorithm=fpi_nf"],
        ["val.gmm.fpi_info.interval_mu=[-1,-1]"],  # data_init
        ["val.gmm.gaussian_method_name=one"],
        ["val.gmm.gaussian_method_name=one_conditioned_on_images"],
        ["level_method=spcb", "trainer_precision=64", "++use_attention_after=1", "flow_type=affine"],
        ["level_method=all_levels_idx", "level_method.level_idx=2", "conv_type=decomposition", "train.ema_name=''"],
    ],
    ids=["glem", "fpi_nf", "data_init", "one", "one_conditioned", "spcb", "idx"],
)
def test_every_method_trains_and_is_tested(options):
    main.main([*DIGITS, *TINY, *options, "train_classifier=0"])
    run = folder()
    nf = json.loads((run / "results.json").read_text())["nf"]
    losses = [float(r["loss"]) for r in metrics(run) if r["loss"]]
    assert np.isfinite(losses).all() and 3 < nf["bpd"] < 9
    tensors, config = load_weights(run / "checkpoints/flow.safetensors")
    mean, var = tensors["gaussians.mean"], tensors["gaussians.var"]
    if "one" in str(options):
        assert config["shared"] and not mean.any() and (var == 1).all()
        assert ("acc" in nf) is ("codes" in tensors)
        if "codes" in tensors:
            images, labels = ConditionalFlow.load(run / "checkpoints/flow.safetensors").sample(torch.zeros(20).long())
            assert images.shape == (20, 1, 8, 8) and labels.max() <= 9
        return
    assert nf["acc"] > 0.3
    if "glem" in str(options):
        rows = [r for r in metrics(run) if r.get("glem_lr_mean")]
        assert [float(r["glem_lr_mean"]) for r in rows] == [0.1, 0.1]
        assert ((var > 0.25) & (var < 1.25)).all() and mean.abs().max() > 0.05
    elif "interval_mu" in str(options):
        assert not (run / "fpi_epoch0000.csv").exists() and (var == 1).all()
    else:
        assert (run / "fpi_epoch0000.csv").exists()
    if "precision" in str(options):
        assert mean.dtype == torch.float64


def test_pretrained_weights_and_gaussians_are_taken_over(capsys):
    main.main([*DIGITS, *TINY, *FLOW_ONLY, "extra=first", "train.epochs=1"])
    weights = folder("first") / "checkpoints/flow.safetensors"
    main.main(
        [
            *DIGITS,
            *TINY,
            *FLOW_ONLY,
            "extra=second",
            "train.epochs=1",
            "train.lr=1e-12",
            f"nf_weights_load_path={weights}",
            f"gaussians_load_path={weights}",
            "val.gmm.fpi_info.interval_mu=[-1,-1]",
            "use_attention_after=1",
        ]
    )
    first, second = (load_weights(folder(e) / "checkpoints/flow.safetensors")[0] for e in ("first", "second"))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-6, atol=1e-9)
    assert "attention" in capsys.readouterr().err


def test_generated_pickles_from_elsewhere_train_the_classifier():
    train = data.load_split("digits", None, "train")
    data.write_pickle("mine.pickle", {"data": train.images[:300, 0], "targets": train.targets[:300]})
    main.main(
        [
            *DIGITS,
            *TINY,
            "train_nf=0",
            "test_nf_alone=0",
            "classifier_nf_strategy=do_not_use",
            "classification.stem=imagenet",
            "dataset_classification=mine.pickle",
            "classification.digits.epochs=1",
        ]
    )
    assert "300 training images" in (folder() / "0_exp_0_T1.0/do_not_use/log.txt").read_text()


# ---------------------------------------------------------------- configuration


def test_schedules_follow_the_configuration():
    cfg = resolve(
        CONFIGS / "cifar10",
        "mean",
        ["train.step_size=[3,5]", "val.gmm.merge_datasets_after=4", "train.center_warmup_epochs=1"],
    )
    assert learning_rate(cfg, 0, 0) == pytest.approx(1e-5) and learning_rate(cfg, 999, 0) == pytest.approx(0.01)
    assert learning_rate(cfg, 5000, 3) == pytest.approx(0.005) and learning_rate(cfg, 5000, 9) == pytest.approx(0.0025)
    assert [e for e in range(8) if gaussians_move(cfg, e)] == [1, 2, 3]
    assert resolve(CONFIGS / "cifar10", "mean", ["train.center_warmup_epochs=3"]).merged_from == 4
    shipped = resolve(CONFIGS / "cifar10", "mean", [])
    assert [e for e in range(500) if gaussians_move(shipped, e)] == [0]


def test_multirun_makes_a_folder_a_job():
    lambdas = [
        "val.gmm.fpi_info.lambda_fpi_mu=100,1000",
        "val.gmm.fpi_info.lambda_fpi_sigma=${val.gmm.fpi_info.lambda_fpi_mu}",
    ]
    main.main([*DIGITS, *TINY, *FLOW_ONLY, "train.epochs=1", "--multirun", *lambdas])
    files = [
        Path(f"outputs/sweep/digits/smoke/{s}_{s}/_/{i}/version_0/results.json") for i, s in enumerate((100, 1000))
    ]
    assert [json.loads(f.read_text())["config"]["val"]["gmm"]["fpi_info"]["lambda_fpi_sigma"] for f in files] == [
        100,
        1000,
    ]


def test_hydra_shows_the_configuration(capsys):
    main.main([*DIGITS, "--cfg", "job", "bits=5"])
    shown = OmegaConf.create(capsys.readouterr().out)
    assert shown.bits == 5 and shown.num_levels == 2 and not Path("outputs").exists()


def test_both_spellings_of_the_flags():
    assert plain_argv(["--config_path=a", "--config_name", "b"]) == ["--config-path=a", "--config-name", "b"]


def test_own_configuration_file_in_any_folder():
    Path("mine").mkdir()
    OmegaConf.save({"defaults": ["base", "_self_"], "dataset_name": "digits", "bits": 5}, "mine/own.yaml")
    text = Path("mine/own.yaml").read_text()
    assert "base" in text
    assert resolve(Path("mine").resolve(), "own", ["level_method=spcb"]).bits == 5
    OmegaConf.save({"defaults": ["base", "_self_"], "dataset_name": "digits", "bit": 5}, "mine/own.yaml")
    with pytest.raises(UserError, match="did you mean 'bits'"):
        resolve(Path("mine").resolve(), "own", [])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train.epoch=3"], "did you mean 'train.epochs'"),
        (["++train.epoch=3"], "did you mean 'train.epochs'"),
        (["lambda_fpi_mu=3"], "val.gmm.fpi_info.lambda_fpi_mu"),
        (["val.gmm.fpi_info.lambda_fpi_mu=3"], "must be equal"),
        (["conv_type=cayley"], "conv_type=cayley"),
        (["level_method=all"], "level_method"),
        (["dataset_name=cifar11"], "cifar10"),
        (["num_levels=4"], "num_flows"),
        (["train.epochs=0"], "train.epochs"),
        (["train.epochs=[1"], "train.epochs"),
        (["train.epochs"], "key=value"),
        (["nf_load_path=x"], "nf_ckpt_path"),
        (["train_nf=0"], "nf_load_path"),
        (["train_nf=0", "nf_load_path=none.safetensors"], "none.safetensors"),
        (["nf_ckpt_path=none.pt"], "none.pt"),
        (["dataset_nf=nowhere"], "nowhere"),
        (["val.gmm.gaussian_method_name=one"], "train_classifier=0"),
        (["device=tpu"], "device"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, named, capfd):
    assert run_command(lambda: main.main([*DIGITS, *TINY, *arguments])) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("error: ")]) == 1
    assert named in error[-1] and "Traceback" not in " ".join(error)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--config-path=___configs/cifar"], "cifar10"),
        (["--config-path=___configs/cifar10", "--config-name=men"], "'mean'"),
        (["--config-path=___configs/cifar10", "--config-name=mean_reload"], "needs nf_load_path=FILE"),
        (["--config-path=___configs/cifar10", "--config-name=imagenet_mean"], "needs nf_weights_load_path=FILE"),
    ],
)
def test_wrong_configuration_names_are_refused(flags, named, capfd):
    assert run_command(lambda: main.main(flags)) == 2
    assert named in capfd.readouterr().err


def test_diverged_training_exits_with_3():
    assert run_command(lambda: main.main([*DIGITS, *TINY, *FLOW_ONLY, "train.lr=1e12", "train.warmup_steps=0"])) == 3


def test_two_processes_equal_one():
    """Two gloo processes: the same initial statistics, losses and Gaussians as a single process."""
    options = [*DIGITS, *TINY, *FLOW_ONLY, "trainer_precision=64", "train.epochs=2", "train.batch_size=50"]
    main.main([*options, "extra=single"])
    children.train_together("nfpi", [*options, "extra=double"], Path.cwd())
    one, two = (load_weights(folder(e) / "checkpoints/flow.safetensors")[0] for e in ("single", "double"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-8, atol=1e-8)
    assert [r["step"] for r in metrics(folder("single"))] == [r["step"] for r in metrics(folder("double"))]
