"""Extractors, resizing, image inputs, weights files and the feature cache."""

import hashlib
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import types
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from common.checkpoint import load_weights
from common.errors import UserError
from common.metrics import features as module
from common.metrics import inputs
from common.metrics.features import FeatureCache, file_sha256, find_weights, make_extractor, read_weights
from common.metrics.inception import FidInception, fid_inception
from common.metrics.inputs import load_images, open_images
from common.metrics.resize import resize


def _uint8(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def _tensorflow():
    """The reference of the paper's resize and the home of the frozen graph; an optional part."""
    try:
        return module.import_tensorflow()
    except UserError:
        pytest.skip("TensorFlow is not installed")


# ---- resizing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (178, 218), (400, 310)])
def test_paper_resize_is_tensorflow_1(height, width):
    tf = _tensorflow()
    images = _uint8((2, 3, height, width)).float()
    theirs = tf.compat.v1.image.resize_bilinear(images.permute(0, 2, 3, 1).numpy(), (299, 299)).numpy()
    np.testing.assert_array_equal(resize(images, 299).permute(0, 2, 3, 1).numpy(), theirs)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (400, 310)])
def test_clean_resize_is_pillow_bicubic(height, width):
    images = _uint8((1, 3, height, width)).float()
    theirs = [np.asarray(Image.fromarray(c.numpy(), "F").resize((299, 299), Image.BICUBIC)) for c in images[0]]
    np.testing.assert_allclose(resize(images, 299, "clean")[0].numpy(), np.clip(theirs, 0, 255), atol=1e-3)


def test_resize_refuses_unknown_modes_and_keeps_the_right_size():
    images = _uint8((1, 1, 8, 8)).float()
    assert resize(images, 8, "clean") is images
    with pytest.raises(UserError, match="did you mean 'clean'"):
        resize(images, 4, "claen")


# ---- Inception -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights in the published layout, scaled so that activations neither die nor explode."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in FidInception().state_dict().items():
        if name.endswith("conv.weight"):
            fan_in = value[0].numel()
            value = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif name.endswith(("bn.bias", "running_mean")):
            value = 0.1 * torch.randn(value.shape, generator=generator)
        elif name.endswith("running_var"):
            value = 0.5 + torch.rand(value.shape, generator=generator)
        if not name.endswith("num_batches_tracked"):
            state[name] = value
    folder = tmp_path_factory.mktemp("weights")
    path = folder / "pt_inception.pth"
    torch.save(state, path)
    yield path
    shutil.rmtree(folder)


def test_the_network_is_torchvisions_with_the_four_differences(weights, monkeypatch):
    """The reference: torchvision's Inception-v3 with 1008 outputs, average pools without the padding, the last one a
    maximum."""
    from torchvision.models import inception

    state = torch.load(weights, weights_only=True)
    reference = inception.Inception3(
        num_classes=1008, aux_logits=False, transform_input=False, init_weights=False
    ).eval()
    tracked = {key: value for key, value in reference.state_dict().items() if key.endswith("num_batches_tracked")}
    reference.load_state_dict({**state, **tracked})
    reference.fc = torch.nn.Identity()
    pools = []

    def pool(x, kernel_size, stride, padding):
        pools.append(x.shape)
        if len(pools) == 9:  # Mixed_7c
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)

    shim = types.SimpleNamespace(**{name: getattr(F, name) for name in ("relu", "max_pool2d")}, avg_pool2d=pool)
    monkeypatch.setattr(inception, "F", shim)
    images = (resize(_uint8((1, 3, 32, 32)).float(), 299) - 128) / 128
    with torch.no_grad():
        expected = reference(images)
        ours = fid_inception(state, "weights")(images)
    assert len(pools) == 9 and expected.std() > 1e-2
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_inception_from_a_file(weights, tmp_path):
    with pytest.warns(UserWarning, match="is not that of the FID network"):
        extractor = make_extractor("inception", "cpu", weights=weights, batch_size=1)
    images = _uint8((2, 1, 20, 24))
    features = extractor.features(images)
    assert (features.dtype, features.shape, extractor.dim) == (np.float64, (2, 2048), 2048)
    assert np.abs(features[0] - features[1]).max() > 1e-2
    # the graph scales as (x - 128) / 128; x / 127.5 - 1, as other networks do, is near, and another feature
    enlarged = resize(images.expand(-1, 3, -1, -1).float(), 299)
    with torch.no_grad():
        scaled, other = (extractor.model(x[:1]).numpy() for x in ((enlarged - 128) / 128, enlarged / 127.5 - 1))
    np.testing.assert_allclose(features[:1], scaled, rtol=1e-5, atol=1e-6)
    assert np.abs(other - scaled).max() > 1e-3
    # grey images are their own three channels, batches do not matter, nor does the layout
    extractor.batch_size = 2
    again = extractor.features(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1))
    np.testing.assert_allclose(again, features, rtol=1e-4, atol=1e-5)

    digest = file_sha256(weights)
    assert digest == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert extractor.fingerprint == f"inception weights:{digest[:16]} resize:paper size:299"
    assert not extractor.comparable and "not comparable to published FID" in extractor.note


def test_the_published_digest_makes_it_comparable(weights, monkeypatch):
    monkeypatch.setattr(module, "INCEPTION_SHA256", file_sha256(weights))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor = make_extractor("inception", "cpu", weights=weights, mode="clean")
    assert extractor.comparable and extractor.note == "" and "resize:clean" in extractor.fingerprint


def test_safetensors_hold_the_same_weights(weights, tmp_path):
    from safetensors.torch import save_file

    state = read_weights(weights)
    save_file(state, tmp_path / "w.safetensors")
    again = read_weights(tmp_path / "w.safetensors")
    assert state.keys() == again.keys() and all(torch.equal(state[key], again[key]) for key in state)


def test_weights_that_are_refused(weights, tmp_path):
    class Harmful:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "executed",)

    (tmp_path / "code.pth").write_bytes(pickle.dumps(Harmful()))
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:100_000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in {
        "code.pth": "code.pth",
        "cut.pth": "cut.pth",
        "cut.safetensors": "safetensors",
        "other.pth": "does not fit",
        "list.pth": "not a state dict",
        "absent.pth": "no such file",
    }.items():
        with warnings.catch_warnings(), pytest.raises(UserError, match=message):
            warnings.simplefilter("ignore", UserWarning)  # of the unknown digest, which comes first
            make_extractor("inception", "cpu", weights=tmp_path / name)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(UserError, match=r"sha256 is .*expected abcd"):
        make_extractor("inception", "cpu", weights=weights, sha256="abcd")


def test_torchvision_inception(tmp_path):
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(weights=None, init_weights=False).eval()
    torch.save(network.state_dict(), tmp_path / "tv.pth")
    extractor = make_extractor("inception-tv", "cpu", weights=tmp_path / "tv.pth")
    images = _uint8((1, 3, 32, 32))
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = network(resize(images.float(), 299) / 127.5 - 1)
    np.testing.assert_allclose(extractor.features(images), expected, rtol=1e-5, atol=1e-6)
    assert not extractor.comparable
    (tmp_path / "tv.pth").unlink()


def test_frozen_graph(tmp_path):
    """A small graph with the node names of the FID graph, frozen for a single image as that one is."""
    tf = _tensorflow()
    kernel = np.random.default_rng(0).standard_normal((3, 3, 3, 5)).astype(np.float32)
    with tf.Graph().as_default() as graph:
        decoded = tf.compat.v1.placeholder(tf.float32, (None, None, 3), name="Cast")
        one = tf.expand_dims(decoded, 0, name="ExpandDims")
        small = tf.compat.v1.image.resize_bilinear(one, (12, 12), name="ResizeBilinear")
        scaled = (small - 128.0) * 0.0078125
        hidden = tf.nn.relu(tf.nn.conv2d(scaled, tf.constant(kernel), 1, "VALID"))
        tf.nn.avg_pool2d(hidden, 10, 1, "VALID", name="pool_3")
    path = tmp_path / "classify_image_graph_def.pb"
    path.write_bytes(graph.as_graph_def().SerializeToString())

    extractor = make_extractor("inception-tf", "cpu", weights=path, batch_size=3)
    images = _uint8((5, 3, 20, 16))
    ours = extractor.features(images)
    x = (resize(images.float(), 12) - 128) / 128
    expected = F.relu(F.conv2d(x, torch.from_numpy(kernel).permute(3, 2, 0, 1))).mean((2, 3))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    assert file_sha256(path)[:16] in extractor.fingerprint

    clean = make_extractor("inception-tf", "cpu", weights=path, mode="clean").features(images)
    assert np.abs(clean - ours).max() > 1e-3

    path.write_bytes(b"no graph")
    with pytest.raises(UserError, match="not a TensorFlow graph"):
        make_extractor("inception-tf", "cpu", weights=path)
    with tf.Graph().as_default() as graph:
        tf.constant(1.0, name="pool_3")
    path.write_bytes(graph.as_graph_def().SerializeToString())
    with pytest.raises(UserError, match="not the Inception graph"):
        make_extractor("inception-tf", "cpu", weights=path)
    with pytest.raises(UserError, match="needs the graph"):
        make_extractor("inception-tf", "cpu")


# ---- downloads -----------------------------------------------------------------------------------------------------


def test_a_download_appears_only_with_the_right_digest(tmp_path):
    source, cache = tmp_path / "source.pth", tmp_path / "cache"
    source.write_bytes(b"weights" * 1000)
    digest = file_sha256(source)
    with pytest.raises(UserError, match=r"the download failed .*the file is not the published one.*inception weights"):
        find_weights("inception", None, (source.as_uri(),), "0" * 64, download=True, cache=cache)
    assert not any(cache.iterdir())
    for known in (digest, digest[:8]):
        target = find_weights("inception", None, (source.as_uri(),), known, download=True, cache=cache)
        assert target.read_bytes() == source.read_bytes() and list(cache.iterdir()) == [target]
        target.unlink()


def test_weights_come_from_the_cache_then_the_network(tmp_path):
    source = tmp_path / "w.pth"
    source.write_bytes(b"weights")
    digest, cache = file_sha256(source), tmp_path / "cache"
    missing = (tmp_path / "nowhere.pth").as_uri()
    with pytest.raises(UserError, match="features raw"):
        find_weights("inception", None, (source.as_uri(),), digest, download=False, cache=cache)
    with pytest.raises(UserError, match="download failed"):
        find_weights("inception", None, (missing,), digest, download=True, cache=cache)
    found = find_weights("inception", None, (missing, source.as_uri()), digest, download=True, cache=cache)
    assert found == cache / "nowhere.pth" and found.read_bytes() == b"weights"
    assert find_weights("inception", None, (missing,), digest, download=False, cache=cache) == found
    found.write_bytes(b"tampered")
    with pytest.raises(UserError, match="damaged"):
        find_weights("inception", None, (missing,), digest, download=False, cache=cache)


# ---- offline extractors --------------------------------------------------------------------------------------------


def test_raw_pixels():
    images = _uint8((5, 3, 4, 4))
    extractor = make_extractor("raw", "cpu", batch_size=2)
    np.testing.assert_array_equal(extractor.features(images), images.reshape(5, -1).double().numpy() / 255)
    assert extractor.dim == 48
    with pytest.raises(UserError, match="another size"):
        extractor.features(_uint8((2, 3, 5, 5)))
    assert make_extractor("raw", "cpu", size=2).features(_uint8((2, 3, 5, 5))).shape == (2, 12)


def test_pixel_pca_is_the_singular_value_decomposition():
    reference, images = _uint8((60, 1, 5, 5)), _uint8((7, 1, 5, 5), 1)
    extractor = make_extractor("pixel-pca4", "cpu")
    with pytest.raises(UserError, match="fit"):
        extractor.features(images)
    codes = extractor.fit(reference).features(images)
    pixels = reference.reshape(60, -1).double().numpy() / 255
    axes = np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)[2][:4]
    expected = (images.reshape(7, -1).double().numpy() / 255 - pixels.mean(0)) @ axes.T
    np.testing.assert_allclose(np.abs(codes), np.abs(expected), atol=1e-10)
    assert extractor.fingerprint != make_extractor("pixel-pca4", "cpu").fit(images).fingerprint
    with pytest.raises(UserError, match="fewer components"):
        make_extractor("pixel-pca30", "cpu").fit(reference)


def test_lenet_is_trained_once_and_tells_classes_apart(tmp_path):
    from common.datasets import load as load_set

    def options(**more):
        return {"dataset": "digits", "epochs": 8, "cache": tmp_path, **more}

    extractor = make_extractor("lenet", "cpu", **options())
    config = load_weights(tmp_path / "lenet-digits-paper-e8.safetensors")[1]
    assert config["training_accuracy"] > 0.8 and config["classes"] == 10 and config["channels"] == 1
    images, targets = load_set("digits", split="test").arrays()
    codes = extractor.features(images)
    assert codes.shape == (len(images), extractor.dim) and codes.min() == 0
    # held-out images of one digit lie together: the nearest other image is of the same digit
    distance = ((codes[:, None] - codes[None]) ** 2).sum(2) + np.diag(np.full(len(codes), np.inf))
    assert (targets[distance.argmin(1)] == targets).double().mean() > 0.85

    written = (tmp_path / "lenet-digits-paper-e8.safetensors").stat().st_mtime_ns
    again = make_extractor("lenet", "cpu", **options())
    np.testing.assert_array_equal(again.features(images), codes)
    assert again.fingerprint == extractor.fingerprint and not again.comparable
    kept = tmp_path / "lenet-digits-paper-e8.safetensors"
    assert kept.stat().st_mtime_ns == written
    kept.write_bytes(kept.read_bytes()[:1000])  # a damaged file of the cache is made again
    with pytest.warns(UserWarning, match="trained again"):
        assert make_extractor("lenet", "cpu", **options()).fingerprint == extractor.fingerprint
    fresh = make_extractor("lenet", "cpu", **options(cache=tmp_path / "other"))
    assert fresh.fingerprint == extractor.fingerprint  # one seed, one result
    # colour images are converted, so a grey picture stored in colour has the same features
    np.testing.assert_allclose(again.features(images.expand(-1, 3, -1, -1)), codes, atol=1e-5)
    with pytest.raises(UserError, match="no single class"):
        make_extractor("lenet", "cpu", **options(dataset="sprites"))


def test_unknown_names_and_options():
    for name, message in {
        "inceptoin": "did you mean 'inception'",
        "pixel-pca": "pixel-pca<k>",
        "pixel-pca0": "component",
    }.items():
        with pytest.raises(UserError, match=message):
            make_extractor(name, "cpu")
    with pytest.raises(UserError, match="no option 'weights'"):
        make_extractor("raw", "cpu", weights="x")
    with pytest.raises(UserError, match="size of their own"):
        make_extractor("lenet", "cpu", size=64)
    with pytest.raises(UserError, match="batch_size"):
        make_extractor("raw", "cpu", batch_size=0)
    with pytest.raises(UserError, match="resize mode"):
        make_extractor("raw", "cpu", mode="cleen")


# ---- cache ---------------------------------------------------------------------------------------------------------


def test_features_are_computed_once(tmp_path):
    class Counting(module.Raw):
        calls = 0

        def features(self, images):
            self.calls += 1
            return super().features(images)

    cache, extractor = FeatureCache(tmp_path), Counting(device="cpu")
    images = _uint8((6, 1, 4, 4))
    first = cache.features(images, extractor)
    np.testing.assert_array_equal(cache.features(images, extractor), first)
    assert extractor.calls == 1

    changed = images.clone()
    changed[3, 0, 1, 1] ^= 1  # a single grey level
    assert not np.array_equal(cache.features(changed, extractor), first)
    cache.features(images[:5], extractor)
    assert extractor.calls == 3
    for options in ({"mode": "clean", "size": 2}, {"size": 2}):
        other = Counting(device="cpu", **options)
        cache.features(images, other)
        assert other.calls == 1

    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match="computed again"):
        np.testing.assert_array_equal(cache.features(images, extractor), first)
    assert extractor.calls == 4
    path = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    with np.load(path) as stored:
        key = stored["key"]
    for wrong in (np.full((6, 16), np.nan), np.zeros((5, 16)), np.zeros(6), np.array(["x"] * 6), None):
        np.savez(path, key=key, **({} if wrong is None else {"features": wrong}))
        with pytest.warns(UserWarning, match="computed again"):
            np.testing.assert_array_equal(cache.features(images, extractor), first)


def test_features_of_a_folder_follow_its_files(tmp_path):
    """The key is of the files' bytes: no picture is decoded when nothing changed, and all are when one did."""
    folder, cache, extractor = _write(tmp_path / "g", _uint8((6, 1, 4, 4))), FeatureCache(tmp_path / "c"), None
    extractor = make_extractor("raw", "cpu")
    first = cache.features(folder, extractor)
    changed = _uint8((1, 1, 4, 4), 5)[0, 0].numpy()
    Image.fromarray(changed).save(folder / "3.png")
    again = cache.features(folder, extractor)
    np.testing.assert_array_equal(again[3], changed.ravel() / 255)
    np.testing.assert_array_equal(np.delete(again, 3, 0), np.delete(first, 3, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "read_picture", lambda path: pytest.fail("decoded again"))
        np.testing.assert_array_equal(cache.features(folder, extractor), again)


def test_two_processes_fill_one_cache(tmp_path):
    """Both get their numbers, and what they leave is whole."""
    np.save(tmp_path / "a.npy", _uint8((200, 1, 8, 8)).numpy())
    code = (
        "import sys; from common.metrics import FeatureCache, make_extractor; from common.metrics.inputs import *;"
        "x = make_extractor('raw', 'cpu', progress=False); c = FeatureCache(sys.argv[2]);"
        "print(sum(float(c.features(load_images(sys.argv[1], n), x).sum()) for n in range(90, 110)))"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "a.npy"), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running) and found[0] == found[1]
    cache, extractor = FeatureCache(tmp_path / "cache"), make_extractor("raw", "cpu")
    assert len(list(cache.folder.iterdir())) == 20
    extractor._embed = lambda x: pytest.fail("computed again")
    found_again = [float(cache.features(load_images(tmp_path / "a.npy", n), extractor).sum()) for n in range(90, 110)]
    assert float(found[0]) == pytest.approx(sum(found_again))


# ---- inputs --------------------------------------------------------------------------------------------------------


def _write(folder, images, suffix="png"):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images.permute(0, 2, 3, 1).squeeze(3).numpy()):
        Image.fromarray(image).save(folder / f"{i}.{suffix}")
    return folder


def test_every_kind_of_source_gives_the_same_images(tmp_path):
    images = _uint8((12, 3, 6, 5))
    floats = images.double() / 255
    np.savez(tmp_path / "a.npz", images=images.numpy(), labels=np.arange(12))
    np.savez(tmp_path / "b.npz", anything=floats.permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / "c.npy", images.numpy().astype(np.int64))
    data_set = types.SimpleNamespace(arrays=lambda: (images, None))
    sources = [
        _write(tmp_path / "folder", images),  # 10.png comes after 9.png
        *(tmp_path / name for name in ("a.npz", "b.npz", "c.npy")),
        str(tmp_path / "a.npz"),
        images,
        floats.float(),
        images.numpy(),
        data_set,
        (part for part in floats.split(5)),
        ((part, None) for part in images.split(5)),
    ]
    for source in sources:
        assert torch.equal(load_images(source), images), source
    assert torch.equal(load_images((part for part in images.split(5)), limit=7), images[:7])
    assert torch.equal(load_images(tmp_path / "folder", limit=3), images[:3])


def test_grey_folders_stay_grey_and_mixed_ones_become_colour(tmp_path):
    grey = _uint8((3, 1, 6, 6))
    folder = _write(tmp_path / "g", grey)
    assert torch.equal(load_images(folder), grey)
    assert torch.equal(load_images(grey[:, 0].numpy()), grey)
    Image.fromarray(np.zeros((6, 6, 3), np.uint8)).save(folder / "9.png")
    assert load_images(folder).shape == (4, 3, 6, 6)


def test_folders_of_mixed_sizes_need_a_size_unless_the_features_resize(tmp_path):
    folder = _write(tmp_path / "g", _uint8((3, 1, 6, 6)))
    Image.fromarray(np.full((8, 4), 7, np.uint8)).save(folder / "z.png")
    Image.fromarray(np.full((6, 6), 9, np.uint8)).save(folder / "zz.png")
    for use in (load_images, make_extractor("raw", "cpu").features, make_extractor("pixel-pca1", "cpu").fit):
        with pytest.raises(UserError, match=r"z\.png: 4x8 pixels, the first image has 6x6"):
            use(folder)
    assert load_images(folder, size=5, mode="clean")[3].unique().tolist() == [7]
    features = make_extractor("raw", "cpu", size=5, batch_size=2).features(folder)
    assert features.shape == (5, 25) and features[3:, 0] * 255 == pytest.approx([7, 9])


def test_a_folder_is_read_batch_by_batch(tmp_path, monkeypatch):
    """At most two batches are decoded and not yet used, whatever the folder; the features are those of the array."""
    images = _uint8((50, 1, 6, 6))
    folder = open_images(_write(tmp_path / "g", images))
    read, alive, most = inputs.read_picture, set(), []

    def counted(path):
        picture = read(path)
        alive.add(id(picture))
        most.append(len(alive))
        return picture

    monkeypatch.setattr(inputs, "read_picture", counted)

    class Embedding(module.Raw):
        def _embed(self, x):
            assert len(alive) <= 8
            alive.clear()
            return super()._embed(x)

    features = Embedding(device="cpu", batch_size=4).features(folder)
    np.testing.assert_array_equal(features, images.reshape(50, -1).double().numpy() / 255)
    assert len(most) == 50 and max(most) <= 8
    assert [len(batch) for batch in folder.batches(20)] == [20, 20, 10]


def test_the_names_of_real_life(tmp_path):
    """A superscript digit is no number to int(); orientation and transparency are as a viewer shows them."""
    folder = tmp_path / "g"
    folder.mkdir()
    stripe = np.zeros((4, 6), np.uint8)
    stripe[0] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # shown after a quarter turn clockwise
    for name in ("10.png", "\u00b23.png", "9.png"):
        Image.fromarray(stripe).save(folder / name)
    Image.fromarray(stripe).save(folder / "turned.png", exif=turned)
    images = open_images(folder)
    assert [path.name for path in images.files][-1] == "turned.png" and len(images) == 4
    assert images.sizes == [(4, 6), (6, 4)]
    last = list(images.batches(4))[-1][0, 0]
    assert last[:, -1].min() > 200 and last[:, 0].max() < 50  # the upper row is the right column now
    clear = np.zeros((4, 4, 4), np.uint8)  # black, and transparent: its colour must not show
    (tmp_path / "t").mkdir()
    Image.fromarray(clear, "RGBA").save(tmp_path / "t" / "0.png")
    assert load_images(tmp_path / "t").shape == (1, 3, 4, 4)
    assert int(load_images(tmp_path / "t").min()) == 255


def test_a_picture_that_claims_to_be_huge_is_refused(tmp_path):
    """Twenty kilobytes that would decode to gigabytes."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(40_001))), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(UserError, match=r"0\.png"):
        load_images(tmp_path)


def test_what_would_not_fit_into_memory_is_refused(monkeypatch):
    images = _uint8((30, 1, 8, 8))
    monkeypatch.setattr(module, "MOST_BYTES", 8 * 64 * 29)
    monkeypatch.setattr(module, "MOST_BATCH_BYTES", 8 * 64 * 29)
    with pytest.raises(UserError, match="30 images of 64 values"):
        make_extractor("raw", "cpu", batch_size=10).features(images)
    with pytest.raises(UserError, match=r"10 images of 400 values.*smaller batch size"):
        make_extractor("raw", "cpu", batch_size=10, size=20).features(images)


def test_features_that_are_not_finite_are_refused():
    class Broken(module.Raw):
        def _embed(self, x):
            return super()._embed(x) / 0

    with pytest.raises(UserError, match="NaN or infinite"):
        Broken(device="cpu").features(_uint8((3, 1, 2, 2)))


def test_sources_that_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    broken = _write(tmp_path / "broken", _uint8((2, 1, 6, 6)))
    (broken / "2.png").write_bytes((broken / "1.png").read_bytes()[:60])
    text = _write(tmp_path / "text", _uint8((2, 1, 6, 6)))
    (text / "2.jpg").write_text("not an image")
    deep = tmp_path / "deep"
    deep.mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep / "0.png")
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    np.savez(tmp_path / "two.npz", p=np.zeros((2, 4, 4)), q=np.zeros((2, 4, 4)))
    for source, message in (
        (empty, "no image in this folder"),
        (tmp_path, "sub-folders are not searched"),
        (broken, r"2\.png as an image"),
        (text, r"2\.jpg as an image"),
        (deep, "8 bits"),
        (tmp_path / "a.pdf", "neither a folder"),
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "bad.npy", "not a readable .npy"),
        (tmp_path / "two.npz", "which array"),
        (np.zeros((0, 1, 4, 4), np.uint8), "empty"),
        (np.zeros((3, 2, 4, 5), np.uint8), "channels"),
        (np.zeros(5, np.uint8), "is not one of"),
        (np.full((2, 1, 4, 4), -0.5), r"\(x \+ 1\) / 2"),
        (np.full((2, 1, 4, 4), 200.0), "divide by 255"),
        (np.full((2, 1, 4, 4), np.nan), "NaN"),
        (np.full((2, 1, 4, 4), 256), r"expected 0\.\.255"),
        (np.zeros((2, 1, 4, 4), bool), "bool"),
        (iter(()), "no image"),
        (iter([np.zeros((2, 1, 4, 4)), np.zeros((2, 1, 5, 5))]), "batch 1"),
        (7, "int"),
    ):
        with pytest.raises(UserError, match=message):
            load_images(source)
    with pytest.raises(UserError, match="limit"):
        load_images(np.zeros((2, 1, 4, 4)), limit=0)
