"""Valid, damaged and lying files for every reader of the repository, and the child process that feeds them."""

import gzip
import importlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import load_state, load_tensors, load_weights, read_json, save_state, save_weights
from common.errors import UserError

MEMORY, SECONDS = 3 << 30, 200  # bytes beyond what the child holds when it starts; of its life
MUTATIONS = 120


def npz(**arrays) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def torch_file(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _checkpoint(folder: Path) -> bytes:
    save_state(folder / "made", "test", model={"w": torch.randn(3, 4)}, step=3, names=["a", "b"])
    return (folder / "made").read_bytes()


def _weights(folder: Path) -> bytes:
    save_weights(folder / "made.safetensors", {"w": torch.randn(3, 4), "b": torch.zeros(3)}, {"width": 4})
    return (folder / "made.safetensors").read_bytes()


def _idx(folder: Path) -> bytes:
    return bytes([0, 0, 8, 3]) + struct.pack(">3I", 5, 4, 4) + bytes(range(80))


def _h5(folder: Path) -> bytes:
    import h5py

    with h5py.File(folder / "made.h5", "w") as file:
        file.create_dataset(
            "images", data=np.zeros((2, 64, 64, 3), np.uint8), chunks=(1, 64, 64, 3), compression="gzip"
        )
    return (folder / "made.h5").read_bytes()


def _mat(folder: Path) -> bytes:
    from scipy.io import savemat

    savemat(folder / "made.mat", {"X": np.zeros((4, 4, 3, 2), np.uint8), "y": np.ones((2, 1))})
    return (folder / "made.mat").read_bytes()


def _png(folder: Path) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(stream, format="PNG")
    return stream.getvalue()


def _zip(folder: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/b.txt", "text " * 50)
        file.writestr("c.bin", bytes(200))
    return stream.getvalue()


def _tar(folder: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as file:
        member = tarfile.TarInfo("a/b.txt")
        member.size = 300
        file.addfile(member, io.BytesIO(b"x" * 300))
    return stream.getvalue()


def _lightning(folder: Path) -> bytes:
    return torch_file({"state_dict": {"a.weight": torch.randn(2, 3)}, "epoch": 3})


def _read_h5(path: Path) -> None:
    from common.datasets import load

    images = load("shapes3d", path.parent, sizes=(1, 1, 1, 1, 1, 2))
    images.images_at([0, 1])


def _read_table(path: Path) -> None:
    from common.run import _read_rows

    _read_rows(path)


def _read_experiment(path: Path) -> None:
    from lbae.protocol import experiment_params

    (path.parent / "log").mkdir(exist_ok=True)
    (path.parent / "log/cfg-0-0.json").write_bytes(path.read_bytes())
    experiment_params(path.parent, {"eval": True})


def _read_yaml(path: Path) -> None:
    from nfpi.config import resolve

    resolve(path.parent, path.stem, [])


def _unpack(module: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        import shutil

        target = path.parent / "unpacked"
        target.mkdir()
        try:
            importlib.import_module(module).unpack(path, target)
        finally:
            shutil.rmtree(target)

    return read


def _lazy(module: str, function: str, *arguments) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        found = importlib.import_module(module)
        for name in function.split("."):
            found = getattr(found, name)
        return found(path, *arguments)

    return read


CONFIG = b"defaults:\n  - base\n  - _self_\ndataset_name: digits\nbits: 5\ntrain:\n  epochs: 3\n"
ARRAYS = {"data": np.zeros((2, 12), np.uint8), "labels": [0, 1]}
CIFAR = pickle.dumps(ARRAYS, protocol=2)
SET = {"train": {"data": torch.zeros(2, 1, 3, 3, dtype=torch.uint8), "targets": torch.arange(2)}, "classes": ["a", "b"]}
LATENTS = {"codes": np.zeros((3, 2), np.uint8), "binary": True, "zsize": 16, "labels": np.zeros((3, 1), np.int64)}
LATENTS |= {"epoch": 1, "iter": 2, "source": "training pass"}

# name of the file -> (a valid content, its reader)
READERS: dict[str, tuple[Callable[[Path], bytes], Callable[[Path], object]]] = {
    "state.pt": (_checkpoint, lambda path: load_state(path, "test")),
    "legacy.pt": (lambda folder: torch_file({"x": torch.zeros(3)}), load_tensors),
    "weights.safetensors": (_weights, load_weights),
    "inception.safetensors": (_weights, _lazy("common.metrics.features", "read_weights")),
    "config.json": (lambda folder: b'{"a": [1, 2.5, "x"], "b": {"c": null}}', read_json),
    "cfg.json": (lambda folder: b'{"cfg": "mnist_bae", "zsize": 16, "lr": 0.1, "vae": false}', _read_experiment),
    "own.yaml": (lambda folder: CONFIG, _read_yaml),
    "metrics.csv": (lambda folder: b"step,loss\n1,0.5\n2,0.25\n", _read_table),
    "test_metrics.csv": (lambda folder: b"iter,rec\n1,0.5\n", _lazy("glancenet.records", "read_table")),
    "records.npy": (lambda folder: npy(np.arange(4.0)) * 2, _lazy("glancenet.records", "load_arrays", 2)),
    "images-idx3-ubyte": (_idx, _lazy("common.datasets.readers", "read_idx", 3)),
    "images-idx3-ubyte.gz": (lambda f: gzip.compress(_idx(f)), _lazy("common.datasets.readers", "read_idx", 3)),
    "features.npz": (lambda f: npz(mu=np.zeros(3), sigma=np.eye(3), n=3), _lazy("common.metrics.frechet", "read_npz")),
    "codes.npz": (
        lambda f: npz(codes=np.arange(240.0).reshape(120, 2), factors=np.arange(120)[:, None] % 3),
        _lazy("common.metrics.disentanglement", "load_codes"),
    ),
    "images.npy": (
        lambda f: npy(np.zeros((2, 8, 8), np.uint8)),
        lambda path: _lazy("common.metrics.inputs", "load_images")(str(path)),
    ),
    "set.npz": (
        lambda f: npz(X=np.zeros((2, 64, 64), np.uint8)),
        _lazy("glancenet.data", "open_npz", "X", "a command"),
    ),
    "latents.npz": (lambda f: npz(**LATENTS), _lazy("lbae.experiment", "Latents.load")),
    "cloud.npz": (
        lambda f: npz(x=np.zeros((4, 2)), y=np.zeros(4, int)),
        lambda path: _lazy("nfpi.synthetic_2d", "load_cloud")(str(path)),
    ),
    "batch.pickle": (lambda f: CIFAR, _lazy("common.datasets.readers", "read_array_pickle")),
    "latents.pk": (
        lambda f: pickle.dumps([np.ones((3, 2), np.float32), np.zeros((3, 1))]),
        lambda path: _lazy("lbae.experiment", "Latents.load")(path.with_suffix(".npz")),
    ),
    "set.pickle": (lambda f: pickle.dumps(SET, protocol=4), _lazy("nfpi.data", "read_pickle")),
    "epoch.ckpt": (_lightning, _lazy("nfpi.convert_checkpoint", "read_state_dict")),
    "3dshapes.h5": (_h5, _read_h5),
    "made.mat": (_mat, _lazy("common.datasets.readers", "read_mat", ("X", "y"))),
    "0.png": (_png, _lazy("common.datasets.readers", "read_image", 3)),
    "picture.png": (_png, _lazy("common.images", "read_picture")),
    "data.zip": (_zip, _unpack("common.datasets.prepare")),
    "data.tar.gz": (_tar, _unpack("common.datasets.prepare")),
    "models.zip": (_zip, _unpack("lbae.download")),
    "models.tar.gz": (_tar, _unpack("lbae.download")),
}
PICKLES = ("state.pt", "legacy.pt", "batch.pickle", "latents.pk", "set.pickle", "epoch.ckpt")


def mutations(content: bytes, seed: int) -> list[bytes]:
    """Flipped bytes, cuts, doubled, dropped and foreign pieces, headers of zeros and of 0xff."""
    rng = np.random.default_rng([seed, len(content)])
    made = [b"", b"\0" * 100, b"<!DOCTYPE html><html>not found</html>", content[: len(content) // 2], content + content]
    made += [b"\xff" * 8 + content[8:], b"\0" * 8 + content[8:], content[::-1]]
    while len(made) < MUTATIONS:
        data, n = bytearray(content), len(content)
        kind = rng.integers(5)
        at = int(rng.integers(n))
        if kind < 2:  # mostly near one end, where headers and directories are
            for _ in range(int(rng.integers(1, 6))):
                place = int(min(n - 1, rng.exponential(40)))
                data[place if rng.random() < 0.5 else n - 1 - place] = int(rng.integers(256))
        elif kind == 2:
            for place in rng.integers(0, n, 8):
                data[place] = int(rng.integers(256))
        elif kind == 3:
            data[at : at + int(rng.integers(1, 16))] = bytes(
                rng.choice([0, 1, 127, 255], int(rng.integers(1, 16))).tolist()
            )
        else:
            data = data[:at] if rng.random() < 0.5 else data[:at] + data[at // 2 :]
        made.append(bytes(data))
    return made


def _bomb(name: str) -> bytes:
    """A zip of one member that says it is 64 GB: all zeros, compressed a thousandfold, in the part that is there."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as file:
        file.writestr(name, bytes(1 << 20))
    data = stream.getvalue()
    for place in (data.find(b"PK\x03\x04") + 22, data.find(b"PK\x01\x02") + 24):
        data = data[:place] + struct.pack("<I", 0xFFFFFFFE) + data[place + 4 :]
    return data


def _lie(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + bytes(64)


def _stored(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(name, content)
    return stream.getvalue()


def _compressed(content: bytes) -> bytes:
    """The members of a zip once more, compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    return stream.getvalue()


def _yaml_bomb() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    return CONFIG + "\n".join(lines).encode()


def lies(name: str, content: bytes) -> list[bytes]:
    """Files that are well formed but claim what is not there."""
    suffix = name.rpartition(".")[2]
    keys = {"features": "mu", "codes": "codes", "set": "X", "latents": "codes", "cloud": "x"}
    made = []
    if suffix == "npz":
        key = keys[name.partition(".")[0]]
        for shape in ((10**12,), (1 << 40, 1 << 40), (2**62, 4), (-1,)):
            made.append(_stored(f"{key}.npy", _lie(shape)))
        made += [
            _bomb(f"{key}.npy"),
            npz(**{key: np.array([{}], dtype=object)}),
            npz(other=np.zeros(2)),
            npy(np.zeros(3)),
        ]
        made += [
            _stored(f"{key}.npy", _lie((4,), "|O")),
            _stored(f"{key}.npy", b"\x93NUMPY\1\0\xff\xff{" + b"[" * 70000),
        ]
    if suffix == "npy":
        made += [
            _lie((10**12,)),
            _lie((1 << 40, 1 << 40), "<f8"),
            npy(np.zeros(3)) + _lie((1 << 50,)),
            _lie((3,), "|O"),
        ]
    if "idx3" in name:
        wrap = gzip.compress if suffix == "gz" else bytes
        for shape in ((10**9, 1000, 1), (2**32 - 1,) * 3, (65536, 65536, 1)):
            made.append(wrap(bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape) + bytes(1000)))
        made.append(wrap(bytes([0, 0, 13, 3]) + struct.pack(">3I", 5, 4, 4) + bytes(80)))
    if suffix == "safetensors":
        for header in (
            {"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
            {"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 48]}},
            {"w": {"dtype": "F32", "shape": [2**63, 4], "data_offsets": [0, 48]}},
            {"w": {"dtype": "NONE", "shape": [3], "data_offsets": [0, 12]}},
            {"w": 3}, [], {"w": {"dtype": "F32", "shape": [3], "data_offsets": [12, 0]}},
        ):  # fmt: skip
            text = json.dumps(header).encode()
            made.append(struct.pack("<Q", len(text)) + text + bytes(48))
        made += [struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 99_000_000) + b"{}"]
    if suffix == "json":
        made += [b"[" * 100_000, b'{"a":' * 50_000, b"NaN", b"3", b"[]", b'"text"', b"{\xff}", b"1" * 5000, b"null"]
        made += [b'{"cfg": 3, "img_crop_size": "x"}', b'{"cfg": "mnist_bae", "zsize": [1], "lr": "fast", "vae": 7}']
        made += [b'{"cfg": "mnist_bae", "zsize": "many"}', b'{"cfg": "mnist_bae", "batch_size": -4, "lr": NaN}']
        made += [b'{"cfg": ["mnist"], "dataset": {"a": 1}, "img_crop_size": {}}']
    if suffix == "yaml":
        made += [_yaml_bomb(), b"[" * 5000, b"a: " * 2000, b"- 1\n- 2\n", b"defaults: 3\n", b"train: 3\n" + CONFIG]
        made += [
            CONFIG + b"val: 3\n",
            b"3\n",
            b"!!python/object/apply:os.system ['touch ran']\n",
            b"\x00\x01",
            b"{" * 40,
        ]
        made += [CONFIG.replace(b"bits: 5", b"bits: [1, 2]"), CONFIG.replace(b"digits", b"{a: 1}")]
    if suffix == "csv":
        made += [
            b"a,b\n1,2\n",
            b"step,loss\nx,1\n",
            b"step\n1,2,3\n",
            b'step,"loss\n1',
            b"\xff\xfe",
            b"step\n" + b"9" * 200_000,
        ]
        made += [b"step,loss\n" + b'"' + b"x" * 300_000 + b'",1\n', b"step,loss\n1\n\n\n2,3", b"\0\0\0"]
    if suffix in ("pt", "ckpt"):
        made += [
            _compressed(content),
            _stored("archive/data.pkl", b"\x80\x02]r\xff\xff\xff\x7f."),
            pickle.dumps({"a": 1}),
        ]
        made += [torch_file([1, 2]), torch_file({"format_version": 99, "kind": "test", "state": {}})]
        made += [torch_file({"state_dict": 3}), torch_file({"state_dict": [torch.zeros(2)]})]
    if suffix in ("pickle", "pk"):
        made += [
            b"\x80\x02]r\xff\xff\xff\x7f.",
            b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
            pickle.dumps([1, 2]),
        ]
        made += [b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.", b"\x80\x02X\xff\xff\xff\x7fabc."]
        made += [b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.", pickle.dumps({"data": np.array([{}])})]
        nested = [0]
        for _ in range(60):
            nested = [nested, nested]  # 2^60 leaves for a reader that does not see that they are the same
        made += [pickle.dumps({"data": nested, "labels": [0]}), b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."]
        made += [pickle.dumps([nested, nested])]
        made.append(pickle.dumps(SET).replace(b"K\x02K\x01K\x03K\x03", b"J\xff\xff\xff\x7fK\x01K\x03K\x03"))
    if suffix == "h5":
        import h5py

        for shape, key in (((10**9, 64, 64, 3), "images"), ((2, 64, 64, 3), "pictures"), ((2, 8), "images")):
            with h5py.File("lie.h5", "w") as file:
                file.create_dataset(key, shape, np.uint8, chunks=(1, *shape[1:]))
            made.append(Path("lie.h5").read_bytes())
    if suffix == "png":
        import zlib

        for side in (10**6, 2**31 - 1, 9_500):
            head = b"IHDR" + struct.pack(">II", side, side) + b"\x08\x02\0\0\0"
            made.append(b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + struct.pack(">I", zlib.crc32(head)) + content[33:])
    if suffix == "zip":
        made += [
            _bomb("a.txt"),
            _stored("../out", b"x"),
            _stored("/tmp/never-made-here", b"x"),
            _stored("a\\..\\..\\b", b"x"),
        ]
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as file:
            link = zipfile.ZipInfo("link")
            link.external_attr = 0o120777 << 16
            file.writestr(link, "/etc")
            file.writestr("link/passwd", "x")
        made.append(stream.getvalue())
    if suffix == "gz" and "tar" in name:
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
        entries = [("link", kind) for kind in kinds]
        entries += [(path, tarfile.REGTYPE) for path in ("../out", "/tmp/never-made-here", "a/../../out")]
        for path, kind in entries:
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode="w:gz") as file:
                member = tarfile.TarInfo(path)
                member.type, member.linkname = kind, "../../out"
                file.addfile(member)
            made.append(stream.getvalue())
        huge = tarfile.TarInfo("a")
        huge.size = 1 << 50
        made.append(gzip.compress(huge.tobuf(tarfile.GNU_FORMAT) + bytes(5000)))
    return made


def attack(names: list[str], folder: str) -> None:
    """In a child: every reader of `names` with every file; exits with 1 and a report when another error escapes."""
    import faulthandler
    import resource
    import signal
    import traceback
    import warnings

    for name in names:
        _lazy_import(name)
    os.chdir(folder)
    signal.alarm(SECONDS)
    faulthandler.enable()
    warnings.simplefilter("ignore")  # readers warn of odd headers before they refuse them
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    report = []
    for seed, name in enumerate(names):
        make, read = READERS[name]
        place = Path(folder) / name.replace(".", "_")
        place.mkdir()
        path = place / name
        content = make(place)
        path.write_bytes(content)
        if name.endswith("safetensors"):
            path.with_suffix(".json").write_text("{}")
        read(path)  # the valid file is read
        refused = 0
        for number, data in enumerate(lies(name, content) + mutations(content, seed)):
            path.write_bytes(data)
            try:
                read(path)
            except UserError as error:
                refused += 1
                if "\n" in str(error):
                    report.append(f"{name} {number}: more than one line: {error}")
            except BaseException:
                report.append(f"{name} {number} ({data[:40]!r}):\n{traceback.format_exc(limit=-4)}")
        if refused < MUTATIONS // 8:
            report.append(f"{name}: only {refused} refused")
    Path(folder, "report.txt").write_text("\n".join(report[:40]))
    os._exit(bool(report))


def _lazy_import(name: str) -> None:
    """Import what the readers need before the memory is limited."""
    import h5py  # noqa: F401
    import safetensors.torch  # noqa: F401
    import scipy.io  # noqa: F401
    import torchvision  # noqa: F401

    import common.datasets
    import common.metrics.features  # noqa: F401
    import glancenet.data  # noqa: F401
    import lbae.experiment  # noqa: F401
    import nfpi.convert_checkpoint
    import nfpi.synthetic_2d  # noqa: F401
