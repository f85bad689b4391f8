"""Draw latent codes from the prior and write them, with their decoded pictures, as a pool for the traversal.

    python -m latent_flow.sample_vae --exp RUN --num-samples 10 --pool VAE_MNIST_VIS
    python -m latent_flow.sample_vae --num-samples 10 --pool VAE_MNIST_VIS              # the released MNIST model

Written: RUN/latent_codes/<pool>/args.json and, per code, <sha1 of z>/latent_code.pt (float32 (1, D)) and image.jpg.
RUN is runs/latent_flow/released for the released model.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le

from common.checkpoint import atomic_write, write_json
from common.errors import UserError, run_command
from common.images import save_image
from common.launch import full_precision, pick_device
from common.options import option
from latent_flow.options import ToolOptions, is_dry, parse_tool
from latent_flow.runs import Written, load_run, run_or_release
from latent_flow.traverse_latent_space_vae import PoolName, code_name, pictures_of, prior_codes, resized

TYPES = {
    "VAE_MNIST": ("mnist", "fashion_mnist", "digits"),
    "VAE_Shapes": ("shapes3d", "dsprites", "sprites", "frames"),
    "VAE_FALOR": ("falcor3d", "sprites"),
    "VAE_ISAAC": ("isaac3d",),
}


class SampleOptions(ToolOptions):
    """Options of the sampler."""

    gan_type: Literal[tuple(TYPES)] | None = option(None, "checked against the run", flags=("-g",))
    num_samples: Annotated[int, Ge(1), Le(1_000_000)] = option(4, "how many codes")
    pool: PoolName | None = option(None, "name of the pool [<type>_<number of samples>]")
    verbose: bool = option(False, "print every code", flags=("-v",))


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Command line of the sampler."""
    args = parse_tool(SampleOptions, argv, __doc__)
    if is_dry(args):
        return
    device = pick_device(args.device)
    full_precision(args.tf32)
    source, folder, _ = run_or_release(args.exp)
    model, _, _ = load_run(source, device)
    if args.gan_type and model.config.dataset not in TYPES[args.gan_type]:
        raise UserError(f"{source} was trained on {model.config.dataset}: --gan-type {args.gan_type} does not fit")
    kind = args.gan_type or next(name for name, sets in TYPES.items() if model.config.dataset in sets)
    written = Written(folder / "latent_codes" / (args.pool or f"{kind}_{args.num_samples}"))
    z = prior_codes(model, args.num_samples, args.seed)
    pictures = pictures_of(model, z.to(device), 64)
    for code, picture in zip(z, pictures, strict=True):
        name = code_name(code)
        with atomic_write(written.path(f"{name}/latent_code.pt")) as file:
            torch.save(code[None].clone(), file)
        save_image(written.path(f"{name}/image.jpg"), resized(picture[None], len(picture))[0], quality=95)
        if args.verbose:
            print(written.folder / name)
    write_json(written.path("args.json"), args.as_dict())
    written.finish()
    print(f"{args.num_samples} codes: {written.folder}")


if __name__ == "__main__":
    sys.exit(run_command(main))
