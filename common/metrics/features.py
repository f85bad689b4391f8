"""Feature extractors behind one interface, the files they need, and the cache of features on disk.

    extractor = make_extractor("inception", device="cuda", weights="pt_inception-2015-12-05-6726825d.pth")
    features = extractor.fit(reference).features(images)          # uint8 (N, C, H, W) -> float64 (N, extractor.dim)

Only `inception` (and `inception-tf`, the same network as a TensorFlow graph) gives numbers that may stand beside
published FIDs. The others work without any download and compare runs of one's own.
"""

import hashlib
import inspect
import json
import os
import re
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.checkpoint import atomic_write, load_into, load_tensors, load_weights, save_weights
from common.errors import UserError, suggest
from common.launch import pick_device
from common.metrics.frechet import read_npz
from common.metrics.inception import fid_inception
from common.metrics.inputs import as_images
from common.metrics.resize import MODES, resize

NAMES = ("inception", "inception-tf", "inception-tv", "raw", "pixel-pca<k>", "lenet")
NOT_COMPARABLE = "not comparable to published FID"

# One file under two names: the FID network converted from the TensorFlow graph of 2015-12-05.
INCEPTION_URLS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
TORCHVISION_URLS = ("https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth",)
TORCHVISION_SHA256 = "0cc3c7bd"  # torchvision publishes the first eight digits


def default_cache() -> Path:
    """Folder of downloaded weights, trained classifiers and features: METRICS_CACHE, or one in the user's cache."""
    named = os.environ.get("METRICS_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "structured-latents" / "metrics"


class Extractor:
    """Images to feature vectors.

    name, dim (None until known), mode (`paper` or `clean`, see `resize`), size (input side, None: as the images are).
    `comparable`: whether distances may stand beside published FIDs. `fingerprint`: everything that changes the
    features, in one line; features and statistics with different fingerprints never mix.
    """

    name = ""
    comparable = False
    channels: int | None = None  # 1: grey, 3: colour, None: as the images are
    dtype = torch.float32

    def __init__(
        self, device="auto", batch_size: int = 64, mode: str = "paper", size: int | None = None, progress=True
    ):
        if mode not in MODES:
            raise UserError(f"resize mode {mode}: expected paper or clean{suggest(mode, MODES)}")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: at least 1 is needed")
        self.device = pick_device(device) if isinstance(device, str) else torch.device(device)
        self.batch_size, self.mode, self.size, self.progress = batch_size, mode, size, progress
        self.dim: int | None = None

    @property
    def fingerprint(self) -> str:
        """`name weights:<digest> resize:<mode> size:<side>`."""
        return f"{self.name} weights:{self._weights_id()} resize:{self.mode} size:{self.size or 'as is'}"

    @property
    def note(self) -> str:
        """What a table has to say beside the numbers, or an empty string."""
        return "" if self.comparable else f"features '{self.name}': {NOT_COMPARABLE}"

    def fit(self, reference) -> "Extractor":
        """Adapt to the reference images, uint8 (N, C, H, W) or (N, H, W, C); most extractors have nothing to adapt."""
        return self

    @torch.inference_mode()
    def features(self, images) -> np.ndarray:
        """float64 features (N, dim) of uint8 images (N, C, H, W) or (N, H, W, C), batch by batch on the device."""
        images = as_images(images)
        parts = []
        batches = images.split(self.batch_size)
        for batch in tqdm(batches, desc=f"{self.name} features", disable=None if self.progress else True):
            embedded = self._embed(self._prepare(batch))
            parts.append(embedded.cpu().numpy().astype(np.float64))
        features = np.concatenate(parts)
        self._check_dim(features.shape[1])
        return features

    def _prepare(self, batch: Tensor) -> Tensor:
        """Levels 0..255 as floats on the device, with the extractor's channels and size."""
        dtype = torch.float32 if self.device.type == "mps" else self.dtype
        x = _with_channels(batch.to(self.device), self.channels).to(dtype)
        return x if self.size is None else resize(x, self.size, self.mode)

    def _embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) levels -> (B, dim)."""
        raise TypeError(f"{type(self).__name__} does not say how to embed images")

    def _check_dim(self, dim: int) -> None:
        if self.dim not in (None, dim):
            raise UserError(
                f"images of another size or colour: {dim} features, before {self.dim}; give one size, one colour"
            )
        self.dim = dim

    def _weights_id(self) -> str:
        return "none"


def _with_channels(x: Tensor, channels: int | None) -> Tensor:
    """Grey to colour by repetition, colour to grey by ITU-R 601 luma (as Pillow converts), else unchanged."""
    if channels is None or x.shape[1] == channels:
        return x
    if channels == 3:
        return x.expand(-1, 3, -1, -1)
    return (
        (x.float() * torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True).round()
    )


class Raw(Extractor):
    """The pixels themselves, divided by 255."""

    name = "raw"
    dtype = torch.float64

    def _embed(self, x: Tensor) -> Tensor:
        return x.flatten(1) / 255


class PixelPca(Extractor):
    """Projection of the pixels on the first k principal components of the reference images."""

    dtype = torch.float64
    most_images = 10_000

    def __init__(self, k: int, **options):
        super().__init__(**options)
        if k < 1:
            raise UserError(f"pixel-pca{k}: at least one component is needed")
        self.name, self.k, self._mean, self._axes, self._reference = f"pixel-pca{k}", k, None, None, ""

    @torch.inference_mode()
    def fit(self, reference) -> "PixelPca":
        """Find the components of (at most 10 000, evenly spaced) reference images. Raises UserError for too few."""
        from sklearn.decomposition import PCA

        images = as_images(reference)
        rows = np.unique(np.linspace(0, len(images) - 1, min(len(images), self.most_images)).round().astype(int))
        pixels = np.concatenate([self._pixels(part).cpu().numpy() for part in images[rows].split(self.batch_size)])
        if self.k > min(pixels.shape):
            raise UserError(
                f"{self.name}: {len(pixels)} reference images of {pixels.shape[1]} pixels have fewer components"
            )
        pca = PCA(self.k, random_state=0).fit(pixels)
        self._mean, self._axes = (
            torch.from_numpy(part.copy()).to(self.device) for part in (pca.mean_, pca.components_)
        )
        self._reference = fingerprint_of(images)[:16]
        return self

    def _pixels(self, batch: Tensor) -> Tensor:
        return self._prepare(batch).flatten(1) / 255

    def _embed(self, x: Tensor) -> Tensor:
        if self._axes is None:
            raise UserError(
                f"{self.name} is fitted on the reference images: call fit(reference) before features(images)"
            )
        x = x.flatten(1) / 255
        if x.shape[1] != len(self._mean):
            raise UserError(f"{self.name}: images of {x.shape[1]} pixels, fitted on {len(self._mean)}; give a size")
        return (x - self._mean) @ self._axes.T

    def _weights_id(self) -> str:
        return f"fitted-on-{self._reference}" if self._reference else "not fitted"


class Inception(Extractor):
    """The FID network in PyTorch, 2048 pooled features."""

    name, channels, comparable = "inception", 3, True

    def __init__(self, weights=None, sha256: str | None = None, download: bool = True, cache=None, **options):
        super().__init__(**options, size=299)
        path = find_weights(self.name, weights, INCEPTION_URLS, INCEPTION_SHA256, download, cache)
        state, self.digest = read_weights(path, sha256)
        self.comparable = self.digest == INCEPTION_SHA256
        if not self.comparable:
            warnings.warn(
                f"{path}: sha256 {self.digest[:16]}... is not that of the FID network; {NOT_COMPARABLE}", stacklevel=3
            )
        self.model = fid_inception(state, str(path)).to(self.device)
        self.dim = 2048

    def _embed(self, x: Tensor) -> Tensor:
        return _full_precision(self.model, (x - 128) / 128)

    def _weights_id(self) -> str:
        return self.digest[:16]


class TorchvisionInception(Extractor):
    """torchvision's Inception-v3 (other weights and pools than the FID's), 2048 pooled features."""

    name, channels = "inception-tv", 3

    def __init__(self, weights=None, sha256: str | None = None, download: bool = True, cache=None, **options):
        from torchvision.models import inception_v3

        super().__init__(**options, size=299)
        path = find_weights(self.name, weights, TORCHVISION_URLS, TORCHVISION_SHA256, download, cache)
        state, self.digest = read_weights(path, sha256)
        # the auxiliary head serves training only, and some files leave it out
        state = {key: value for key, value in state.items() if not key.startswith("AuxLogits.")}
        model = inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
        load_into(model, state, str(path))
        model.fc = nn.Identity()
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.dim = 2048

    def _embed(self, x: Tensor) -> Tensor:
        return _full_precision(self.model, x / 127.5 - 1)

    def _weights_id(self) -> str:
        return self.digest[:16]


class FrozenGraph(Extractor):
    """The FID network as TTUR runs it: the TensorFlow graph classify_image_graph_def.pb, `pool_3`, 2048 features.

    The graph resizes by itself (`paper`); in mode `clean` it is fed images of 299 x 299 already.
    """

    name, channels, comparable = "inception-tf", 3, True

    def __init__(self, weights=None, sha256: str | None = None, download: bool = True, cache=None, **options):
        super().__init__(**options, size=299)
        if weights is None:
            raise UserError(
                "inception-tf needs the graph: give the path of classify_image_graph_def.pb "
                "(from inception-2015-12-05.tgz) as inception weights"
            )
        if not Path(weights).is_file():
            raise UserError(f"no such file: {weights}")
        self.digest = file_sha256(weights)
        _check_digest(weights, self.digest, sha256)
        self.session, self.input, self.output = _open_graph(weights)

    def _prepare(self, batch: Tensor) -> Tensor:
        x = _with_channels(batch, 3).float()
        return resize(x, self.size, "clean") if self.mode == "clean" else x

    def _embed(self, x: Tensor) -> Tensor:
        pooled = self.session.run(self.output, {self.input: x.permute(0, 2, 3, 1).numpy()})
        return torch.from_numpy(pooled.reshape(len(x), -1))

    def _weights_id(self) -> str:
        return self.digest[:16]


def import_tensorflow():
    """The tensorflow module. Raises UserError when it is not installed."""
    # Triton comes with PyTorch's CUDA builds and is loaded late, by torch._dynamo. Both libraries carry an LLVM; loaded
    # after TensorFlow's, Triton's ends the process with a segmentation fault, so it goes first.
    import torch._dynamo  # noqa: F401

    try:
        import tensorflow
    except ImportError:
        raise UserError("inception-tf needs TensorFlow: pip install tensorflow-cpu, or use inception") from None
    return tensorflow


def _open_graph(path):
    """(session, input tensor (N, H, W, 3), output tensor) of the frozen graph."""
    tf = import_tensorflow()
    definition = tf.compat.v1.GraphDef()
    try:
        definition.ParseFromString(Path(path).read_bytes())
    except Exception as error:  # protobuf's DecodeError lives in a private module
        raise UserError(f"{path}: not a TensorFlow graph ({str(error)[:80]})") from error
    graph = tf.Graph()
    with graph.as_default():
        # the graph was frozen for one image: a new input with a free batch axis takes the place of its own
        images = tf.compat.v1.placeholder(tf.float32, (None, None, None, 3))
        try:
            (pooled,) = tf.import_graph_def(definition, {"ExpandDims:0": images}, ["pool_3:0"], name="")
        except ValueError as error:
            raise UserError(
                f"{path}: not the Inception graph (needs ExpandDims and pool_3; {str(error)[:80]})"
            ) from error
    return tf.compat.v1.Session(graph=graph), images, pooled


def _full_precision(model: nn.Module, x: Tensor) -> Tensor:
    """`model(x)` in true float32: by default cuDNN would round the convolutions' inputs to ten bits (TF32)."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return model(x)


class LenetNetwork(nn.Module):
    """A small classifier of 32 x 32 images; `features` is its last hidden layer, 84 wide as in LeNet-5."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, stride=2, padding=2)
        self.hidden = nn.Linear(32 * 8 * 8, 84)
        self.output = nn.Linear(84, classes)

    def features(self, x: Tensor) -> Tensor:
        """Images (N, C, 32, 32) in [-1, 1] -> (N, 84)."""
        x = F.relu(self.conv1(x))  # (N, 16, 16, 16)
        x = F.relu(self.conv2(x))  # (N, 32, 8, 8)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.features(x))


class Lenet(Extractor):
    """Features of a small classifier, trained once on a data set's training split with a fixed seed and then kept."""

    name = "lenet"

    def __init__(self, dataset: str = "mnist", data_root=None, epochs: int = 3, cache=None, **options):
        super().__init__(**options, size=32)
        folder = Path(cache) if cache is not None else default_cache()
        path = folder / f"lenet-{dataset}-{self.mode}-e{epochs}.safetensors"
        if not path.is_file():
            _train_lenet(path, dataset, data_root, epochs, self.mode, self.progress)
        tensors, config = load_weights(path)
        self.dataset, self.channels = dataset, config["channels"]
        self.model = LenetNetwork(config["channels"], config["classes"])
        load_into(self.model, tensors, str(path))
        self.model.eval().requires_grad_(False).to(self.device)
        self.digest, self.dim = file_sha256(path), 84

    def _embed(self, x: Tensor) -> Tensor:
        return _full_precision(self.model.features, x / 127.5 - 1)

    def _weights_id(self) -> str:
        return f"{self.dataset}-{self.digest[:16]}"


def _train_lenet(path: Path, dataset: str, root, epochs: int, mode: str, progress: bool) -> None:
    """Train on the CPU (one result for all devices) by Adam, batches of 128, seed 0; write weights and config."""
    from common import datasets

    images = datasets.load(dataset, root=root, split="train")
    if images.targets.ndim != 1:  # before any image is read: the sprites take 3 GB
        raise UserError(
            f"lenet: data set {dataset} has no single class per image; choose mnist or another labelled set"
        )
    images, targets = images.arrays()
    images = torch.cat([resize(part.float(), 32, mode) for part in images.split(1024)]) / 127.5 - 1
    classes = int(targets.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LenetNetwork(images.shape[1], classes)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in tqdm(range(epochs), desc=f"training lenet on {dataset}", disable=None if progress else True):
            right = 0
            for rows in torch.randperm(len(images)).split(128):
                logits = model(images[rows])
                loss = F.cross_entropy(logits, targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                right += int((logits.argmax(1) == targets[rows]).sum())
    accuracy = right / len(images)
    config = {
        "dataset": dataset,
        "channels": images.shape[1],
        "classes": classes,
        "epochs": epochs,
        "resize": mode,
        "training_accuracy": accuracy,
    }
    save_weights(path, model.state_dict(), config)


_KINDS = {
    "inception": Inception,
    "inception-tf": FrozenGraph,
    "inception-tv": TorchvisionInception,
    "raw": Raw,
    "lenet": Lenet,
}


def make_extractor(name: str, device: str | torch.device = "auto", **options) -> Extractor:
    """The extractor called `name`: inception, inception-tf, inception-tv, raw, pixel-pca<k> or lenet.

    Options of all: batch_size=64, mode="paper"|"clean", size (raw and pixel-pca: resize to this side), progress=True.
    Of the Inceptions: weights (a file), sha256 (its expected digest), download=True, cache (a folder).
    Of lenet: dataset="mnist", data_root, epochs=3, cache.
    Raises UserError for unknown names and for weights that are missing, damaged or of another network.
    """
    options = {key: value for key, value in options.items() if value is not None}
    pca = re.fullmatch(r"pixel-pca(\d+)", name)
    kind = PixelPca if pca else _KINDS.get(name)
    if kind is None:
        raise UserError(f"unknown features '{name}'{suggest(name, NAMES)}; known: {', '.join(NAMES)}")
    known = {*inspect.signature(kind).parameters, *inspect.signature(Extractor).parameters} - {"k", "options"}
    if "size" in options and kind not in (Raw, PixelPca):
        raise UserError(f"features '{name}' have an input size of their own; leave the size out")
    for key in options:
        if key not in known:
            raise UserError(f"features '{name}' have no option '{key}'{suggest(key, known)}")
    return kind(**({"k": int(pca[1])} if pca else {}), device=device, **options)


# ---- files ---------------------------------------------------------------------------------------------------------


def file_sha256(path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path, sha256: str | None = None) -> tuple[dict[str, Tensor], str]:
    """(state dict, file digest) of a .pth or .safetensors file, read without executing anything in it.

    Raises UserError for missing, damaged or foreign files and when the digest does not begin with `sha256`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    digest = file_sha256(path)
    _check_digest(path, digest, sha256)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path), digest
        except Exception as error:  # SafetensorError, and what a lying header does to PyTorch
            raise UserError(f"{path}: not a readable .safetensors file ({str(error)[:80]})") from error
    state = load_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state dict (names of layers to tensors)")
    return state, digest


def find_weights(name: str, given, urls, sha256: str, download: bool, cache) -> Path:
    """The weights file: the given one, else the one in the cache, else downloaded there."""
    if given is not None:
        return Path(given)
    target = (Path(cache) if cache is not None else default_cache()) / urls[0].rsplit("/", 1)[1]
    if target.is_file():
        _check_digest(target, file_sha256(target), sha256)
        return target
    remedy = f"give the file (--inception-weights PATH, {urls[0]}), or use --features raw, pixel-pca64 or lenet"
    if not download:
        raise UserError(f"features '{name}' need weights that are not in {target.parent}; {remedy}")
    failures = []
    for url in urls:
        try:
            fetch(url, target, sha256)
            return target
        except OSError as error:
            failures.append(str(error))
    raise UserError(f"features '{name}' need weights and the download failed ({failures[0][:80]}); {remedy}")


def fetch(url: str, target: Path, sha256: str) -> None:
    """Download `url` to `target`; the file appears only when its digest begins with `sha256` (UserError otherwise)."""
    with urllib.request.urlopen(url, timeout=20) as answer, atomic_write(target) as file:
        digest = hashlib.sha256()
        total = int(answer.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc=target.name, disable=None) as bar:
            while block := answer.read(1 << 20):
                digest.update(block)
                file.write(block)
                bar.update(len(block))
        _check_digest(url, digest.hexdigest(), sha256)


def _check_digest(source, digest: str, expected: str | None) -> None:
    if expected and not digest.startswith(expected.lower()):
        raise UserError(
            f"{source}: sha256 is {digest[:16]}..., expected {expected[:16]}...; the file is damaged or another one"
        )


# ---- cache ---------------------------------------------------------------------------------------------------------


def fingerprint_of(images: Tensor) -> str:
    """SHA-256 over shape and pixels of uint8 images: changed images are never taken for the old ones."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.contiguous().numpy())
    return digest.hexdigest()


class FeatureCache:
    """Features on disk, one file per (images, extractor, resize mode and size, number of images)."""

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder) if folder is not None else default_cache() / "features"

    def features(self, images, extractor: Extractor) -> np.ndarray:
        """`extractor.features(images)`, from the disk when it was computed before; a damaged file is made again."""
        images = as_images(images)
        key = json.dumps([fingerprint_of(images), extractor.fingerprint, len(images)])
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        stored = self._read(path, key)
        if stored is not None and len(stored) == len(images):
            extractor._check_dim(stored.shape[1])
            return stored.astype(np.float64)
        features = extractor.features(images)
        narrow = features.astype(np.float32)
        exact = np.array_equal(narrow, features)  # a float32 network: half the size, nothing lost
        with atomic_write(path) as file:
            np.savez(file, features=narrow if exact else features, key=key)
        return features

    @staticmethod
    def _read(path: Path, key: str) -> np.ndarray | None:
        if not path.is_file():
            return None
        try:
            arrays = read_npz(path)
        except UserError as error:
            warnings.warn(f"{error}: computed again", stacklevel=3)
            return None
        return arrays["features"] if str(arrays.get("key")) == key and "features" in arrays else None
