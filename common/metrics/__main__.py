"""Compare two sets of images from the shell.

    python -m common.metrics samples/ reference/ --metrics fid kid prd ipr --inception-weights WEIGHTS.pth
    python -m common.metrics samples.npz reference.npz --features raw --json

The first set is evaluated, the second is the reference (precision is of the first, recall of the second). Each is a
folder of images, an .npy or .npz file of images (uint8, or floats in [0, 1]), an .npz with `features`, or saved
statistics (`mu`, `sigma`). Results go to stdout, warnings and progress to stderr.
"""

import json
import sys
import warnings
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from common.errors import UserError, run_command
from common.metrics import paths_and_options
from common.options import Count, Device, Options, Says, Seed, from_flags, option

_SERVES = {
    "inception_weights": "inception",
    "inception_sha256": "inception",
    "lenet_data": "lenet",
    "data_root": "lenet",
}
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-fA-F]{4,64}$"), Says("4 to 64 hexadecimal digits")]


def _up_to(most: int, least: int = 1):
    return Annotated[int, Field(ge=least, le=most)]


class Config(Options):
    """The options of the command."""

    metrics: list[Literal["fid", "kid", "prd", "ipr"]] = option(["fid", "kid"], "what to compute", min_length=1)
    as_json: bool = option(False, "one JSON object instead of a table", flags=("--json",))
    features: str = option(
        "inception",
        "inception, inception-tf, inception-tv, raw, pixel-pca<k>, lenet; all but the first two are not comparable to "
        "published FIDs",
        group="features",
    )
    inception_weights: str | None = option(None, "weights file of the chosen Inception (.pth, .pb)", group="features")
    inception_sha256: Digest | None = option(None, "refuse a weights file with another digest", group="features")
    offline: bool = option(False, "do not download weights", group="features")
    mode: Literal["paper", "clean"] = option(
        "paper", "resize as the papers did (paper) or antialiased bicubic (clean)", group="features"
    )
    size: _up_to(4096) | None = option(
        None, "raw, pixel-pca<k>: resize all images to this side first", group="features"
    )
    lenet_data: str | None = option(None, "data set that lenet is trained on (without: mnist)", group="features")
    data_root: str | None = option(
        None, "where lenet finds its data set (without: DATA_ROOT or data/)", group="features"
    )
    device: Device = option("auto", "where features are computed", group="features")
    batch_size: _up_to(65_536) = option(64, "images at once, in memory too", group="features")
    cache: str | None = option(None, "folder of weights and features (without: METRICS_CACHE)", group="features")
    no_cache: bool = option(False, "neither read nor keep features", group="features")
    limit: Count | None = option(None, "only the first so many images of each set", group="protocol")
    seed: Seed = option(0, "of PRD's clusterings", group="protocol")
    kid_subsets: _up_to(1_000_000) = option(100, "subsets of the kernel distance", group="protocol")
    kid_subset_size: _up_to(1_000_000_000, 2) = option(1000, "samples of each subset", group="protocol")
    kid_seed: Seed = option(12345, "of KID's subsets", group="protocol")
    kid_legacy: bool = option(False, "draw KID's subsets as numpy's old global generator", group="protocol")
    prd_clusters: _up_to(1_000_000) = option(20, "clusters of PRD", group="protocol")
    prd_angles: _up_to(1_000_000, 3) = option(1001, "points of PRD's curve", group="protocol")
    prd_runs: _up_to(10_000) = option(10, "clusterings that PRD averages over", group="protocol")
    ipr_k: _up_to(1_000_000) = option(3, "neighbours of the k-NN precision and recall", group="protocol")


def main(argv: list[str] | None = None) -> None:
    """Print the metrics of two sets. Raises UserError for anything the user can mend."""
    sets, words = paths_and_options(sys.argv[1:] if argv is None else argv, ("EVALUATED", "REFERENCE"))
    options, _ = from_flags(Config, words, about=__doc__)
    for name, kind in _SERVES.items():
        if getattr(options, name) is not None and not options.features.startswith(kind):
            raise UserError(f"--{name.replace('_', '-')} has no use with --features {options.features}")

    from common.metrics.features import FeatureCache, default_cache
    from common.metrics.generation import score

    protocol = [name for name, field in Config.model_fields.items() if field.json_schema_extra["group"] == "protocol"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        result = score(
            *sets,
            options.metrics,
            options.features,
            cache=None if options.no_cache else FeatureCache(f"{options.cache or default_cache()}/features"),
            **{name: getattr(options, name) for name in protocol},
            **_extractor_options(options),
        )
    messages = list(dict.fromkeys(" ".join(str(one.message).split()) for one in caught))
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)
    result = {"evaluated": sets[0], "reference": sets[1], **result, "warnings": messages}
    print(json.dumps(result, indent=2, allow_nan=False) if options.as_json else table(result))


def _extractor_options(options: Config) -> dict:
    """What `make_extractor` takes of the options; None is left out."""
    found = {name: getattr(options, name) for name in ("device", "batch_size", "mode", "size", "data_root")}
    found |= {"weights": options.inception_weights, "sha256": options.inception_sha256, "dataset": options.lenet_data}
    if options.features.startswith("inception"):
        found["download"] = not options.offline
    if options.features.startswith(("inception", "lenet")):
        found["cache"] = options.cache
    return {key: value for key, value in found.items() if value is not None}


def table(result: dict) -> str:
    """The result of `score` as lines for a reader."""
    lines = [
        f"evaluated  {result['evaluated']} ({result['n_evaluated'] or 'unknown number of'} samples)",
        f"reference  {result['reference']} ({result['n_reference'] or 'unknown number of'} samples)",
        f"features   {result['features']}" + (f", resize {result['resize']}" if result["resize"] else ""),
    ]
    if result["note"]:
        lines.append(f"note       {result['note']}")
    rows = {
        "FID": "{fid:.6g}",
        "KID": "{kid_mean:.6g} +/- {kid_std:.6g}  ({kid_subsets} subsets of {kid_subset_size})",
        "PRD F8, F1/8 (recall, precision)": "{prd_f8:.6g}  {prd_f1/8:.6g}  ({prd_n} samples of each)",
        "k-NN precision, recall": "{ipr_precision:.6g}  {ipr_recall:.6g}",
    }
    for (label, row), key in zip(rows.items(), ("fid", "kid_mean", "prd_n", "ipr_recall"), strict=True):
        if key in result:
            lines.append(f"{label:33s} {row.format_map(result)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
