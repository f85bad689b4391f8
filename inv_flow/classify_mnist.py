"""The paper's small classifier (supplement 8): two 3x3 inverse convolutions, 16 parameters, and one linear layer.

    python inv_flow/classify_mnist.py                      MNIST, 50 epochs (the paper: 97.6 %)
    python inv_flow/classify_mnist.py --dataset digits --epochs 20
    python inv_flow/classify_mnist.py --no_inverse          the linear layer alone, for comparison
    python inv_flow/classify_mnist.py --orders TL TR --activation abs --padding 10 --max_row_sum none
    python inv_flow/classify_mnist.py --padding 10 --random_taps 0.1      taps drawn once and not trained: the control

Each inverse convolution has one channel, 8 free taps and its own scan order, and is followed by the activation.
Prints the test accuracy of every epoch and writes <out>/<dataset>.csv (<dataset>_linear.csv for the linear layer).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import json
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from common.batches import Batches
from common.checkpoint import atomic_write
from common.datasets import load, split
from common.errors import UserError, run_command
from common.launch import check_finite, full_precision, pick_device, seed_everything
from common.options import Count, Device, NonNegative, Options, Positive, Seed, Whole, from_flags, option
from inv_flow.layers.inv_conv import InverseConv2d
from inv_flow.train.config import Cap, Text

ACTIVATIONS = {"leaky": lambda x: F.leaky_relu(x, 0.1), "abs": torch.abs}
Order = Literal["TL", "TR", "BL", "BR"]


class ClassifierOptions(Options):
    """The options of the classifier."""

    dataset: Literal["mnist", "fashion_mnist", "digits"] = option("mnist", "data set")
    data_root: Text | None = option(None, "folder of the data sets (default: DATA_ROOT or data/)")
    epochs: Count = option(50, "training epochs")
    batch_size: Count = option(100, "images a step")
    lr: Positive = option(1e-3, "learning rate at the start; it falls along a cosine")
    no_inverse: bool = option(False, "only the linear layer")
    max_row_sum: Cap | None = option(0.95, "cap on the free taps of a kernel (none: no cap)")
    orders: tuple[Order, ...] = option(("TL", "BR"), "scan order of each inverse convolution")
    activation: Literal["leaky", "abs"] = option("leaky", "what follows each: a leaky ReLU or the absolute value")
    padding: Annotated[int, Field(ge=0, le=1000)] = option(0, "black pixels around the image")
    random_taps: NonNegative | None = option(None, "draw taps from N(0, this^2) and do not train them: the control")
    validation: Whole = option(0, "training images held out, on which the accuracy is measured; 0: the test images")
    seed: Seed = option(0, "seed of everything random")
    device: Device = option("auto", "where to compute")
    tf32: bool = option(False, "let a GPU round float32 convolutions and matrix products to TF32")
    out: Text = option("runs/inv_flow/classifier", "folder of the table")
    dry_run: bool = option(False, "check the options, print them as JSON, and leave")


class Classifier(nn.Module):
    """(B, 1, H, W) in [0, 1] -> class scores (B, classes), for square images of `side` and the options of the script.

    With `random_taps` the convolutions keep the taps that they draw.
    """

    def __init__(
        self,
        side: int,
        classes: int,
        orders: tuple[str, ...] = ("TL", "BR"),
        max_row_sum: float | None = 0.95,
        activation: str = "leaky",
        padding: int = 0,
        random_taps: float | None = None,
    ):
        super().__init__()
        std = 0.01 if random_taps is None else random_taps
        self.convs = nn.ModuleList(
            InverseConv2d(1, 3, order, init_std=std, max_row_sum=max_row_sum).requires_grad_(random_taps is None)
            for order in orders
        )
        self.activation, self.padding = ACTIVATIONS[activation], padding
        self.linear = nn.Linear((side + 2 * padding) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (self.padding,) * 4)
        for conv in self.convs:
            x = self.activation(conv(x)[0])
        return self.linear(x.flatten(1))


@torch.no_grad()
def accuracy(model: Classifier, batches: Batches) -> float:
    """Share of right answers."""
    right = [(model(images.float() / 255).argmax(1) == targets).sum() for images, targets in batches.epoch(0)]
    return int(torch.stack(right).sum()) / len(batches.dataset)


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    args, given = from_flags(ClassifierOptions, sys.argv[1:] if argv is None else argv, __doc__)
    idle = [name for name in ("max_row_sum", "orders", "activation", "random_taps") if name in given]
    if args.no_inverse and idle:
        raise UserError(f"--{idle[0]} does nothing here: it needs the inverse convolutions, without --no_inverse")
    device = pick_device(args.device)
    if args.dry_run:
        print(json.dumps(args.as_dict(), indent=2))
        return
    full_precision(args.tf32)
    seed_everything(args.seed)
    train, test = (load(args.dataset, args.data_root, split, fetch=True) for split in ("train", "test"))
    if args.validation:
        if args.validation >= len(train):
            raise UserError(f"--validation {args.validation}: there are {len(train)} training images; hold out fewer")
        train, test = split(train, [len(train) - args.validation, args.validation])
    classes = int(test.targets.max()) + 1
    orders = () if args.no_inverse else args.orders
    model = Classifier(
        test.height, classes, orders, args.max_row_sum, args.activation, args.padding, args.random_taps
    ).to(device)  # fmt: skip
    kernels = sum(int(conv.mask.sum()) for conv in model.convs)
    print(f"{kernels} free kernel entries, {sum(p.numel() for p in model.linear.parameters()):,} linear ones")
    batches = Batches(train, args.batch_size, seed=args.seed, device=device, hold=True)
    held_out = Batches(test, 1000, shuffle=False, drop_last=False, device=device, hold=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    rows = ["epoch,train_loss,test_accuracy"]
    for epoch in range(args.epochs):
        total = torch.zeros((), device=device)
        for images, targets in batches.epoch(epoch):
            loss = F.cross_entropy(model(images.float() / 255), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        schedule.step()
        mean = check_finite(total / len(batches), epoch + 1, model)
        rows.append(f"{epoch + 1},{mean:.5f},{accuracy(model, held_out):.5f}")
        print(rows[-1], flush=True)
    for conv in model.convs:
        print(f"{conv.order} taps: {' '.join(f'{tap:.3f}' for tap in conv.free()[conv.mask].tolist())}")
    path = Path(args.out) / f"{args.dataset}{'_linear' if args.no_inverse else ''}.csv"
    with atomic_write(path) as file:
        file.write(("\n".join(rows) + "\n").encode())
    print(path)


if __name__ == "__main__":
    sys.exit(run_command(main))
