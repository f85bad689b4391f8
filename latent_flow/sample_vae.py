"""Draw latent codes from the prior and write them, with their decoded pictures, as a pool for the traversal.

    python -m latent_flow.sample_vae --exp RUN --num-samples 10 --pool VAE_MNIST_VIS
    python -m latent_flow.sample_vae --num-samples 10 --pool VAE_MNIST_VIS              # the released MNIST model

Written: RUN/latent_codes/<pool>/args.json and, per code, <sha1 of z>/latent_code.pt (float32 (1, D)) and image.jpg.
RUN is runs/latent_flow/released for the released model.
"""

import sys

import torch

from common.checkpoint import atomic_write, write_json
from common.errors import UserError, run_command
from common.images import save_image
from common.launch import pick_device
from latent_flow.evaluate import load_run, run_or_release
from latent_flow.options import Parser, positive
from latent_flow.traverse_latent_space_vae import code_name, pictures_of, prior_codes, resized

TYPES = {
    "VAE_MNIST": ("mnist", "fashion_mnist", "digits"),
    "VAE_Shapes": ("shapes3d", "dsprites", "sprites", "frames"),
    "VAE_FALOR": ("falcor3d", "sprites"),
    "VAE_ISAAC": ("isaac3d",),
}


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Command line of the sampler."""
    parser = Parser(description=__doc__)
    parser.add_argument("--exp", default=None, help="folder of a run whose VAE decodes (default: the released model)")
    parser.add_argument("-g", "--gan-type", choices=tuple(TYPES), default=None, help="checked against the run")
    parser.add_argument("--num-samples", type=positive, default=4)
    parser.add_argument("--pool", default=None, help="name of the pool (default: <type>_<number of samples>)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_switch("--cuda", default=None, help="--no-cuda is the same as --device cpu")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every code")
    args = parser.parse(argv)
    device = pick_device("cpu" if args.cuda is False else "cuda" if args.cuda else args.device)
    source, folder, _ = run_or_release(args.exp)
    model, _, _ = load_run(source, device)
    if args.gan_type and model.config.dataset not in TYPES[args.gan_type]:
        raise UserError(f"{source} was trained on {model.config.dataset}: --gan-type {args.gan_type} does not fit")
    kind = args.gan_type or next(name for name, sets in TYPES.items() if model.config.dataset in sets)
    pool = folder / "latent_codes" / (args.pool or f"{kind}_{args.num_samples}")
    z = prior_codes(model, args.num_samples, args.seed)
    pictures = pictures_of(model, z.to(device), 64)
    for code, picture in zip(z, pictures, strict=True):
        place = pool / code_name(code)
        with atomic_write(place / "latent_code.pt") as file:
            torch.save(code[None].clone(), file)
        save_image(place / "image.jpg", resized(picture[None], len(picture))[0], quality=95)
        if args.verbose:
            print(place)
    write_json(pool / "args.json", vars(args))
    print(f"{args.num_samples} codes: {pool}")


if __name__ == "__main__":
    sys.exit(run_command(main))
