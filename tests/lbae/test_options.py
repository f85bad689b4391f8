"""Every option of every LBAE script judged before any work, the published values, and messages whose remedies exist."""

import ast
import json
import re
from pathlib import Path

import pytest
from option_table import judged, option_names, run_inside

from common.options import all_names
from lbae import attributes, benchmark, celeba, cifar10, download, eval, fid, mnist, protocol, release
from lbae.options import Params, as_declared, experiment_name

FOLDER = Path(mnist.__file__).resolve().parent
SHARED = {
    "img_crop_size": 0, "vae_model": "ConvResBlock32", "width": 64, "zround": -1, "train_images": 0, "test_images": 0,
    "keep_last_models": 10, "seed": 12345, "amp": False, "interpolate_steps": 10, "int_endpoints": True,
    "int_source": "train", "split": "margin", "set_attr": -1, "attr_threshold": 0.12, "attr_mode": "conditional",
    "latents": "last", "zclamp": 1.0, "zclamp_min": -1.0, "img_format": "png", "stretch": False, "workers": 0,
    "hold": True, "deterministic": False, "print_every_batch": 100, "tensorboard": True, "wandb": "", "device": "auto",
    "cuda_device": -1, "data_root": "", "tf32": False, "batch_size": 512, "labels": "",
    "held_out_seed": 0, "cuda_graph": False,
}  # fmt: skip
COLUMNS = ("dataset", "img_size", "channels", "zsize", "vae", "dec_in_channels", "binary_reco_loss", "kl_weight", "lr",
           "l2", "batch_size_test", "epochs_max", "gen_imgs", "sample_method", "exp_suffix", "parallel")  # fmt: skip
PUBLISHED = {
    "mnist_bae": ("mnist", 32, 1, 200, False, 1, True, 0, 1e-4, 0, 1024, 5000, 10000, "cov", "m169", False),
    "mnist_vae": ("mnist", 32, 1, 20, True, 1, True, 10, 1e-4, 1e-4, 512, 1000, 512, "random", "m64", False),
    "cifar10_bae": ("cifar10", 32, 3, 600, False, 0, False, 0, 1e-3, 0, 1024, 3000, 5000, "cov", "m171-3", False),
    "cifar10_vae": ("cifar10", 32, 3, 128, True, 0, False, 128, 1e-3, 0, 1024, 3900, 5000, "random", "m173", False),
    "celeba_bae": ("celeba", 64, 3, 1500, False, 0, False, 0, 1e-3, 0, 1024, 3900, 5000, "cov", "m170-3", True),
    "celeba_vae": ("celeba", 64, 3, 64, True, 0, False, 64, 1e-3, 0, 1024, 3900, 5000, "random", "m173", True),
}
CALL = {"eval", "gen", "eval_train", "l", "reload", "resume", "overwrite", "exp", "dry_run", "cfg"}


@pytest.mark.parametrize("cfg", PUBLISHED)
def test_resolved_values_are_the_published_ones(cfg):
    script = {"mnist": mnist, "cifar10": cifar10, "celeba": celeba}[cfg.split("_")[0]]
    done = run_inside(script.main, [f"cfg={cfg}", "dry_run"])
    assert done.code == 0, done.err
    values = json.loads(done.out)
    assert {key: values[key] for key in values if key not in CALL} == SHARED | dict(
        zip(COLUMNS, PUBLISHED[cfg], strict=True)
    )
    assert Path(values["exp"]).name == experiment_name(Params.build({**values, "exp": ""}))


def tokens(script, *before: str):
    """A script of `KEY=VALUE` words: (main, words before, options, how one is written)."""
    return script.main, [*before, "dry_run"], Params, "{}={}"


FLAGS = "--{}={}"
TWO = [str(FOLDER), str(FOLDER)]
SCRIPTS = {
    "mnist": tokens(mnist),
    "mnist gen": tokens(mnist, "eval", "gen"),
    "celeba int": tokens(celeba, "cfg=celeba_bae", "sample_method=int", "set_attr=3"),
    "cifar10 vae": tokens(cifar10, "cfg=cifar10_vae"),
    "eval": (eval.main, ["s=a", "t=b", "dry_run"], eval.Scores, "{}={}"),
    "eval.sh": (protocol.main, ["dry_run"], protocol.Protocol, "{}={}"),
    "fid": (fid.main, [*TWO, "--dry_run"], fid.FidOptions, FLAGS),
    "benchmark": (benchmark.main, ["--dry_run"], benchmark.Config, FLAGS),
    "download": (
        download.main,
        [str(FOLDER / "model_weights_urls.txt"), "--dry_run"],
        download.DownloadOptions,
        FLAGS,
    ),
}
PARAMETERS = [(script, name) for script, (_, _, model, _) in SCRIPTS.items() for name in option_names(model)]


@pytest.mark.parametrize(("script", "name"), PARAMETERS)
def test_a_wrong_value_is_one_line(script, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, before, model, spelling = SCRIPTS[script]
    if name == "dry_run":
        before = [word for word in before if "dry" not in word] + [spelling.format("dry_run", "1")]
        spelling = FLAGS.replace("{}={}", "dry_run=1") if spelling == FLAGS else "dry_run=1"
    assert list(judged(main, before, lambda value: [spelling.format(name, value)])) == []
    assert list(tmp_path.iterdir()) == []
    kinds = str(model.model_fields[name].annotation)
    if ("int" in kinds or "float" in kinds) and "str" not in kinds and name != "dry_run":
        for value in ("fast", "nan", ""):
            assert run_inside(main, [*before, spelling.format(name, value)]).code == 2, value


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (mnist, ["eval", "gen", "sample_method=cov", "set_attr=2"], "goes with sample_method=int"),
        (mnist, ["eval", "gen", "eval_train"], "two commands"),
        (mnist, ["zclamp=-0.5", "zclamp_min=0.5"], "zclamp_min=0.5 exceeds zclamp=-0.5"),
        (mnist, ["device=cuda:77"], "device=cuda:77"),
        (mnist, ["cfg=mnist_vae", "eval", "gen", "sample_method=int", "exp=."], "needs bits"),
        (protocol, ["lr=1"], "lr is no option of eval.sh"),
        (protocol, ["methods=cov,inte"], "methods=cov,inte: expected names of cov"),
        (protocol, ["feet=lenet"], "did you mean 'feat'"),
        (release, ["pack", "a"], "expected `pack EXPERIMENT FILE`"),
    ],
)
def test_options_that_contradict_each_other(script, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_inside(script.main, words)
    assert done.code == 2
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (["gen_imgs=3", "split=mean"], "gen_imgs, split"),
        (["kl_weight=2"], "kl_weight"),
        (["cfg=mnist_vae", "zround=1"], "zround"),
        (["eval", "gen", "exp=.", "lr=1", "zclamp=0.5", "int_endpoints=0"], "int_endpoints, lr, zclamp"),
        (["eval", "gen", "exp=.", "sample_method=random", "latents=best"], "latents"),
        (["eval", "gen", "exp=.", "sample_method=int", "attr_mode=contrast"], "attr_mode"),
    ],
)
def test_options_without_effect_are_named(words, idle):
    done = run_inside(mnist.main, [*words, "dry_run"])
    assert done.code == 0
    assert f"without effect in this command: {idle}\n" in done.err


@pytest.mark.parametrize(("word", "value"), [("off", False), ("bf16", True), ("1", True), ("false", False)])
def test_older_words_for_amp_are_taken(word, value):
    assert json.loads(run_inside(mnist.main, [f"amp={word}", "dry_run"]).out)["amp"] is value
    assert as_declared({"amp": word}) == {"amp": value if word in ("off", "bf16") else word}


@pytest.mark.parametrize("word", ["help", "-h", "--help"])
def test_help_prints_the_defaults_of_the_script_and_its_configuration(word):
    text = run_inside(celeba.main, [word]).out
    assert all(
        f"\n  {line} " in text for line in ("dataset=celeba", "img_size=64", "channels=3", "zsize=1500", "lr=0.001")
    )
    text = run_inside(mnist.main, ["cfg=mnist_vae", word]).out
    assert all(f"\n  {line} " in text for line in ("zsize=20", "sample_method=random", "vae=true", "l2=0.0001"))
    for main in (eval.main, protocol.main, fid.main, benchmark.main, download.main, release.main):
        words = [word] if main in (eval.main, protocol.main, release.main) else ["--help"]
        done = run_inside(main, words)
        assert (done.code, done.err) == (0, "")
        assert len(done.out) > 300


def messages() -> list[tuple[str, str]]:
    """The text of every error that the scripts raise."""
    found = []
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                parts = [part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant)]
                found.append((path.name, "".join(part for part in parts if isinstance(part, str))))
    return found


def test_every_remedy_that_a_message_names_exists():
    known = set(all_names(protocol.Protocol)) | set(all_names(eval.Scores))
    commands = (download.DownloadOptions, fid.FidOptions, attributes.Config)
    flags = {"help", "from", *(name for command in commands for name in all_names(command))}
    texts = messages()
    named = [(file, word) for file, text in texts for word in re.findall(r"(?<![\w.>])([a-z_]+)=", text)]
    assert len(named) > 8
    assert [one for one in named if one[1] not in known] == []
    dashed = [(file, word) for file, text in texts for word in re.findall(r"--([a-z_]+)", text)]
    assert dashed
    assert [one for one in dashed if one[1] not in flags] == []
