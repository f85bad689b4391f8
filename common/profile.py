r"""Where the time of a training step goes: networks and objective, optimiser, the next batch, and the rest of the loop.

    python -m common.profile lbae.mnist dataset=digits width=8 zsize=32 batch_size=64 epochs_max=2 device=cpu
    python -m common.profile latent_flow.train_vae_scratch --max-iter 1000 --max-steps 50 --out runs/profile

The published networks, a few steps (NFPI's with one flow step a level):

    python -m common.profile lbae.mnist train_images=6144 epochs_max=1 device=cpu exp=runs/profile/lbae
    python -m common.profile glancenet.main --alg GlanceNet --dset_name sprites --sprites_sizes 3 2 4 16 16 \
        --dset_dir . --encoder SimpleGaussianConv64 --decoder SimpleConv64 --z_dim 7 --include_labels 1 2 3 4 5 \
        --conditional_prior true --label_weight 100 --batch_size 64 --max_iter 20 --test_iter 1000 --file_save false \
        --log_dir runs/profile/logs --ckpt_dir runs/profile/checkpoints
    python -m common.profile latent_flow.train_vae_scratch --batch-size 16 --max-steps 12 --out runs/profile/latent_flow
    python -m common.profile inv_flow.inv_flow_mnist --epochs 1 --n_train 1200 --n_test 100 --out runs/profile/inv_flow
    python -m common.profile nfpi.main --config-path=___configs/mnist --config-name=mean_and_var "num_flows=[1,1,1]" \
        train.epochs=1 train.batch_size=16 dataset_info.items_per_class_train=20 dataset_info.items_per_class_val=2 \
        train_classifier=0 test_nf_alone=0 test_every_n_epochs=5 hydra.run.dir=runs/profile/nfpi

The words are a training's module and its own command line; the training runs to its end. Left out are the first steps
and those that end an epoch, whose evaluations are no part of a step. CPU seconds of the process; on a GPU the clock's,
with its queue drained at every mark.
"""

import importlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from common.cuda_graph import CudaGraph
from common.errors import UserError, run_command
from common.training import Training

FIRST = 3  # steps that are left out
PARTS = {"networks": "networks, objective, gradients", "optimiser": "optimiser", "batch": "the next batch",
         "rest": "the rest: record, checks, averages"}  # fmt: skip


def clock() -> float:
    """CPU seconds of the process, or the clock's on a GPU."""
    if not torch.cuda.is_initialized():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Profile:
    """While it is entered, every step of a `Training` is measured; `shares` sums up."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []
        self._now: Counter[str] = Counter()
        self._optimiser = 0.0

    def __enter__(self) -> "Profile":
        steps, call, profile = Training.steps, CudaGraph.__call__, self

        def measured(training: Training, *inputs: Any, **options: Any) -> Iterator[Any]:
            batches, asked = steps(training, *inputs, **options), clock()
            for batch in batches:
                began = clock()
                yield batch
                ended, asked_before = clock(), asked
                profile._now["batch"], asked = began - asked_before, ended
                profile._now["all"] = ended - asked_before
                if not training.epoch_ends:
                    profile.steps.append(profile._now)
                profile._now = Counter()

        def networks(graph: CudaGraph, *inputs: Any) -> Any:
            began = clock()
            found = call(graph, *inputs)
            profile._now["networks"] += clock() - began
            return found

        def before(*_: Any) -> None:
            profile._optimiser = clock()

        def after(*_: Any) -> None:
            profile._now["optimiser"] += clock() - profile._optimiser

        self._hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        self._originals = steps, call
        Training.steps, CudaGraph.__call__ = measured, networks
        return self

    def __exit__(self, *_: object) -> None:
        Training.steps, CudaGraph.__call__ = self._originals
        for hook in self._hooks:
            hook.remove()

    def shares(self) -> tuple[int, float, dict[str, float]]:
        """How many steps counted, their mean seconds, and the parts of that by name. Raises UserError for none."""
        counted = self.steps[FIRST:]
        if not counted:
            raise UserError(f"no step to measure: more than {FIRST} are needed in an epoch; give fewer images a step")
        total = sum(counted, Counter())
        parts = {name: total[name] / total["all"] for name in PARTS if name != "rest"}
        return len(counted), total["all"] / len(counted), parts | {"rest": 1 - sum(parts.values())}


def main(argv: list[str] | None = None) -> None:
    """Run a training's command, then print its shares."""
    module, *words = sys.argv[1:] if argv is None else argv or [""]
    if module in ("-h", "--help"):
        return print(__doc__)
    try:
        command = importlib.import_module(module.removesuffix(".py").replace("/", ".")).main
    except (ImportError, TypeError, ValueError, AttributeError):
        raise UserError(f"{module or 'nothing'} is no module of a training; lbae.mnist is one") from None
    with Profile() as profile:
        command(words)
    count, seconds, parts = profile.shares()
    print(f"{count} steps of {seconds:.4f} s")
    for name, share in parts.items():
        print(f"{PARTS[name]:<36} {share:>6.1%}")


if __name__ == "__main__":
    sys.exit(run_command(main))
