"""CNNs trained on images that the flow generates, tested on real images; and the same CNN on real images.

Called by main.py, once a temperature. `train_cnn` is the whole procedure. Written below
`0_exp_0_T<T>/<strategy>/`: config.json, metrics.csv, tb/, log.txt, confusion.png, cnn.safetensors (+ .json); the
generated set goes to `0_exp_0_T<T>/pickle_datasets/ds_<epoch>.pickle` as {"data", "targets"}.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from omegaconf import DictConfig
from torch import Tensor, nn

from common.batches import Batches
from common.checkpoint import load_into, load_weights, save_weights
from common.errors import UserError
from common.images import save_image
from common.launch import Distributed, check_finite
from common.run import Run
from nfpi import augment, pictures
from nfpi.conditional import ConditionalFlow
from nfpi.data import Images, Use, generator, items_per_class, sampling_batches, to_uint8, write_pickle

TEMPERATURES = (1.2, 1.1, 1.0, 0.9, 0.8, 0.7)
INVERT_AT_ONCE = 500  # images a pass through the inverse flow: bounds the memory, changes no number


@dataclass(frozen=True)
class CnnRecipe:
    """The classifier's transforms: random crop after `crop_pad` black pixels and flips in training, `zero_pad`
    always.
    """

    crop_pad: int = 0
    flip: bool = False
    vertical: bool = False
    zero_pad: int = 0


CNN_RECIPES = {
    "plain": CnnRecipe(),
    "mnist": CnnRecipe(zero_pad=2),
    "svhn": CnnRecipe(zero_pad=2),
    "cifar": CnnRecipe(crop_pad=4, flip=True),
    "tinyimagenet": CnnRecipe(crop_pad=4, flip=True),
    "aerial": CnnRecipe(crop_pad=4, flip=True, vertical=True),
}


def resnet(version: int, channels: int, classes: int, stem: str = "small") -> nn.Module:
    """torchvision's ResNet with random weights and `classes` outputs.

    `stem` `small` (the paper's): 3x3 of stride 1, no max-pooling. `imagenet`: 7x7 of stride 2 and max-pooling, a
    sixteenth of the work, for tries on a CPU.
    """
    model = getattr(torchvision.models, f"resnet{version}")(weights=None, num_classes=classes)
    if stem == "small":
        model.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    else:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return model


def temperatures(cfg: DictConfig) -> list[float]:
    """The temperatures at which CNNs are trained; one run when no image is generated, or with `only_T`."""
    if cfg.classifier_nf_strategy == "do_not_use":
        return [1.0]
    return [float(cfg.T)] if cfg.only_T else list(TEMPERATURES)


def normalised(pixels: Tensor, recipe: CnnRecipe, bits: int | None) -> Tensor:
    """uint8 -> float in [-1, 1], cut to `bits` bits and padded where asked."""
    if bits:
        pixels = augment.posterize(pixels, bits)
    pixels = F.pad(pixels, (recipe.zero_pad,) * 4) if recipe.zero_pad else pixels
    return (pixels.float() / 255 - 0.5) / 0.5


# ---------------------------------------------------------------- generated sets


@torch.no_grad()
def generate(
    model: ConditionalFlow, cfg: DictConfig, temperature: float, scale: float, epoch: int, dist: Distributed
) -> Images:
    """A labelled set at `temperature`: int(train_size // K scale) images of every class, shuffled, in original size.

    Every process samples its share, class by class, from generators of (seed, epoch, process, class); all get all.
    """
    info = cfg.dataset_info[cfg.dataset_name]
    per_class = int(info.train_size // info.num_classes * scale)
    if per_class < 1:
        raise UserError(f"the generated set would be empty: {info.train_size} // {info.num_classes} x {scale} a class")
    place = (int(epoch) + int(cfg.sample_seed_start), dist.rank)
    images, labels = [], []
    with model.evaluating():
        for batch, count in enumerate(sampling_batches(per_class, dist.world)):
            for k in range(info.num_classes):
                rng = generator(cfg.seed, Use.SAMPLE, *place, batch, k, device=model.device)
                for part in torch.full((count,), k).split(INVERT_AT_ONCE):
                    x, y = model.sample(part, temperature, rng)
                    images.append(torch.as_tensor(to_uint8(x.float().cpu())))
                    labels.append(y.cpu())
    images, labels = torch.cat(images), torch.cat(labels)
    if dist.world > 1:
        images, labels = (dist.gather(t.to(dist.device)).cpu() for t in (images, labels))
    rng = generator(cfg.seed, Use.SAMPLE, place[0], 2**20)
    kept = [(labels == k).nonzero().flatten()[:per_class] for k in range(info.num_classes)]
    index = torch.cat(kept)
    index = index[torch.randperm(len(index), generator=rng)]
    pad = augment.recipe(info.augmentation).zero_pad
    images = images[index]
    if pad:
        images = images[:, :, pad:-pad, pad:-pad]
    return Images(images.contiguous(), labels[index], ())


def store(images: Images, path: Path) -> None:
    """The set by the pickle contract: grey images without the channel axis."""
    data = images.images[:, 0] if images.images.shape[1] == 1 else images.images
    write_pickle(path, {"data": data, "targets": images.targets})


def training_set(
    model: ConditionalFlow | None,
    cfg: DictConfig,
    real: Images,
    temperature: float,
    epoch: int,
    dist: Distributed,
    folder: Path,
) -> Images:
    """What the strategy trains on in `epoch`: real images, generated ones, or both."""
    strategy = cfg.classifier_nf_strategy
    if strategy == "do_not_use":
        return real
    mixed = strategy.startswith("mix")
    made = generate(model, cfg, temperature, cfg.mixing_nbr if mixed else cfg.num_imgs_scale, epoch, dist)
    if cfg.do_all_classifications and dist.is_main:
        store(made, folder / "pickle_datasets" / f"ds_{epoch}.pickle")
    if not mixed:
        return Images(made.images, made.targets, real.classes)
    both = torch.cat([real.images, made.images]), torch.cat([real.targets, made.targets])
    return Images(*both, real.classes)


# ---------------------------------------------------------------- training and test


@torch.no_grad()
def confusion_matrix(
    net: nn.Module, images: Images, classes: int, recipe: CnnRecipe, bits: int | None, dist: Distributed
) -> Tensor:
    """Counts (K, K) on `images`: rows are true classes, columns predictions."""
    net.eval()
    counts = torch.zeros(classes * classes, dtype=torch.float64)
    batches = Batches(
        images,
        500 * dist.world,
        shuffle=False,
        drop_last=False,
        rank=dist.rank,
        world=dist.world,
        device=dist.device,
        hold=True,
    )
    for pixels, y in batches.epoch(0):
        if len(y):
            predicted = net(normalised(pixels, recipe, bits)).argmax(1)
            counts += torch.bincount(y.cpu() * classes + predicted.cpu(), minlength=classes * classes)
    return dist.sum(counts.to(dist.device) if dist.world > 1 else counts).cpu().view(classes, classes)


def optimizer_of(net: nn.Module, cfg: DictConfig, epochs: int, steps: int) -> tuple:
    """(optimiser, scheduler, whether the scheduler steps after every batch)."""
    if cfg.classification.optimizer_name == "adam":
        adam = cfg.classification.adam
        optimizer = torch.optim.Adam(net.parameters(), lr=adam.lr)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(adam.steps), adam.steps_decay)
        return optimizer, scheduler, False
    sgd = cfg.classification.sgd
    start = sgd.max_lr / 25  # where the one cycle starts
    optimizer = torch.optim.SGD(net.parameters(), lr=start, momentum=sgd.momentum, weight_decay=sgd.weight_decay)
    return (
        optimizer,
        torch.optim.lr_scheduler.OneCycleLR(optimizer, sgd.max_lr, epochs=epochs, steps_per_epoch=steps),
        True,
    )


def train_cnn(
    model: ConditionalFlow | None,
    cfg: DictConfig,
    real: Images,
    test: Images,
    temperature: float,
    dist: Distributed,
    folder: Path,
) -> float:
    """Train a ResNet by the configured strategy at `temperature`; returns its accuracy on the real test images."""
    info, options = cfg.dataset_info[cfg.dataset_name], cfg.classification[cfg.dataset_name]
    if info.cnn not in CNN_RECIPES:
        raise UserError(f"dataset_info.{cfg.dataset_name}.cnn={info.cnn}: expected one of {', '.join(CNN_RECIPES)}")
    recipe, bits = CNN_RECIPES[info.cnn], cfg.bits if cfg.do_k_bits_posterize_transform else None
    if options.imgs_per_class:
        rng = torch.Generator().manual_seed(cfg.seed)
        real = real.subset(items_per_class(real.targets, options.imgs_per_class, rng))
    strategy, epochs = cfg.classifier_nf_strategy, options.epochs
    folder = folder / f"0_exp_0_T{temperature:.1f}"
    torch.manual_seed(cfg.seed)
    net = resnet(cfg.classification.resnet_version, info.ch, info.num_classes, cfg.classification.stem)
    facts = {
        "temperature": temperature,
        "strategy": strategy,
        "dataset": cfg.dataset_name,
        "resnet": cfg.classification.resnet_version,
    }
    with Run(folder / strategy, facts, overwrite=True, wandb=cfg.wandb or None, enabled=dist.is_main) as run:
        if cfg.cnn_load_path:
            load_into(net, load_weights(cfg.cnn_load_path)[0], cfg.cnn_load_path)
            net = net.to(dist.device)
        else:
            images = training_set(model, cfg, real, temperature, 0, dist, folder)
            run.info(f"{len(images)} training images, {len(test)} real test images")
            parallel = dist.wrap(net)
            batches = None
            for epoch in range(epochs):
                if epoch and strategy.endswith("resample"):
                    images = training_set(model, cfg, real, temperature, epoch, dist, folder)
                batches = Batches(
                    images,
                    options.batch_size,
                    seed=cfg.seed,
                    drop_last=bool(cfg.classification.drop_last),
                    rank=dist.rank,
                    world=dist.world,
                    device=dist.device,
                    hold=True,
                )
                if epoch == 0:
                    optimizer, scheduler, every_batch = optimizer_of(net, cfg, epochs, len(batches))
                net.train()
                total, correct, seen = 0.0, 0, 0
                for index, (pixels, y) in enumerate(run.progress(batches.epoch(epoch), len(batches), f"cnn {epoch}")):
                    rng = generator(cfg.seed, Use.CNN, epoch, index, dist.rank, device=dist.device)
                    pixels = augment.shift_and_flip(pixels, recipe.crop_pad, recipe.flip, recipe.vertical, rng)
                    logits = parallel(normalised(pixels, recipe, bits))
                    loss = F.cross_entropy(logits, y)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    value = check_finite(loss, index, net)
                    optimizer.step()
                    if every_batch:
                        scheduler.step()
                    total, seen = total + value * len(y), seen + len(y)
                    correct += int((logits.argmax(1) == y).sum())
                if not every_batch:
                    scheduler.step()
                matrix = confusion_matrix(net, test, info.num_classes, recipe, bits, dist)
                accuracy = float(matrix.trace() / matrix.sum())
                run.log(epoch, epoch=epoch, train_loss=total / seen, train_acc=correct / seen, test_acc=accuracy)
                run.info(f"cnn epoch {epoch}: train loss {total / seen:.4f}, test accuracy {accuracy:.4f}")
        matrix = confusion_matrix(net, test, info.num_classes, recipe, bits, dist)
        accuracy = float(matrix.trace() / matrix.sum())
        if dist.is_main:
            picture = pictures.confusion(matrix, test.classes)
            save_image(run.folder / "confusion.png", picture)
            run.image("confusion_matrix_cnn", picture, epochs)
            if not cfg.cnn_load_path:
                save_weights(run.folder / "cnn.safetensors", net.state_dict(), {**facts, "test_acc": accuracy})
    return accuracy
