"""Feature extractors behind one interface, the files they need, and the cache of features on disk.

    extractor = make_extractor("inception", device="cuda", weights="pt_inception-2015-12-05-6726825d.pth")
    features = extractor.fit("reference/").features("samples/")          # -> float64 (N, extractor.dim)

Only `inception` (and `inception-tf`, the same network as a TensorFlow graph) gives numbers that may stand beside
published FIDs. The others work without any download and compare runs of one's own.
"""

import hashlib
import inspect
import json
import os
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common.checkpoint import atomic_write, load_into, load_tensors, load_weights, save_weights
from common.datasets.download import Remote, fetch
from common.errors import UserError, suggest
from common.launch import pick_device
from common.metrics.frechet import check_features, read_npz
from common.metrics.inception import fid_inception
from common.metrics.inputs import Images, file_sha256, open_images
from common.metrics.resize import MODES, resize

NAMES = ("inception", "inception-tf", "inception-tv", "raw", "pixel-pca<k>", "lenet")
NOT_COMPARABLE = "not comparable to published FID"
MOST_BYTES, MOST_BATCH_BYTES = 16 << 30, 4 << 30  # of the features of one set, of one batch of images

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

    name, weights_id = "", "none"
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
        return f"{self.name} weights:{self.weights_id} resize:{self.mode} size:{self.size or 'as is'}"

    @property
    def note(self) -> str:
        """What a table has to say beside the numbers, or an empty string."""
        return "" if self.comparable else f"features '{self.name}': {NOT_COMPARABLE}"

    def fit(self, reference) -> "Extractor":
        """Adapt to the reference images (whatever `open_images` takes); most extractors have nothing to adapt."""
        return self

    @torch.inference_mode()
    def features(self, images) -> np.ndarray:
        """float64 features (N, dim) of whatever `open_images` takes, read and embedded batch by batch on the device.

        Raises UserError for images of several sizes (where they are taken as they are), for features that would not fit
        into memory, and for features that are not finite.
        """
        images = self._open(images)
        features: np.ndarray | None = None
        done = 0
        with tqdm(total=len(images), desc=f"{self.name} features", disable=None if self.progress else True) as bar:
            for batch in images.batches(self.batch_size):
                part = self._embed(self._prepare(batch)).cpu().numpy().astype(np.float64)
                self._check_dim(part.shape[1])
                if features is None:
                    _check_memory(len(images), self.dim, MOST_BYTES, "give fewer or smaller images")
                    features = np.empty((len(images), self.dim))
                features[done : done + len(part)] = part
                done += len(part)
                bar.update(len(part))
        if not np.isfinite(features).all():
            raise UserError(
                f"{images.name}: features '{self.name}' hold NaN or infinite values; are the weights whole?"
            )
        return features

    def _open(self, images) -> Images:
        images = open_images(images)
        if self.size is None:
            images.need_one_size()
        pixels = max([height * width for height, width in images.sizes] + [(self.size or 0) ** 2])
        values = (self.channels or images.channels) * pixels
        rows = min(self.batch_size, len(images))
        _check_memory(rows, values, MOST_BATCH_BYTES, "give smaller images or a smaller batch size")
        return images

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


def _check_memory(rows: int, columns: int, most: int, remedy: str) -> None:
    if rows * columns * 8 > most:
        raise UserError(f"{rows} images of {columns} values take {rows * columns * 8 / 2**30:.1f} GB; {remedy}")


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

    dtype, weights_id = torch.float64, "not fitted"
    most_images, most_values = 10_000, 1 << 28  # of the reference, in memory for the fit

    def __init__(self, k: int, **options):
        super().__init__(**options)
        if k < 1:
            raise UserError(f"pixel-pca{k}: at least one component is needed")
        self.name, self.k, self._mean, self._axes, self._colours = f"pixel-pca{k}", k, None, None, 0

    @torch.inference_mode()
    def fit(self, reference) -> "PixelPca":
        """Find the components of (at most 10 000, evenly spaced) reference images. Raises UserError for too few."""
        from sklearn.decomposition import PCA

        images = self._open(reference)
        first = self._pixels(images.rows([0]))
        most = min(len(images), self.most_images, self.most_values // first.shape[1])
        rows = np.unique(np.linspace(0, len(images) - 1, most).round().astype(int))
        parts = np.split(rows, range(self.batch_size, len(rows), self.batch_size))
        pixels = np.concatenate([self._pixels(images.rows(part)).cpu().numpy() for part in parts])
        if self.k > min(pixels.shape):
            raise UserError(
                f"{self.name}: {len(pixels)} reference images of {pixels.shape[1]} pixels have fewer components"
            )
        pca = PCA(self.k, random_state=0).fit(pixels)
        self._mean, self._axes = (
            torch.from_numpy(part.copy()).to(self.device) for part in (pca.mean_, pca.components_)
        )
        self._colours = images.channels
        self.weights_id = f"fitted-on-{images.fingerprint[:16]}"
        return self

    def _pixels(self, batch: Tensor) -> Tensor:
        return self._prepare(batch).flatten(1) / 255

    def _embed(self, x: Tensor) -> Tensor:
        if self._axes is None:
            raise UserError(
                f"{self.name} is fitted on the reference images: call fit(reference) before features(images)"
            )
        colours, x = x.shape[1], x.flatten(1) / 255
        if colours != self._colours:
            raise UserError(f"{self.name}: images of {colours} channel(s), fitted on {self._colours}; give one colour")
        if x.shape[1] != len(self._mean):
            raise UserError(f"{self.name}: images of {x.shape[1]} pixels, fitted on {len(self._mean)}; give a size")
        return (x - self._mean) @ self._axes.T


class Pretrained(Extractor):
    """An ImageNet network from a weights file: the given one, the one in the cache, or a download; 2048 features."""

    urls: tuple[str, ...] = ()
    published = ""  # first digits of the file's sha256
    channels = 3

    def __init__(self, weights=None, sha256: str | None = None, download: bool = True, cache=None, **options):
        super().__init__(**options, size=299)
        path = find_weights(self.name, weights, self.urls, self.published, download, cache)
        self.digest, self.dim = file_sha256(path), 2048
        _check_digest(path, self.digest, sha256)
        self.weights_id = self.digest[:16]
        self.model = self._network(path)

    def _network(self, path: Path):
        """The network with the weights of a file."""
        raise TypeError(f"{type(self).__name__} does not say how to read its weights")


class Inception(Pretrained):
    """The FID network in PyTorch."""

    name, urls, published = "inception", INCEPTION_URLS, INCEPTION_SHA256

    def _network(self, path: Path) -> nn.Module:
        self.comparable = self.digest == INCEPTION_SHA256
        if not self.comparable:
            warnings.warn(
                f"{path}: sha256 {self.digest[:16]}... is not that of the FID network; {NOT_COMPARABLE}", stacklevel=4
            )
        return fid_inception(read_weights(path), str(path)).to(self.device)

    def _embed(self, x: Tensor) -> Tensor:
        return _full_precision(self.model, (x - 128) / 128)


class TorchvisionInception(Pretrained):
    """torchvision's Inception-v3, of other weights and pools than the FID's."""

    name, urls, published = "inception-tv", TORCHVISION_URLS, TORCHVISION_SHA256

    def _network(self, path: Path) -> nn.Module:
        from torchvision.models import inception_v3

        # the auxiliary head serves training only, and some files leave it out
        state = {key: value for key, value in read_weights(path).items() if not key.startswith("AuxLogits.")}
        model = inception_v3(weights=None, aux_logits=False, transform_input=False, init_weights=False)
        load_into(model, state, str(path))
        model.fc = nn.Identity()
        return model.eval().requires_grad_(False).to(self.device)

    def _embed(self, x: Tensor) -> Tensor:
        return _full_precision(self.model, x / 127.5 - 1)


class FrozenGraph(Pretrained):
    """The FID network as TTUR runs it: the TensorFlow graph classify_image_graph_def.pb, `pool_3`.

    The graph resizes by itself (`paper`); in mode `clean` it is fed images of 299 x 299 already.
    """

    name, comparable = "inception-tf", True

    def _network(self, path: Path):
        self.dim = None  # that of the graph
        return _open_graph(path)

    def _prepare(self, batch: Tensor) -> Tensor:
        x = _with_channels(batch, 3).float()
        return resize(x, self.size, "clean") if self.mode == "clean" else x

    def _embed(self, x: Tensor) -> Tensor:
        session, images, pooled = self.model
        return torch.from_numpy(session.run(pooled, {images: x.permute(0, 2, 3, 1).numpy()}).reshape(len(x), -1))


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
        try:
            self._load(path)
        except UserError as error:
            if path.is_file():
                warnings.warn(f"{error}: trained again", stacklevel=3)
            _train_lenet(path, dataset, data_root, epochs, self.mode, self.progress)
            self._load(path)
        digest = hashlib.sha256()  # of the weights: the container's bytes vary from save to save
        for value in self.model.state_dict().values():
            digest.update(value.cpu().numpy().tobytes())
        self.weights_id, self.dim = f"{dataset}-{digest.hexdigest()[:16]}", 84

    def _load(self, path: Path) -> None:
        tensors, config = load_weights(path)
        if not {"channels", "classes"} <= config.keys():
            raise UserError(f"{path}: not a classifier of images")
        model = LenetNetwork(config["channels"], config["classes"])
        load_into(model, tensors, str(path))
        self.channels, self.model = config["channels"], model.eval().requires_grad_(False).to(self.device)

    def _embed(self, x: Tensor) -> Tensor:
        return _full_precision(self.model.features, x / 127.5 - 1)


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


def extractor_kind(name: str) -> tuple[type[Extractor], dict[str, int]]:
    """The class of the extractor called `name`, and the number of its components. Raises UserError for others."""
    pca = re.fullmatch(r"pixel-pca(\d{1,9})", name)
    kind = PixelPca if pca else _KINDS.get(name)
    if kind is None:
        raise UserError(f"unknown features '{name}'{suggest(name, NAMES)}; known: {', '.join(NAMES)}")
    return kind, {"k": int(pca[1])} if pca else {}


def make_extractor(name: str, device: str | torch.device = "auto", **options) -> Extractor:
    """The extractor called `name`: inception, inception-tf, inception-tv, raw, pixel-pca<k> or lenet.

    Options of all: batch_size=64, mode="paper"|"clean", size (raw and pixel-pca: resize to this side), progress=True.
    Of the Inceptions: weights (a file), sha256 (its expected digest), download=True, cache (a folder).
    Of lenet: dataset="mnist", data_root, epochs=3, cache.
    Raises UserError for unknown names and for weights that are missing, damaged or of another network.
    """
    options = {key: value for key, value in options.items() if value is not None}
    kind, components = extractor_kind(name)
    known = {*inspect.signature(kind).parameters, *inspect.signature(Extractor).parameters} - {"k", "options"}
    if "size" in options and kind not in (Raw, PixelPca):
        raise UserError(f"features '{name}' have an input size of their own; leave the size out")
    for key in options:
        if key not in known:
            raise UserError(f"features '{name}' have no option '{key}'{suggest(key, known)}")
    return kind(**components, device=device, **options)


# ---- files ---------------------------------------------------------------------------------------------------------


def read_weights(path) -> dict[str, Tensor]:
    """The state dict of a .pth or .safetensors file, read without executing anything in it.

    Raises UserError for damaged and foreign files.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # SafetensorError, and what a lying header does to PyTorch
            raise UserError(f"{path}: not a readable .safetensors file ({str(error)[:80]})") from error
    state = load_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state dict (names of layers to tensors)")
    return state


def find_weights(name: str, given, urls, sha256: str, download: bool, cache) -> Path:
    """The weights file: the given one, else the one in the cache, else downloaded there."""
    if given is not None:
        if not Path(given).is_file():
            raise UserError(f"no such file: {given}")
        return Path(given)
    if not urls:
        raise UserError(
            f"{name} needs the graph: give the path of classify_image_graph_def.pb (from inception-2015-12-05.tgz) as "
            "inception weights"
        )
    target = (Path(cache) if cache is not None else default_cache()) / urls[0].rsplit("/", 1)[1]
    if target.is_file():
        _check_digest(target, file_sha256(target), sha256)
        return target
    remedy = f"get {urls[0]} and name it as inception weights, or use the features raw, pixel-pca64 or lenet"
    if not download:
        raise UserError(f"features '{name}' need weights that are not in {target.parent}; {remedy}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # of this process alone
            fetch(Remote(target.name, urls, digest=sha256), Path(folder)).replace(target)
    except UserError as error:
        reason = str(error).split("; ")[0]
        raise UserError(f"features '{name}' need weights and the download failed ({reason}); {remedy}") from error
    return target


def _check_digest(source, digest: str, expected: str | None) -> None:
    if expected and not digest.startswith(expected.lower()):
        raise UserError(
            f"{source}: sha256 is {digest[:16]}..., expected {expected[:16]}...; the file is damaged or another one"
        )


# ---- cache ---------------------------------------------------------------------------------------------------------


class FeatureCache:
    """Features on disk, one file per (images, extractor, resize mode and size, number of images)."""

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder) if folder is not None else default_cache() / "features"

    def features(self, images, extractor: Extractor) -> np.ndarray:
        """`extractor.features(images)`, from the disk when it was computed before; a damaged file is made again."""
        images = open_images(images)
        key = json.dumps([images.fingerprint, extractor.fingerprint, len(images)])
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        stored = self._read(path, key, len(images)) if path.is_file() else None
        if stored is not None:
            extractor._check_dim(stored.shape[1])
            return stored
        features = extractor.features(images)
        narrow = features.astype(np.float32)
        exact = np.array_equal(narrow, features)  # a float32 network: half the size, nothing lost
        with atomic_write(path) as file:
            np.savez(file, features=narrow if exact else features, key=key)
        return features

    @staticmethod
    def _read(path: Path, key: str, rows: int) -> np.ndarray | None:
        try:
            arrays = read_npz(path)
            if str(arrays.get("key")) != key or len(arrays.get("features", ())) != rows:
                raise UserError(f"{path}: not the features that its name says")
            return check_features(arrays["features"], str(path), 1)
        except UserError as error:
            warnings.warn(f"{error}: computed again", stacklevel=3)
            return None
