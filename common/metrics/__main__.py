"""Compare two sets of images from the shell.

    python -m common.metrics samples/ reference/ --metrics fid kid prd ipr --inception-weights WEIGHTS.pth
    python -m common.metrics samples.npz reference.npz --features raw --json

The first set is evaluated, the second is the reference (precision is of the first, recall of the second). Each is a
folder of images, an .npy or .npz file of images (uint8, or floats in [0, 1]), an .npz with `features`, or saved
statistics (`mu`, `sigma`). Results go to stdout, warnings and progress to stderr.
"""

import argparse
import json
import sys
import warnings

from common.errors import UserError, run_command, suggest

_SERVES = {
    "--inception-weights": "inception",
    "--inception-sha256": "inception",
    "--lenet-data": "lenet",
    "--data-root": "lenet",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m common.metrics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("evaluated", help="folder, .npy or .npz that is judged")
    parser.add_argument("reference", help="folder, .npy or .npz it is judged against")
    parser.add_argument("--metrics", nargs="+", default=["fid", "kid"], help="fid kid prd ipr (default: fid kid)")
    parser.add_argument(
        "--features",
        default="inception",
        help="inception (default), inception-tf, inception-tv, raw, pixel-pca<k>, lenet; "
        "all but the first two are not comparable to published FIDs",
    )
    group = parser.add_argument_group("features")
    group.add_argument("--inception-weights", metavar="PATH", help="weights file of the chosen Inception (.pth, .pb)")
    group.add_argument("--inception-sha256", metavar="HEX", help="refuse a weights file with another digest")
    group.add_argument("--offline", action="store_true", help="do not download weights")
    group.add_argument(
        "--mode", default="paper", help="resize as the papers did (paper) or antialiased bicubic (clean)"
    )
    group.add_argument("--size", type=int, help="raw, pixel-pca<k>: resize all images to this side first")
    group.add_argument("--lenet-data", metavar="NAME", help="data set that lenet is trained on (default: mnist)")
    group.add_argument(
        "--data-root", metavar="DIR", help="where lenet finds its data set (default: DATA_ROOT or data/)"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda[:i], mps (default: auto)")
    group.add_argument("--batch-size", type=int, default=64)
    group.add_argument("--cache", metavar="DIR", help="folder of weights and features (default: METRICS_CACHE)")
    group.add_argument("--no-cache", action="store_true", help="neither read nor keep features")
    group = parser.add_argument_group("protocol")
    group.add_argument("--limit", type=int, help="only the first so many images of each set")
    group.add_argument("--seed", type=int, default=0, help="of PRD's clusterings (default: 0)")
    group.add_argument("--kid-subsets", type=int, default=100)
    group.add_argument("--kid-subset-size", type=int, default=1000)
    group.add_argument("--kid-seed", type=int, default=12345)
    group.add_argument("--kid-legacy", action="store_true", help="draw KID's subsets as numpy's old global generator")
    group.add_argument("--prd-clusters", type=int, default=20)
    group.add_argument("--prd-angles", type=int, default=1001)
    group.add_argument("--prd-runs", type=int, default=10)
    group.add_argument("--ipr-k", type=int, default=3, help="neighbours of the k-NN precision and recall (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the metrics of two sets. Raises UserError for anything the user can mend."""
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"unknown option {unknown[0]}{suggest(unknown[0], flags)}; see --help")

    from common.metrics.features import FeatureCache, default_cache
    from common.metrics.generation import score

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        result = score(
            args.evaluated,
            args.reference,
            args.metrics,
            args.features,
            cache=None if args.no_cache else FeatureCache(f"{args.cache or default_cache()}/features"),
            limit=args.limit,
            seed=args.seed,
            kid_subsets=args.kid_subsets,
            kid_subset_size=args.kid_subset_size,
            kid_seed=args.kid_seed,
            kid_legacy=args.kid_legacy,
            prd_clusters=args.prd_clusters,
            prd_angles=args.prd_angles,
            prd_runs=args.prd_runs,
            ipr_k=args.ipr_k,
            **_extractor_options(args),
        )
    messages = list(dict.fromkeys(" ".join(str(one.message).split()) for one in caught))
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)
    result = {"evaluated": args.evaluated, "reference": args.reference, **result, "warnings": messages}
    print(json.dumps(result, indent=2, allow_nan=False) if args.json else table(result))


def _extractor_options(args: argparse.Namespace) -> dict:
    """The options of `make_extractor`. Raises UserError for a flag that the chosen features have no use for."""
    for flag, kind in _SERVES.items():
        if getattr(args, flag.strip("-").replace("-", "_")) is not None and not args.features.startswith(kind):
            raise UserError(f"{flag} has no use with --features {args.features}")
    options = {
        "device": args.device,
        "batch_size": args.batch_size,
        "mode": args.mode,
        "size": args.size,
        "weights": args.inception_weights,
        "sha256": args.inception_sha256,
        "download": False if args.offline and args.features.startswith("inception") else None,
        "dataset": args.lenet_data,
        "data_root": args.data_root,
    }
    if args.features.startswith(("inception", "lenet")):
        options["cache"] = args.cache
    return {key: value for key, value in options.items() if value is not None}


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
        "FID": ("fid",),
        "KID": ("kid_mean", "kid_std"),
        "PRD F8, F1/8 (recall, precision)": ("prd_f8", "prd_f1/8"),
        "k-NN precision, recall": ("ipr_precision", "ipr_recall"),
    }
    for label, keys in rows.items():
        if keys[0] in result:
            joint = " +/- " if label == "KID" else "  "
            lines.append(f"{label:33s} {joint.join(f'{result[key]:.6g}' for key in keys)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
