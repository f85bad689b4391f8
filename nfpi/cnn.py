"""CNNs trained on images that the flow generates, tested on real images; and the same CNN on real images.

Called by main.py, once a temperature. `train_cnn` is the whole procedure. Written below
`0_exp_0_T<T>/<strategy>/`: config.json, metrics.csv, tb/, log.txt, confusion.png, cnn.safetensors (+ .json); the
generated set goes to `0_exp_0_T<T>/pickle_datasets/ds_<epoch>.pickle` as {"data", "targets"}.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.batches import Batches
from common.checkpoint import load_into, load_weights, save_weights
from common.images import save_image
from common.launch import Distributed, autocast, check_finite
from common.run import Run
from common.training import FINITE_EVERY, timed
from nfpi import augment, pictures
from nfpi.conditional import ConditionalFlow
from nfpi.config import Config
from nfpi.data import Images, Use, generator, items_per_class, sampling_batches, to_uint8, write_pickle

TEMPERATURES = (1.2, 1.1, 1.0, 0.9, 0.8, 0.7)
INVERT_AT_ONCE = 500  # images a pass through the inverse flow: bounds the memory, changes no number


def resnet(version: int, channels: int, classes: int, stem: str = "small") -> nn.Module:
    """torchvision's ResNet with random weights and `classes` outputs.

    `stem` `small` (the paper's): 3x3 of stride 1, no max-pooling. `imagenet`: 7x7 of stride 2 and max-pooling, a
    sixteenth of the work, for tries on a CPU.
    """
    import torchvision  # here: it takes a second that a check of options need not wait

    model = getattr(torchvision.models, f"resnet{version}")(weights=None, num_classes=classes)
    if stem == "small":
        model.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    else:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return model


def temperatures(config: Config) -> list[float]:
    """The temperatures at which CNNs are trained; one run when no image is generated, or with `only_T`."""
    if config.classifier_nf_strategy == "do_not_use":
        return [1.0]
    return [config.T] if config.only_T else list(TEMPERATURES)


def spelled(temperature: float) -> str:
    """A temperature as folders and results name it: with one decimal, or all that it has."""
    return f"{temperature:.1f}" if round(temperature, 1) == temperature else f"{temperature:g}"


def normalised(pixels: Tensor, config: Config) -> Tensor:
    """uint8 -> float in [-1, 1], cut to `bits` bits and padded where asked."""
    if config.do_k_bits_posterize_transform:
        pixels = augment.posterize(pixels, config.bits)
    pad = augment.CNN_RECIPES[config.dataset.cnn].zero_pad
    pixels = F.pad(pixels, (pad,) * 4) if pad else pixels
    return (pixels.float() / 255 - 0.5) / 0.5


# ---------------------------------------------------------------- generated sets


@torch.no_grad()
def generate(model: ConditionalFlow, config: Config, temperature: float, epoch: int, dist: Distributed) -> Images:
    """A labelled set at `temperature`: `generated_per_class` images of every class, shuffled, in original size.

    Every process samples its share, class by class, from generators of (seed, epoch, process, class); all get all.
    """
    info = config.dataset
    per_class = config.generated_per_class
    place = (epoch + config.sample_seed_start, dist.rank)
    images, labels = [], []
    with model.evaluating():
        for batch, count in enumerate(sampling_batches(per_class, dist.world)):
            for k in range(info.num_classes):
                rng = generator(config.seed, Use.SAMPLE, *place, batch, k, device=model.device)
                for part in torch.full((count,), k).split(INVERT_AT_ONCE):
                    x, y = model.sample(part, temperature, rng)
                    images.append(to_uint8(x.float().cpu()))
                    labels.append(y.cpu())
    images, labels = torch.cat(images), torch.cat(labels)
    if dist.world > 1:
        images, labels = (dist.gather(t.to(dist.device)).cpu() for t in (images, labels))
    rng = generator(config.seed, Use.SAMPLE, place[0], 2**20)
    kept = [(labels == k).nonzero().flatten()[:per_class] for k in range(info.num_classes)]
    index = torch.cat(kept)
    index = index[torch.randperm(len(index), generator=rng)]
    pad = augment.RECIPES[info.augmentation].zero_pad
    images = images[index]
    if pad:
        images = images[:, :, pad:-pad, pad:-pad]
    return Images(images.contiguous(), labels[index], ())


def store(images: Images, path: Path) -> None:
    """The set by the pickle contract: grey images without the channel axis."""
    data = images.images[:, 0] if images.images.shape[1] == 1 else images.images
    write_pickle(path, {"data": data, "targets": images.targets})


def training_set(
    model: ConditionalFlow | None, config: Config, real: Images, temperature: float, epoch: int, dist: Distributed,
    folder: Path,
) -> Images:  # fmt: skip
    """What the strategy trains on in `epoch`: real images, generated ones, or both."""
    strategy = config.classifier_nf_strategy
    if strategy == "do_not_use":
        return real
    mixed = strategy.startswith("mix")
    made = generate(model, config, temperature, epoch, dist)
    if config.do_all_classifications and dist.is_main:
        store(made, folder / "pickle_datasets" / f"ds_{epoch}.pickle")
    if not mixed:
        return Images(made.images, made.targets, real.classes)
    both = torch.cat([real.images, made.images]), torch.cat([real.targets, made.targets])
    return Images(*both, real.classes)


# ---------------------------------------------------------------- training and test


@torch.no_grad()
def confusion_matrix(net: nn.Module, images: Images, config: Config, dist: Distributed) -> Tensor:
    """Counts (K, K) on `images`: rows are true classes, columns predictions."""
    net.eval()
    classes = config.dataset.num_classes
    counts = torch.zeros(classes * classes, dtype=torch.float64)
    batches = Batches(images, 500 * dist.world, shuffle=False, drop_last=False, rank=dist.rank, world=dist.world,
                      device=dist.device)  # fmt: skip
    for pixels, y in batches.epoch(0):
        if len(y):
            predicted = net(normalised(pixels, config)).argmax(1)
            counts += torch.bincount(y.cpu() * classes + predicted.cpu(), minlength=classes * classes)
    return dist.sum(counts.to(dist.device) if dist.world > 1 else counts).cpu().view(classes, classes)


def optimizer_of(net: nn.Module, config: Config, steps: int) -> tuple:
    """(optimiser, scheduler, whether the scheduler steps after every batch); `steps` an epoch."""
    if config.classification.optimizer_name == "adam":
        adam = config.classification.adam
        optimizer = torch.optim.Adam(net.parameters(), lr=adam.lr)
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, adam.steps, adam.steps_decay), False
    sgd, epochs = config.classification.sgd, config.cnn_run.epochs
    start = sgd.max_lr / 25  # where the one cycle starts
    optimizer = torch.optim.SGD(net.parameters(), lr=start, momentum=sgd.momentum, weight_decay=sgd.weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, sgd.max_lr, epochs=epochs, steps_per_epoch=steps)
    return optimizer, cycle, True


def new_net(config: Config) -> nn.Module:
    """The ResNet: random weights by `seed`, or those of `cnn_load_path`. Raises UserError where they do not fit."""
    options, info = config.classification, config.dataset
    torch.manual_seed(config.seed)
    net = resnet(options.resnet_version, info.ch, info.num_classes, options.stem)
    if config.cnn_load_path:
        load_into(net, load_weights(config.cnn_load_path)[0], config.cnn_load_path)
    return net


def train_cnn(
    model: ConditionalFlow | None, config: Config, real: Images, test: Images, temperature: float, dist: Distributed,
    folder: Path,
) -> float:  # fmt: skip
    """Train a ResNet by the configured strategy at `temperature`; returns its accuracy on the real test images."""
    strategy, folder = config.classifier_nf_strategy, folder / f"0_exp_0_T{spelled(temperature)}"
    if config.cnn_run.imgs_per_class:
        rng = torch.Generator().manual_seed(config.seed)
        real = real.subset(items_per_class(real.targets, config.cnn_run.imgs_per_class, rng))
    net = new_net(config).to(dist.device)
    facts = {"temperature": temperature, "strategy": strategy, "dataset": config.dataset_name,
             "resnet": config.classification.resnet_version}  # fmt: skip
    with Run(folder / strategy, facts, overwrite=True, wandb=config.wandb or None, enabled=dist.is_main) as run:
        if not config.cnn_load_path:
            images = training_set(model, config, real, temperature, 0, dist, folder)
            run.info(f"{len(images)} training images, {len(test)} real test images")
            parallel, optimizer = dist.wrap(net), None
            for epoch in range(config.cnn_run.epochs):
                if epoch and strategy.endswith("resample"):
                    images = training_set(model, config, real, temperature, epoch, dist, folder)
                if optimizer is None or strategy.endswith("resample"):
                    batches = Batches(
                        images, config.cnn_run.batch_size, seed=config.seed, drop_last=config.classification.drop_last,
                        rank=dist.rank, world=dist.world, device=dist.device, hold=True,
                    )  # fmt: skip
                if optimizer is None:
                    optimizer, scheduler, every_batch = optimizer_of(net, config, len(batches))
                figures = train_epoch(parallel, net, batches, epoch, config, optimizer, every_batch and scheduler)
                if not every_batch:
                    scheduler.step()
                matrix = confusion_matrix(net, test, config, dist)
                accuracy = float(matrix.trace() / matrix.sum())
                run.log(epoch, epoch=epoch, **figures, test_acc=accuracy)
                run.info(f"cnn epoch {epoch}: train loss {figures['train_loss']:.4f}, test accuracy {accuracy:.4f}")
        matrix = confusion_matrix(net, test, config, dist)
        accuracy = float(matrix.trace() / matrix.sum())
        if dist.is_main:
            picture = pictures.confusion(matrix, test.classes)
            save_image(run.folder / "confusion.png", picture)
            run.image("confusion_matrix_cnn", picture, config.cnn_run.epochs)
            if not config.cnn_load_path:
                save_weights(run.folder / "cnn.safetensors", net.state_dict(), {**facts, "test_acc": accuracy})
    return accuracy


def train_epoch(
    parallel: nn.Module, net: nn.Module, batches: Batches, epoch: int, config: Config,
    optimizer: torch.optim.Optimizer, scheduler: Any,
) -> dict[str, float]:  # fmt: skip
    """One epoch of cross-entropy; loss and accuracy on the training images. `scheduler` steps after every batch."""
    net.train()
    recipe, device, rank = augment.CNN_RECIPES[config.dataset.cnn], batches.device, batches.rank
    # loss and correct ones
    totals = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    seen = 0
    for index, (pixels, y) in enumerate(timed(batches.epoch(epoch), config.cnn_run.epochs * len(batches), device)):
        rng = generator(config.seed, Use.CNN, epoch, index, rank, device=device)
        pixels = augment.shift_and_flip(pixels, recipe.crop_pad, recipe.flip, recipe.vertical, rng)
        with autocast(device, config.amp):
            logits = parallel(normalised(pixels, config)).float()
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if device.type == "cpu" or index % FINITE_EVERY == 0:
            check_finite(loss, index, net)
        optimizer.step()
        if scheduler:
            scheduler.step()
        totals += torch.stack([loss.detach().to(totals) * len(y), (logits.argmax(1) == y).sum().to(totals)])
        seen += len(y)
    loss, correct = totals.tolist()
    return {"train_loss": loss / seen, "train_acc": correct / seen}
