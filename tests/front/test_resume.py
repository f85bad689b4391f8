"""Exact resume, all five papers: six steps equal a few steps, a kill, and the rest after a resume, bit for bit.

Compared: weights, optimiser, moving average, schedules, random number states (all that the final checkpoint holds), and
the metric files byte by byte. Trainers are processes and get real signals in the middle of an epoch and at its end;
SIGKILL leaves what the last periodic checkpoint holds, and the rows logged after it are written anew. LBAE and
Inverse-Flow read with 0 and 2 worker processes, against one reference: the order of the images must not depend on them.
GlanceNet's --num_workers (a thread that reads ahead) does nothing on a CPU; latent-flow and NFPI have none.

What the papers' own tests prove is not repeated: LBAE's VAE (tests/lbae/test_commands.py), self-normalising flows and a
stop inside a logging interval (tests/inv_flow/test_experiment.py), latent-flow's other variants
(tests/latent_flow/test_scripts.py), two processes (tests/lbae/test_distributed.py).

Would catch: anything that the loop changes and the checkpoint lacks (a generator, the average's counter, a warm-up, the
sum of an epoch's losses), an order of images that depends on the start or the workers, rows lost or written twice.
Costs about 50 CPU seconds.
"""

import signal

import pytest
from front.commands import EPOCH, PAPERS, final_state, output, resume, run
from same_state import same

MIDDLE, END = EPOCH - 1, EPOCH  # steps done when the signal comes
CASES = [
    (paper, place, sent, workers)
    for paper in PAPERS
    for place, sent, workers in (
        (MIDDLE, signal.SIGTERM, 0),
        (END, signal.SIGINT, 2 if PAPERS[paper].has_workers else 0),
        (EPOCH + 2, signal.SIGKILL, 0),
    )
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """paper -> the folder of a run that nobody stopped."""
    made = {}

    def get(paper):
        if paper not in made:
            made[paper] = tmp_path_factory.mktemp(paper)
            assert run(paper, made[paper]) == 0, output(made[paper])
        return made[paper]

    return get


@pytest.mark.parametrize(("paper", "place", "sent", "workers"), CASES)
def test_a_killed_run_goes_on_exactly(whole, tmp_path, paper, place, sent, workers):
    code = run(paper, tmp_path, workers=workers, stop=(place, sent))
    killed = sent == signal.SIGKILL
    assert code == (-signal.SIGKILL if killed else 130), output(tmp_path)  # the documented exit code
    assert "Traceback" not in output(tmp_path)
    assert resume(paper, tmp_path, killed, workers) == 0, output(tmp_path)
    for name in PAPERS[paper].tables:
        assert (tmp_path / name).read_text() == (whole(paper) / name).read_text(), name
    same(final_state(paper, tmp_path), final_state(paper, whole(paper)))
