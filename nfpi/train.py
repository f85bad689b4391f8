"""Training of the conditional flow (Enescu & Sahbi, BMVC 2024): maximum likelihood with one fixed Gaussian a class.

Called by main.py. `train_flow` is the whole procedure, top to bottom: data-dependent initialisation, class Gaussians
from the latents of the untrained flow, epochs of Adamax, the fixed point iteration at the end of epoch 0, then frozen
Gaussians and a moving average of the weights.

Written below the run's folder: config.json, metrics.csv, tb/, log.txt, fpi_epoch<e>.csv (one row an iteration),
pictures/, checkpoints/state_epoch<e>.pt (the full state; the newest is kept) and checkpoints/flow.safetensors (+ .json:
the weights for inference). Every random number is a function of (seed, use, epoch, batch): an interrupted run resumes
exactly, and one process and several draw the same numbers.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from common.batches import Batches
from common.checkpoint import atomic_write, load_into, load_weights, prune, save_state
from common.errors import UserError
from common.launch import Distributed, StopSignal, check_finite
from common.run import Run
from nfpi import augment, glem, pictures
from nfpi.conditional import STATE_KIND, ConditionalFlow, marginal_nll
from nfpi.data import Images, Use, generator
from nfpi.ema import PowerEma
from nfpi.fpi import FixedPoint, solve
from nfpi.gaussians import (
    ClassGaussians,
    ClassMoments,
    bits_per_dim,
    double,
    kl_matrix,
    negative_log_likelihood,
    off_diagonal,
    top_k_correct,
)
from nfpi.label_encoder import DistancedPixels
from nfpi.model import FlowConfig, MultiScaleFlow

PER_CLASS = ("one_per_class_all_in_center", "one_per_class_gaussian_checkpoint")
SHARED = ("one", "one_conditioned_on_images")
ALGORITHMS = ("fpi_nf_kld", "fpi_nf", "glem")
OPTIMIZERS = {"adamax": torch.optim.Adamax, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


# ---------------------------------------------------------------- pieces made from the configuration


def flow_config(cfg: DictConfig) -> FlowConfig:
    """The architecture that the configuration describes. Raises UserError for lists that do not fit `num_levels`."""
    info = cfg.dataset_info[cfg.dataset_name]
    for name in ("num_flows", "num_blocks", "hidden_channels"):
        if len(cfg[name]) < cfg.num_levels:
            raise UserError(f"{name} has {len(cfg[name])} entries for num_levels={cfg.num_levels}")
    if cfg.level_method.spcb != "ZeroConv2d":
        raise UserError(f"level_method.spcb={cfg.level_method.spcb}: only ZeroConv2d exists")
    levels = slice(0, cfg.num_levels)
    rows = cfg.label_encoder.pxh if cfg.val.gmm.gaussian_method_name == "one_conditioned_on_images" else 0
    return FlowConfig(
        channels=info.ch,
        height=info.h + rows,
        width=info.w,
        flows=cfg.num_flows[levels],
        blocks=cfg.num_blocks[levels],
        hidden=cfg.hidden_channels[levels],
        conv_type=cfg.conv_type,
        flow_type=cfg.flow_type,
        attention=bool(cfg.use_attention_after),
        level_method=cfg.level_method.choice,
        level_idx=cfg.level_method.level_idx,
        activation_checkpointing=bool(cfg.activation_checkpointing),
    )


def new_model(cfg: DictConfig) -> ConditionalFlow:
    """The untrained model: random rotations and kaiming weights by `seed`, Gaussians at the centre."""
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    dtype = torch.float64 if str(cfg.trainer_precision) == "64" else torch.float32
    config, gmm, info = flow_config(cfg), cfg.val.gmm, cfg.dataset_info[cfg.dataset_name]
    flow, name = MultiScaleFlow(config).to(dtype), gmm.gaussian_method_name
    shape = (info.num_classes, config.latent_dim)
    variance = 1.0 if name in SHARED else reparametrisation(cfg).initial
    gaussians = ClassGaussians(
        torch.zeros(shape, dtype=dtype), torch.full(shape, variance, dtype=dtype), name in SHARED
    )
    codes = None
    if name == "one_conditioned_on_images":
        label = cfg.label_encoder
        codes = DistancedPixels.make(
            info.num_classes, info.ch, label.pxh, info.w, label.iters, generator(cfg.seed, Use.CODES)
        )
    return ConditionalFlow(flow, gaussians, cfg.bits, codes)


def fpi_settings(cfg: DictConfig, epoch: int) -> FixedPoint:
    """The fixed point iteration at the end of `epoch`."""
    info = cfg.val.gmm.fpi_info
    strength = 0.0 if cfg.val.gmm.training_algorithm == "fpi_nf" else float(info.lambda_fpi_mu)
    return FixedPoint(
        strength=strength,
        means=info.interval_mu[0] <= epoch <= info.interval_mu[1],
        variances=info.interval_sigma[0] <= epoch <= info.interval_sigma[1],
        isotropic=bool(info.use_isotropic_variance_when_training_mean),
        sum_trick=bool(info.sum_mu_diffs_arr_square),
        exp_den_update=bool(info.exp_den_update),
        alpha=float(info.pw_kld_factors_scale),
        variance_update=info.variance_update,
        damping=float(info.damping),
        max_iters=info.max_iters,
        epsilon=float(info.epsilon_convergence),
    )


def reparametrisation(cfg: DictConfig) -> glem.SigmoidVariance | glem.FreeVariance:
    """How `glem` keeps variances positive; its initial variance is the Gaussians' start."""
    method = cfg.val.gmm.reparam_method
    if cfg.val.gmm.reparam_name == "sigmoid":
        return glem.SigmoidVariance(**method.sigmoid)
    return glem.FreeVariance(eps=method.no_reparam.eps, initial=method.no_reparam.init_value)


def adamax(parameters: Iterable[nn.Parameter], lr: float, name: str = "adamax") -> torch.optim.Optimizer:
    """The optimiser, with PyTorch's default betas and epsilon. Raises UserError for an unknown name."""
    if name not in OPTIMIZERS:
        raise UserError(f"train.optimizer={name}: expected one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name](parameters, lr=lr)


def warmup_lr(step: int, lr: float, warmup_steps: int) -> float:
    """Linear warm-up: min((step + 1) / warmup_steps, 1) lr."""
    return min((step + 1) / warmup_steps, 1.0) * lr if warmup_steps > 0 else lr


def learning_rate(cfg: DictConfig, step: int, epoch: int) -> float:
    """Warm-up over global steps, then a factor `lr_decay` from every epoch in `step_size` on."""
    decays = sum(epoch >= milestone for milestone in cfg.train.step_size)
    return warmup_lr(step, cfg.train.lr * cfg.train.lr_decay**decays, cfg.train.warmup_steps)


def gaussians_move(cfg: DictConfig, epoch: int) -> bool:
    """Whether the Gaussians are fitted at the end of `epoch`: n = merge_datasets_after - center_warmup_epochs times."""
    gmm, first = cfg.val.gmm, max(cfg.train.center_warmup_epochs, 0)
    due = (epoch - first) % gmm.every_n_epochs == 0
    return gmm.gaussian_method_name in PER_CLASS and first <= epoch < merged_from(cfg) and due


def picture_epoch(cfg: DictConfig, epoch: int) -> bool:
    """Whether pictures and the training accuracy are due at the end of `epoch`."""
    every = cfg.save_every_n_epochs
    return bool(every) and epoch >= cfg.save_start_epoch and (epoch + 1) % every == 0


def merged_from(cfg: DictConfig) -> int:
    """The epoch from which the Gaussians are frozen and the average runs; at least one after the centre warm-up."""
    return max(cfg.val.gmm.merge_datasets_after, max(cfg.train.center_warmup_epochs, 0) + 1)


# ---------------------------------------------------------------- batches


def own_rows(count: int, dist: Distributed) -> tuple[int, int]:
    """The rows of a batch of `count` images that this process works on, as `Batches` deals them out."""
    parts = np.array_split(np.arange(count), dist.world)
    start = sum(len(part) for part in parts[: dist.rank])
    return start, start + len(parts[dist.rank])


def batch_sizes(total: int, batch_size: int) -> list[int]:
    """Sizes of the batches of an epoch, the partial one included."""
    return [min(batch_size, total - start) for start in range(0, total, batch_size)]


def dequantised(
    model: ConditionalFlow, images: Tensor, count: int, start: int, noise: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(images in [0, 1] plus uniform noise up to `noise`, the dequantisation noise), drawn for the whole batch of
    `count` images, of which these are the rows from `start` on.
    """
    config, device = model.flow.config, images.device
    rows = slice(start, start + len(images))
    x = images.to(model.gaussians.mean.dtype) / 255
    if noise:
        x = x + noise * torch.rand((count, *images.shape[1:]), generator=rng, device=device)[rows].to(x)
    shape = (count, config.channels, config.height, config.width)
    return x, torch.rand(shape, generator=rng, device=device)[rows].to(x)


def training_batches(
    model: ConditionalFlow,
    images: Images,
    cfg: DictConfig,
    dist: Distributed,
    *,
    use: int,
    epoch: int,
    batch_size: int,
    shuffle: bool,
    begin: int = 0,
    recipe: augment.Recipe,
    noise: float,
) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """(batch index, images of all processes in the batch, x, y, dequantisation noise) with the training transforms.

    A last batch with fewer images than processes is left out.
    """
    batches = Batches(
        images,
        batch_size,
        seed=cfg.seed,
        shuffle=shuffle,
        drop_last=False,
        rank=dist.rank,
        world=dist.world,
        device=dist.device,
        hold=True,
    )
    sizes = batch_sizes(len(images), batch_size)
    for index, (pixels, y) in enumerate(batches.epoch(epoch, begin), start=begin):
        count = sizes[index]
        if count < dist.world:
            continue
        rng = generator(cfg.seed, use, epoch, index, device=dist.device)
        start, stop = own_rows(count, dist)
        draws = augment.Draws.make(recipe, count, rng).rows(start, stop)
        x, dequantise = dequantised(model, augment.for_training(pixels, recipe, draws), count, start, noise, rng)
        yield index, count, x, y, dequantise


def noise_of(cfg: DictConfig, test: bool = False) -> float:
    """The extra pixel noise of the data set: `uniform_noise_value` for recipes with noise, its test value at test."""
    if not augment.recipe(cfg.dataset_info[cfg.dataset_name].augmentation).noise:
        return 0.0
    if test and cfg.test.uniform_noise_value is not None:
        return float(cfg.test.uniform_noise_value)
    return float(cfg.uniform_noise_value)


# ---------------------------------------------------------------- the Gaussians


@torch.no_grad()
def latents(
    model: ConditionalFlow, images: Images, cfg: DictConfig, dist: Distributed, epoch: int, per_sample_nll: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(z, y, negative log-likelihood) of the images on which the Gaussians are estimated, with training transforms."""
    recipe = augment.recipe(cfg.dataset_info[cfg.dataset_name].augmentation)
    stream = training_batches(
        model,
        images,
        cfg,
        dist,
        use=Use.LATENTS,
        epoch=epoch,
        batch_size=dist.world * max(1, cfg.val.batch_size // dist.world),
        shuffle=False,
        recipe=recipe,
        noise=noise_of(cfg),
    )
    for _, _, x, y, noise in stream:
        for part in torch.arange(len(x), device=x.device).split(1000):  # bounds the memory, changes no number
            nll, z = model.nll(x[part], y[part], noise[part])
            yield z, y[part], nll


def class_statistics(
    model: ConditionalFlow, images: Images, cfg: DictConfig, dist: Distributed, epoch: int
) -> tuple[Tensor, Tensor]:
    """Class means and unbiased variances (K, d) of the latents, over all processes; the latents are not kept."""
    moments = ClassMoments.empty(model.classes, model.flow.config.latent_dim, dist.device)
    for z, y, _ in latents(model, images, cfg, dist, epoch):
        moments = moments.merge(ClassMoments.of(z, y, model.classes))
    parts = [dist.gather(t[None].contiguous()) for t in (moments.count, moments.mean, moments.square)]
    total = ClassMoments(*(part[0] for part in parts))
    for rank in range(1, dist.world):
        total = total.merge(ClassMoments(*(part[rank] for part in parts)))
    return total.statistics()


def initial_gaussians(model: ConditionalFlow, images: Images, cfg: DictConfig, dist: Distributed, run: Run) -> None:
    """Place the Gaussians before training: from a file, or at the class statistics of the untrained flow's latents."""
    gmm = cfg.val.gmm
    if cfg.gaussians_load_path:
        other = ConditionalFlow.load(cfg.gaussians_load_path).gaussians
        if other.mean.shape != model.gaussians.mean.shape:
            raise UserError(
                f"{cfg.gaussians_load_path} has Gaussians {tuple(other.mean.shape)}, this model "
                f"{tuple(model.gaussians.mean.shape)}"
            )
        model.gaussians.set(other.mean, other.var)
    elif gmm.gaussian_method_name == "one_per_class_gaussian_checkpoint":
        raise UserError("gaussian_method_name=one_per_class_gaussian_checkpoint needs gaussians_load_path=FILE")
    elif "fpi" in gmm.training_algorithm and gmm.gaussian_method_name in PER_CLASS:
        mean, var = class_statistics(model, images, cfg, dist, epoch=0)
        if gmm.fpi_info.identity_diag:
            var = torch.full_like(var, float(gmm.reparam_method.sigmoid.a))
        model.gaussians.set(mean, var)
    if not model.gaussians.shared:
        run.info(f"initial Gaussians: {kl_text(kl_statistics(model.gaussians))}")


def kl_statistics(gaussians: ClassGaussians) -> dict[str, float]:
    """Smallest, mean and largest pairwise KL divergence of the class Gaussians."""
    pairs = off_diagonal(kl_matrix(gaussians.mean, gaussians.var))
    return {"kl_min": float(pairs.min()), "kl_mean": float(pairs.mean()), "kl_max": float(pairs.max())}


def kl_text(statistics: dict[str, float]) -> str:
    """One line of `kl_statistics`."""
    return "pairwise KL min {kl_min:.4g}, mean {kl_mean:.4g}, max {kl_max:.4g}".format(**statistics)


def run_fpi(
    model: ConditionalFlow, images: Images, cfg: DictConfig, dist: Distributed, run: Run, epoch: int, step: int
) -> None:
    """The fixed point iteration on the latents at the end of `epoch`; every process computes the same one."""
    settings = fpi_settings(cfg, epoch)
    if not (settings.means or settings.variances):
        return
    if not settings.bounded(model.classes):
        run.info(
            f"note: with variance_update=exact the objective is unbounded above for lambda > K/(2c) "
            f"({settings.strength:g} given): variances may diverge; the last valid iterate is kept"
        )
    before = kl_statistics(model.gaussians)
    with model.evaluating():
        mean, var = class_statistics(model, images, cfg, dist, epoch + 1)  # epoch 0 is the initial statistics' stream
    result = solve(mean, var, model.gaussians.mean, model.gaussians.var, settings)
    model.gaussians.set(result.mean, result.var)
    ending = "converged" if result.converged else "not converged"
    if result.non_finite:
        ending = "stopped at the last valid iterate (the next one is not finite)"
    after = kl_statistics(model.gaussians)
    run.info(f"fixed point iteration: {ending} after {result.iterations} iterations")
    run.info(f"  before: {kl_text(before)}; after: {kl_text(after)}")
    run.log(step, epoch=epoch, fpi_iterations=result.iterations, fpi_converged=int(result.converged), **after)
    if dist.is_main and result.history:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["iteration", *result.history[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"iteration": i, **row} for i, row in enumerate(result.history))
        with atomic_write(run.folder / f"fpi_epoch{epoch:04d}.csv") as file:
            file.write(text.getvalue().encode())
        pictures.show(run, f"fpi_epoch{epoch:04d}", pictures.fpi_curves(result.history), step)
        for name, picture in pictures.sorted_kl(model.gaussians).items():
            pictures.show(run, name, picture, step)


def glem_state(cfg: DictConfig) -> tuple[glem.GaussianAdam, glem.GaussianAdam]:
    """Moments of the gradient baseline for means and variances."""
    betas = (cfg.val.gmm.adam_beta1, cfg.val.gmm.adam_beta2)
    return glem.GaussianAdam(*betas), glem.GaussianAdam(*betas)


def run_glem(
    model: ConditionalFlow,
    images: Images,
    cfg: DictConfig,
    dist: Distributed,
    run: Run,
    epoch: int,
    step: int,
    adam: tuple[glem.GaussianAdam, glem.GaussianAdam],
) -> None:
    """The gradient baseline at the end of `epoch`: `n_loops` updates of all Gaussians from the latents' likelihood."""
    gmm, gaussians, reparam = cfg.val.gmm, model.gaussians, reparametrisation(cfg)

    def value(steps: str, values: str, kind: str) -> float:
        knots = list(gmm[values])
        if values.startswith("lambda_kld"):
            knots[0] = gmm.kld
        return glem.at(glem.schedule(list(gmm[steps]), knots, gmm[kind]), epoch)

    for loop in range(gmm.n_loops):
        mean, var = double(gaussians.mean), double(gaussians.var)
        grad_mean, grad_var = torch.zeros_like(mean), torch.zeros_like(var)
        lowest, highest, total = math.inf, -math.inf, 0
        for z, y, nll in latents(model, images, cfg, dist, epoch + 1 + loop):
            for k in y.unique().tolist():
                pair = glem.nll_gradients(double(z[y == k]), mean[k], var[k])
                grad_mean[k] += pair[0]
                grad_var[k] += pair[1]
            lowest, highest, total = min(lowest, float(nll.min())), max(highest, float(nll.max())), total + len(y)
        grad_mean, grad_var = dist.sum(grad_mean), dist.sum(grad_var)
        extremes = dist.gather(double(torch.tensor([[lowest, highest]], device=dist.device)))
        total = float(dist.sum(float(total)))
        low, high = glem.widened_range(torch.stack([extremes[:, 0].min(), extremes[:, 1].max()]), total)
        separation = glem.class_separation(kl_matrix(mean, var))
        kl_low, kl_high = glem.widened_range(separation, model.classes * mean.shape[1])
        settings = glem.GlemStep(
            lr_mean=value("mu_lr_steps_arr", "mu_lr_arr", "manual_sched_lr_mu"),
            lr_var=value("sigma_lr_steps_arr", "sigma_lr_arr", "manual_sched_lr_sigma"),
            weight_nll_mean=value("lambda_nf_mu_steps", "lambda_nf_mu_arr", "manual_sched_lambda_nf_mu"),
            weight_nll_var=value("lambda_nf_sigma_steps", "lambda_nf_sigma_arr", "manual_sched_lambda_nf_sigma"),
            weight_kl_mean=value("lambda_kld_mu_steps", "lambda_kld_mu_arr", "manual_sched_lambda_kld_mu"),
            weight_kl_var=value("lambda_kld_sigma_steps", "lambda_kld_sigma_arr", "manual_sched_lambda_kld_sigma"),
            nll_range=max(high - low, 1e-12),
            kl_range=max(kl_high - kl_low, 1e-12),
            blank_mean=bool(gmm.kld_blank_mu),
            blank_var=bool(gmm.kld_blank_sigma),
        )
        used = adam if gmm.use_adam_for_gradients else (None, None)
        pair = glem.update(mean, var, (grad_mean, grad_var), glem.kl_gradients(mean, var), *used, reparam, settings)
        gaussians.set(*pair)
        if epoch == max(cfg.train.center_warmup_epochs, 0) and loop == 0 and gmm.reset_adam_after_first_iteration:
            for moments in adam:
                moments.reset()
    run.log(
        step,
        epoch=epoch,
        glem_lr_mean=settings.lr_mean,
        glem_lr_var=settings.lr_var,
        glem_lambda_kl=settings.weight_kl_mean,
        glem_nll_range=settings.nll_range,
        glem_kl_range=settings.kl_range,
        **kl_statistics(gaussians),
    )


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(
    model: ConditionalFlow, images: Images, cfg: DictConfig, dist: Distributed, repeat: int = 0
) -> dict[str, float]:
    """Test set figures: `bpd` = -log2 p(x | y)/D of the true class, `bpd_marginal` = -log2 p(x)/D under a uniform class
    prior, `acc` and `top5` of Bayes' rule. One draw of dequantisation noise, another for every `repeat`.

    Without classes in the model (`one`): `bpd` only.
    """
    recipe = augment.recipe(cfg.dataset_info[cfg.dataset_name].augmentation)
    batch_size = dist.world * max(1, cfg.test.batch_size // dist.world)
    batches = Batches(
        images,
        batch_size,
        shuffle=False,
        drop_last=False,
        rank=dist.rank,
        world=dist.world,
        device=dist.device,
        hold=True,
    )
    totals = torch.zeros(5, dtype=torch.float64)  # images, nats given the class, nats, correct, in the top five
    with model.evaluating():
        sizes = batch_sizes(len(images), batch_size)
        for index, (pixels, y) in enumerate(batches.epoch(0)):
            if not len(y):
                continue
            rng = generator(cfg.seed, Use.TEST, repeat, index, device=dist.device)
            start, _ = own_rows(sizes[index], dist)
            x, noise = dequantised(
                model, augment.for_test(pixels, recipe), sizes[index], start, noise_of(cfg, test=True), rng
            )
            if model.knows_classes:
                scores, labels = model.scores(x, noise).cpu(), y.cpu()
                own = scores.gather(1, labels[:, None])[:, 0]
                figures = (
                    -own,
                    marginal_nll(scores),
                    top_k_correct(scores, labels, 1),
                    top_k_correct(scores, labels, 5),
                )
            else:
                nll = model.nll(x, y, noise)[0].cpu()
                figures = (nll, nll, torch.zeros_like(nll), torch.zeros_like(nll))
            totals += torch.stack([torch.tensor(len(y), dtype=torch.float64), *(f.double().sum() for f in figures)])
    totals = dist.sum(totals.to(dist.device) if dist.world > 1 else totals).cpu()
    means = totals[1:] / totals[0]
    bits = bits_per_dim(means[:2], model.dim).tolist()
    if not model.knows_classes:
        return {"bpd": bits[0]}
    return {"bpd": bits[0], "bpd_marginal": bits[1], "acc": float(means[2]), "top5": float(means[3])}


# ---------------------------------------------------------------- the procedure


def load_pretrained(flow: MultiScaleFlow, path: str, run: Run) -> None:
    """Put pre-trained weights into `flow`. Only attention blocks may be absent from the file; the log says so."""
    tensors, _ = load_weights(path)
    own = {k.removeprefix("flow."): v for k, v in tensors.items() if k.startswith("flow.")}
    absent = {k: v for k, v in flow.state_dict().items() if k not in own and "attention_block_after" in k}
    if absent:
        run.info(f"{path} has no attention blocks: they keep their identity initialisation")
    load_into(flow, {**own, **absent}, path)


def train_flow(
    cfg: DictConfig,
    train: Images,
    fit: Images,
    test: Images,
    dist: Distributed,
    run: Run,
    state: dict[str, Any] | None = None,
) -> Path | None:
    """Train the flow on `train`, its Gaussians on `fit`; figures on `test`. Returns the weights file.

    `state`: a saved training state to go on from. None when the run was stopped by a signal; its state is saved and
    `nf_ckpt_path` resumes it.
    """
    device, checkpoints = dist.device, run.folder / "checkpoints"
    recipe = augment.recipe(cfg.dataset_info[cfg.dataset_name].augmentation)
    model = new_model(cfg)
    flow, gaussians = model.flow.to(device), model.gaussians.to(device)
    optimizer = adamax(flow.parameters(), cfg.train.lr, cfg.train.optimizer)
    adam = glem_state(cfg)
    epoch, begin, step, sums = 0, 0, 0, [0.0] * 3  # sums: images, nats, correct ones of this epoch
    if state is not None:
        load_into(flow, state["flow"], cfg.nf_ckpt_path)
        gaussians.load_state_dict(state["gaussians"])
        optimizer.load_state_dict(state["optimizer"])
        for moments, saved in zip(adam, state["glem"], strict=True):
            moments.load(saved)
        epoch, begin, step, sums = state["epoch"], state["batch"], state["step"], list(state["sums"])
        if state["codes"] is not None:
            model.codes = DistancedPixels(state["codes"])
    else:
        init = train.subset(torch.arange(min(cfg.train.init_batch_size, len(train))))
        for _, _, x, y, noise in training_batches(
            model,
            init,
            cfg,
            Distributed(device),
            use=Use.INIT,
            epoch=0,
            batch_size=len(init),
            shuffle=False,
            recipe=recipe,
            noise=noise_of(cfg),
        ):
            flow.initialise(model.input(x, y, noise))
        if cfg.nf_weights_load_path:
            load_pretrained(flow, cfg.nf_weights_load_path, run)
        initial_gaussians(model, fit, cfg, dist, run)
    ema = None
    if cfg.train.ema_name:
        ema = PowerEma(flow, **cfg.train.ema).to(device)
        if state is not None and state["ema"] is not None:
            load_into(ema, state["ema"], cfg.nf_ckpt_path)
    if cfg.torch_compile:
        flow.compile(mode=cfg.torch_compile_mode)  # in place: names in the checkpoints stay
    parallel = dist.wrap(flow)
    run.info(f"{sum(p.numel() for p in flow.parameters()):,} parameters, D={model.dim}, d={flow.config.latent_dim}")

    def averaged() -> ConditionalFlow:
        shadow = ema.ema_model if ema is not None and ema.initialised else flow
        return ConditionalFlow(shadow, gaussians, model.bits, model.codes)

    def save(epoch: int, batch: int) -> Path:
        path = checkpoints / f"state_epoch{epoch:04d}.pt"
        if dist.is_main:
            save_state(
                path,
                STATE_KIND,
                flow=flow.state_dict(),
                gaussians=gaussians.state_dict(),
                optimizer=optimizer.state_dict(),
                ema=None if ema is None else ema.state_dict(),
                glem=[moments.state() for moments in adam],
                epoch=epoch,
                batch=batch,
                step=step,
                sums=sums,
                codes=None if model.codes is None else model.codes.codes,
                model_config={"flow": flow.config.as_dict(), "shared": gaussians.shared, "bits": model.bits},
                config=OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False),
            )
            prune(checkpoints, "state_epoch*.pt", keep=1)
        dist.barrier()
        return path

    with StopSignal() as stop:
        while epoch < cfg.train.epochs:
            flow.train()
            count_correct = picture_epoch(cfg, epoch) and not gaussians.shared
            stream = training_batches(
                model,
                train,
                cfg,
                dist,
                use=Use.TRAIN,
                epoch=epoch,
                batch_size=cfg.train.batch_size,
                shuffle=True,
                begin=begin,
                recipe=recipe,
                noise=noise_of(cfg),
            )
            total = len(batch_sizes(len(train), cfg.train.batch_size))
            for index, count, x, y, noise in run.progress(stream, total=total, desc=f"epoch {epoch}", initial=begin):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(cfg, step, epoch)
                latent = parallel(model.input(x, y, noise))
                nll = nats(model, latent, y)
                # processes may hold unequal shares of the last batch: the mean over processes is that of the batch
                loss = nll.sum() * dist.world / count
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                value = float(dist.mean(loss.detach())) if dist.world > 1 else loss
                value = check_finite(value, step, flow)
                optimizer.step()
                if ema is not None and epoch >= merged_from(cfg):
                    ema.update(flow)
                correct = (gaussians.logits(latent.z.detach()).argmax(1).to(y) == y).sum() if count_correct else 0
                sums = [sums[0] + count, sums[1] + value * count, sums[2] + float(dist.sum(float(correct)))]
                step += 1
                run.log(
                    step,
                    epoch=epoch,
                    loss=value,
                    bpd=float(bits_per_dim(torch.tensor(value), model.dim)),
                    lr=optimizer.param_groups[0]["lr"],
                )
                if dist.any(bool(stop)):
                    path = save(epoch, index + 1)
                    run.info(f"stopped by a signal; go on with train_nf=1 nf_ckpt_path={path}")
                    return None
            mean_loss = sums[1] / sums[0]
            figures = {"train_loss": mean_loss, "train_bpd": mean_loss / (model.dim * math.log(2))}
            if count_correct:
                figures["train_acc"] = sums[2] / sums[0]
            if gaussians_move(cfg, epoch):
                if cfg.val.gmm.training_algorithm == "glem":
                    with model.evaluating():
                        run_glem(model, fit, cfg, dist, run, epoch, step, adam)
                else:
                    run_fpi(model, fit, cfg, dist, run, epoch, step)
            if (epoch + 1) % cfg.test_every_n_epochs == 0 or epoch + 1 == cfg.train.epochs:
                figures |= {f"test_{k}": v for k, v in evaluate(averaged(), test, cfg, dist).items()}
            run.log(step, epoch=epoch, **figures)
            run.info(f"epoch {epoch}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
            last = epoch + 1 == cfg.train.epochs
            if dist.is_main and (picture_epoch(cfg, epoch) or (last and cfg.save_every_n_epochs)):
                draw_pictures(averaged(), cfg, run, step, temperatures=last and cfg.temperature_sampling_for_results)
            epoch, begin, sums = epoch + 1, 0, [0.0] * 3
            if epoch % cfg.save_model_ckpt_every_n_epochs == 0 or last:
                save(epoch, 0)
    target = checkpoints / "flow.safetensors"
    if dist.is_main:
        best = averaged()
        facts = {"dataset": cfg.dataset_name, "epochs": epoch, "averaged": best.flow is not flow}
        best.save(target, **facts)
    dist.barrier()
    return target


def nats(model: ConditionalFlow, latent: Any, y: Tensor) -> Tensor:
    """-log p(x | y) of a forward pass, (B,)."""
    log_prior = model.gaussians.log_prob(latent.z, y)
    return negative_log_likelihood(log_prior, latent.log_det, latent.log_p, model.dim, model.bits)


def draw_pictures(model: ConditionalFlow, cfg: DictConfig, run: Run, step: int, temperatures: bool) -> None:
    """Sample grids of the first ten classes, mean and variance curves, t-SNE of class samples; at the end a grid for
    every temperature 0.1 ... 1.0.
    """
    with model.evaluating():
        seed = (cfg.seed, Use.PICTURE, step)
        for name, picture in pictures.class_grids(model, cfg.T, generator(*seed, device=model.device)).items():
            pictures.show(run, name, picture, step)
        for i in range(10 if temperatures else 0):
            t = round(0.1 * (i + 1), 1)
            rng = generator(*seed, i, device=model.device)
            for name, picture in pictures.class_grids(model, t, rng).items():
                pictures.show(run, f"{name}_t{t}", picture, step)
    if not model.gaussians.shared:
        for name, picture in pictures.gaussian_curves(model.gaussians).items():
            pictures.show(run, name, picture, step)
        pictures.show(
            run, "tsne_latents", pictures.latent_tsne(model.gaussians, generator(*seed, device=model.device)), step
        )
