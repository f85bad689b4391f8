"""The paper's small classifier (supplement 8): two 3x3 inverse convolutions, 16 parameters, and one linear layer.

    python inv_flow/classify_mnist.py                      MNIST, 50 epochs (the paper: 97.6 %)
    python inv_flow/classify_mnist.py --dataset digits --epochs 20
    python inv_flow/classify_mnist.py --no_inverse          the linear layer alone, for comparison

Each inverse convolution has one channel, 8 free taps and its own scan order (TL, BR), and is followed by a leaky ReLU.
Prints the test accuracy of every epoch and writes <out>/classifier.csv.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.batches import Batches
from common.checkpoint import atomic_write
from common.datasets import load
from common.errors import UserError, run_command
from common.launch import check_finite, pick_device, seed_everything
from inv_flow.layers.inv_conv import InverseConv2d


class Classifier(nn.Module):
    """(B, 1, H, W) in [0, 1] -> class scores (B, classes)."""

    def __init__(self, side: int, classes: int, inverse: bool = True):
        super().__init__()
        self.convs = nn.ModuleList(
            [InverseConv2d(1, 3, order, max_row_sum=0.95) for order in ("TL", "BR")] if inverse else []
        )
        self.linear = nn.Linear(side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.leaky_relu(conv(x)[0], 0.1)
        return self.linear(x.flatten(1))


@torch.no_grad()
def accuracy(model: Classifier, batches: Batches) -> float:
    """Share of right answers."""
    right = total = 0
    for images, targets in batches.epoch(0):
        right += int((model(images.float() / 255).argmax(1) == targets).sum())
        total += len(targets)
    return right / total


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", choices=("mnist", "fashion_mnist", "digits"))
    parser.add_argument("--data_root")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--no_inverse", action="store_true", help="only the linear layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="runs/inv_flow/classifier")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size) < 1:
        raise UserError("epochs and batch_size must be positive")
    device = pick_device(args.device)
    seed_everything(args.seed)
    train, test = (load(args.dataset, args.data_root, split) for split in ("train", "test"))
    model = Classifier(train.height, len(train.targets.unique()), not args.no_inverse).to(device)
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
    path = Path(args.out) / f"{args.dataset}{'_linear' if args.no_inverse else ''}.csv"
    with atomic_write(path) as file:
        file.write(("\n".join(rows) + "\n").encode())
    print(path)


if __name__ == "__main__":
    sys.exit(run_command(main))
