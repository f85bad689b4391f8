"""The class Gaussians in training: from the untrained flow's latents, by the fixed point iteration, by gradients."""

import csv
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import atomic_write
from common.errors import UserError
from common.launch import Distributed
from common.training import Training
from nfpi import glem, pictures
from nfpi.conditional import ConditionalFlow
from nfpi.config import Config
from nfpi.data import Stream
from nfpi.fpi import FixedPoint, solve
from nfpi.gaussians import ClassGaussians, ClassMoments, double, kl_matrix, off_diagonal

AT_ONCE = 1000  # images in a pass: bounds the memory, changes no number


def gaussians_move(config: Config, epoch: int) -> bool:
    """Whether the Gaussians are fitted at the end of `epoch`: n = merge_datasets_after - center_warmup_epochs times."""
    gmm, first = config.val.gmm, config.train.center_warmup_epochs
    due = first <= epoch < config.merged_from and (epoch - first) % gmm.every_n_epochs == 0
    return due and gmm.gaussian_method_name.startswith("one_per_class")


def fpi_settings(config: Config, epoch: int) -> FixedPoint:
    """The fixed point iteration at the end of `epoch`."""
    info = config.val.gmm.fpi_info
    return FixedPoint(
        strength=0.0 if config.val.gmm.training_algorithm == "fpi_nf" else info.lambda_fpi_mu,
        means=info.interval_mu[0] <= epoch <= info.interval_mu[1],
        variances=info.interval_sigma[0] <= epoch <= info.interval_sigma[1],
        isotropic=info.use_isotropic_variance_when_training_mean,
        sum_trick=info.sum_mu_diffs_arr_square,
        exp_den_update=info.exp_den_update,
        alpha=info.pw_kld_factors_scale,
        variance_update=info.variance_update,
        damping=info.damping,
        max_iters=info.max_iters,
        epsilon=info.epsilon_convergence,
    )


def reparametrisation(config: Config) -> glem.SigmoidVariance | glem.FreeVariance:
    """How `glem` keeps variances positive; its initial variance is the Gaussians' start."""
    method = config.val.gmm.reparam_method
    if config.val.gmm.reparam_name == "sigmoid":
        return glem.SigmoidVariance(**method.sigmoid.as_dict())
    return glem.FreeVariance(eps=method.no_reparam.eps, initial=method.no_reparam.init_value)


@torch.no_grad()
def latents(model: ConditionalFlow, stream: Stream, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(z, y, negative log-likelihood) of the images on which the Gaussians are fitted, with training transforms."""
    for x, y, noise, _ in stream.epoch(epoch):
        for part in torch.arange(len(x), device=x.device).split(AT_ONCE):
            nll, z = model.nll(x[part], y[part], noise[part])
            yield z, y[part], nll


def class_statistics(model: ConditionalFlow, stream: Stream, dist: Distributed, epoch: int) -> tuple[Tensor, Tensor]:
    """Class means and unbiased variances (K, d) of the latents, over all processes; the latents are not kept."""
    moments = ClassMoments.empty(model.classes, model.flow.config.latent_dim, dist.device)
    for z, y, _ in latents(model, stream, epoch):
        moments = moments.merge(ClassMoments.of(z, y, model.classes))
    parts = [dist.gather(t[None].contiguous()) for t in (moments.count, moments.mean, moments.square)]
    total = ClassMoments(*(part[0] for part in parts))
    for rank in range(1, dist.world):
        total = total.merge(ClassMoments(*(part[rank] for part in parts)))
    return total.statistics()


def place_initially(model: ConditionalFlow, stream: Stream, config: Config, training: Training) -> None:
    """Place the Gaussians before training: from a file, or at the class statistics of the untrained flow's latents."""
    gmm, gaussians = config.val.gmm, model.gaussians
    if config.gaussians_load_path:
        other = ConditionalFlow.load(config.gaussians_load_path).gaussians
        if other.mean.shape != gaussians.mean.shape:
            raise UserError(
                f"{config.gaussians_load_path} has Gaussians {tuple(other.mean.shape)}, this model "
                f"{tuple(gaussians.mean.shape)}"
            )
        gaussians.set(other.mean, other.var)
    elif gmm.training_algorithm != "glem" and not gaussians.shared:
        mean, var = class_statistics(model, stream, training.dist, epoch=0)
        if gmm.fpi_info.identity_diag:
            var = torch.full_like(var, gmm.reparam_method.sigmoid.a)
        gaussians.set(mean, var)
    if not gaussians.shared:
        training.run.info(f"initial Gaussians: {kl_text(kl_statistics(gaussians))}")


def kl_statistics(gaussians: ClassGaussians) -> dict[str, float]:
    """Smallest, mean and largest pairwise KL divergence of the class Gaussians; nothing for a single class."""
    if len(gaussians.mean) < 2:
        return {}
    pairs = off_diagonal(kl_matrix(gaussians.mean, gaussians.var))
    return {"kl_min": float(pairs.min()), "kl_mean": float(pairs.mean()), "kl_max": float(pairs.max())}


def kl_text(statistics: dict[str, float]) -> str:
    """One line of `kl_statistics`."""
    return "pairwise KL " + ", ".join(f"{name.removeprefix('kl_')} {value:.4g}" for name, value in statistics.items())


def fit_by_fixed_point(model: ConditionalFlow, stream: Stream, config: Config, training: Training) -> None:
    """The fixed point iteration on the latents at the end of the epoch; every process computes the same one."""
    run, epoch, settings = training.run, training.epoch, fpi_settings(config, training.epoch)
    if not (settings.means or settings.variances):
        return
    if not settings.bounded(model.classes):
        run.info(
            f"note: with variance_update=exact the objective is unbounded above for lambda > K/(2c) "
            f"({settings.strength:g} given): variances may diverge; the last valid iterate is kept"
        )
    before = kl_statistics(model.gaussians)
    with model.evaluating():  # the stream's epoch 0 gave the initial statistics
        mean, var = class_statistics(model, stream, training.dist, epoch + 1)
    result = solve(mean, var, model.gaussians.mean, model.gaussians.var, settings)
    model.gaussians.set(result.mean, result.var)
    ending = "converged" if result.converged else "not converged"
    if result.non_finite:
        ending = "stopped at the last valid iterate (the next one is not finite)"
    after = kl_statistics(model.gaussians)
    run.info(f"fixed point iteration: {ending} after {result.iterations} iterations")
    run.info(f"  before: {kl_text(before)}; after: {kl_text(after)}")
    figures = {"fpi_iterations": result.iterations, "fpi_converged": int(result.converged)}
    run.log(training.step, epoch=epoch, **figures, **after)
    if training.dist.is_main and result.history:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["iteration", *result.history[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"iteration": i, **row} for i, row in enumerate(result.history))
        with atomic_write(run.folder / f"fpi_epoch{epoch:04d}.csv") as file:
            file.write(text.getvalue().encode())
        shown = {f"fpi_epoch{epoch:04d}": pictures.fpi_curves(result.history), **pictures.sorted_kl(model.gaussians)}
        pictures.write_all(run, shown, training.step)


class GlemMoments:
    """Adam's moments of the gradient baseline, for means and for variances."""

    def __init__(self, config: Config):
        betas = config.val.gmm.adam_beta1, config.val.gmm.adam_beta2
        self.pair = glem.GaussianAdam(*betas), glem.GaussianAdam(*betas)

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain tensors for a checkpoint."""
        return [moments.state() for moments in self.pair]

    def load_state_dict(self, state: list[Mapping[str, Any]]) -> None:
        """Take over what `state_dict` gave."""
        try:
            for moments, saved in zip(self.pair, state, strict=True):
                moments.load(saved)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the gradient baseline's state is damaged ({type(error).__name__})") from error


def glem_step(config: Config, epoch: int, nll_range: float, kl_range: float) -> glem.GlemStep:
    """Step sizes and weights of the gradient baseline at the end of `epoch`."""
    gmm = config.val.gmm

    def at(values: str, steps: str, kind: str) -> float:
        knots = list(getattr(gmm, values))
        if values.startswith("lambda_kld"):
            knots[0] = gmm.kld
        return glem.at(glem.schedule(getattr(gmm, steps), knots, getattr(gmm, kind)), epoch)

    return glem.GlemStep(
        lr_mean=at("mu_lr_arr", "mu_lr_steps_arr", "manual_sched_lr_mu"),
        lr_var=at("sigma_lr_arr", "sigma_lr_steps_arr", "manual_sched_lr_sigma"),
        weight_nll_mean=at("lambda_nf_mu_arr", "lambda_nf_mu_steps", "manual_sched_lambda_nf_mu"),
        weight_nll_var=at("lambda_nf_sigma_arr", "lambda_nf_sigma_steps", "manual_sched_lambda_nf_sigma"),
        weight_kl_mean=at("lambda_kld_mu_arr", "lambda_kld_mu_steps", "manual_sched_lambda_kld_mu"),
        weight_kl_var=at("lambda_kld_sigma_arr", "lambda_kld_sigma_steps", "manual_sched_lambda_kld_sigma"),
        nll_range=nll_range,
        kl_range=kl_range,
        blank_mean=gmm.kld_blank_mu,
        blank_var=gmm.kld_blank_sigma,
    )


def fit_by_gradients(
    model: ConditionalFlow, stream: Stream, config: Config, training: Training, moments: GlemMoments
) -> None:
    """The gradient baseline at the end of the epoch: `n_loops` updates of all Gaussians."""
    gmm, gaussians, epoch, dist = config.val.gmm, model.gaussians, training.epoch, training.dist
    with model.evaluating():
        for loop in range(gmm.n_loops):
            mean, var = double(gaussians.mean), double(gaussians.var)
            gradients = torch.zeros_like(mean), torch.zeros_like(var)
            lowest, highest, total = math.inf, -math.inf, 0
            for z, y, nll in latents(model, stream, epoch + 1 + loop):
                for k in y.unique().tolist():
                    parts = glem.nll_gradients(double(z[y == k]), mean[k], var[k])
                    for sums, part in zip(gradients, parts, strict=True):
                        sums[k] += part
                lowest, highest, total = min(lowest, float(nll.min())), max(highest, float(nll.max())), total + len(y)
            gradients = tuple(dist.sum(part) for part in gradients)
            extremes = dist.gather(double(torch.tensor([[lowest, highest]], device=dist.device)))
            total = float(dist.sum(float(total)))
            low, high = glem.widened_range(torch.stack([extremes[:, 0].min(), extremes[:, 1].max()]), total)
            separation = glem.class_separation(kl_matrix(mean, var))
            kl_low, kl_high = glem.widened_range(separation, model.classes * mean.shape[1])
            step = glem_step(config, epoch, max(high - low, 1e-12), max(kl_high - kl_low, 1e-12))
            adam = moments.pair if gmm.use_adam_for_gradients else (None, None)
            kl_gradients = glem.kl_gradients(mean, var)
            gaussians.set(*glem.update(mean, var, gradients, kl_gradients, *adam, reparametrisation(config), step))
            if epoch == config.train.center_warmup_epochs and loop == 0 and gmm.reset_adam_after_first_iteration:
                for one in moments.pair:
                    one.reset()
    figures = {"glem_lr_mean": step.lr_mean, "glem_lr_var": step.lr_var, "glem_lambda_kl": step.weight_kl_mean,
               "glem_nll_range": step.nll_range, "glem_kl_range": step.kl_range}  # fmt: skip
    training.run.log(training.step, epoch=epoch, **figures, **kl_statistics(gaussians))
