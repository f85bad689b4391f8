import copy
import os
import pickle
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from common import checkpoint
from common.errors import UserError


def test_state_round_trip_keeps_values_and_types(tmp_path):
    path = tmp_path / "deep" / "state.pt"
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    checkpoint.save_state(
        path,
        "test",
        model=model.state_dict(),
        optimiser=optimiser.state_dict(),
        step=np.int64(7),
        array=array,
        root=tmp_path,
    )
    state = checkpoint.load_state(path, "test")
    assert state["step"] == 7 and type(state["step"]) is int
    assert torch.equal(state["array"], torch.from_numpy(array))
    assert state["root"] == str(tmp_path)
    assert torch.equal(state["model"]["weight"], model.weight)
    assert torch.equal(state["optimiser"]["state"][0]["exp_avg"], optimiser.state_dict()["state"][0]["exp_avg"])


def test_rng_round_trip_repeats_every_generator():
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.randn()  # leaves a cached normal behind
    state = checkpoint.rng_state()

    def draw():
        return random.random(), np.random.randn(3).tolist(), torch.randn(2).tolist()

    first = draw()
    checkpoint.restore_rng(state)
    assert draw() == first


def test_rng_state_survives_a_file(tmp_path):
    torch.manual_seed(0)
    checkpoint.save_state(tmp_path / "s.pt", "test", rng=checkpoint.rng_state())
    expected = torch.rand(3), np.random.rand(3)
    checkpoint.restore_rng(checkpoint.load_state(tmp_path / "s.pt", "test")["rng"])
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


class _Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never-made-by-a-checkpoint",)


def test_foreign_truncated_and_newer_files_are_one_clear_line(tmp_path):
    good = tmp_path / "good.pt"
    checkpoint.save_state(good, "lbae", x=torch.zeros(1000))
    with pytest.raises(UserError, match="expected 'nfpi'"):
        checkpoint.load_state(good, "nfpi")
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load_state(tmp_path / "absent.pt", "lbae")

    whole = good.read_bytes()
    for name, data in {
        "cut.pt": whole[: len(whole) // 2],
        "empty.pt": b"",
        "page.pt": b"<html>not found</html>",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            checkpoint.load_state(tmp_path / name, "lbae")

    torch.save({"format_version": 99, "kind": "lbae", "state": {}}, tmp_path / "newer.pt")
    with pytest.raises(UserError, match="update the repository"):
        checkpoint.load_state(tmp_path / "newer.pt", "lbae")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="not a checkpoint of this repository"):
        checkpoint.load_state(tmp_path / "foreign.pt", "lbae")


def test_malicious_pickle_is_refused_unexecuted(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"format_version": 1, "kind": "lbae", "state": _Evil()}, path)
    with pytest.raises(UserError, match=r"evil\.pt is refused"):
        checkpoint.load_state(path, "lbae")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(UserError):
        checkpoint.load_state(tmp_path / "raw.pt", "lbae")
    assert not os.path.exists("/tmp/never-made-by-a-checkpoint")


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"), checkpoint.atomic_write(path) as file:
        file.write(b"new, but not whole")
        raise RuntimeError("half way")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    """The file-size limit of the process gives the error of a full disk without filling one."""
    path = tmp_path / "state.pt"
    checkpoint.save_state(path, "test", x=torch.zeros(10))
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
        with pytest.raises(UserError, match="the disk is full"):
            checkpoint.save_state(path, "test", x=torch.zeros(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["state.pt"]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """A machine that loses its power after the rename finds the whole file: content first, then name, then folder."""
    done = []

    def recorded(name, call):
        def noted(*arguments):
            kind = name if name == "named" else "folder" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else "content"
            done.append((kind, os.fstat(arguments[0]).st_size) if kind == "content" else kind)
            return call(*arguments)

        return noted

    monkeypatch.setattr(os, "fsync", recorded("synced", os.fsync))
    monkeypatch.setattr(os, "replace", recorded("named", os.replace))
    with checkpoint.atomic_write(tmp_path / "x.bin") as file:
        file.write(b"all of it")
    assert done == [("content", 9), "named", "folder"]
    assert stat.S_IMODE((tmp_path / "x.bin").stat().st_mode) == 0o666 & ~checkpoint._umask()


def test_kill_while_saving_always_leaves_a_loadable_file(tmp_path):
    path = tmp_path / "state.pt"
    code = (
        "import sys, torch; from common.checkpoint import save_state\n"
        "x = torch.zeros(200_000)\n"
        "for i in range(10**9):\n"
        "    save_state(sys.argv[1], 'test', x=x + i, i=i)\n"
        "    print(i, flush=True)\n"
    )
    for delay in (0.0, 0.013, 0.05):
        child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()  # the first file is complete
        time.sleep(delay)
        child.kill()
        child.wait()
        child.stdout.close()
        state = checkpoint.load_state(path, "test")
        assert torch.equal(state["x"], torch.full((200_000,), float(state["i"])))


def test_weights_round_trip_and_damage(tmp_path):
    path = tmp_path / "w.safetensors"
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(3)}
    checkpoint.save_weights(path, tensors, {"width": 4})
    loaded, config = checkpoint.load_weights(path)
    assert config == {"width": 4}
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_weights(path)
    with pytest.raises(UserError, match="no weights at"):
        checkpoint.load_weights(tmp_path / "absent.safetensors")


def test_load_into_names_what_differs():
    model = torch.nn.Linear(3, 2)
    checkpoint.load_into(model, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, "file")
    assert torch.equal(model.weight, torch.ones(2, 3))
    with pytest.raises(UserError, match=r"missing: bias; unknown: offset; other shape: weight is \(2, 4\)"):
        checkpoint.load_into(model, {"weight": torch.ones(2, 4), "offset": torch.zeros(2)}, "file")
    for count, shown in ((3, "unknown: 0, 1, 2)"), (4, "unknown: 0, 1, 2 ...)")):
        with pytest.raises(UserError, match=re.escape(shown)):
            checkpoint.load_into(model, {**model.state_dict(), **dict.fromkeys("0123"[:count], 1)}, "file")


def test_prune_keeps_the_highest_numbers(tmp_path):
    for i in (1, 2, 9, 10, 100):
        (tmp_path / f"weights-{i}.cp").touch()
    (tmp_path / "best.cp").touch()
    checkpoint.prune(tmp_path, "weights-*.cp", keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.cp", "weights-10.cp", "weights-100.cp"]


def test_json_reader_refuses_damage(tmp_path):
    checkpoint.write_json(tmp_path / "a.json", {"b": 1, "a": tmp_path})
    assert checkpoint.read_json(tmp_path / "a.json") == {"a": str(tmp_path), "b": 1}
    (tmp_path / "a.json").write_text('{"b": ')
    with pytest.raises(UserError, match="not a readable JSON"):
        checkpoint.read_json(tmp_path / "a.json")


def flipped(data, seed):
    """`data` with one bit turned."""
    rng, out = random.Random(seed), bytearray(data)
    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def test_a_flipped_bit_never_changes_a_state(tmp_path):
    weight, path = torch.randn(2000), tmp_path / "a.pt"
    checkpoint.save_state(path, "t", w=weight, step=7)
    whole, refused = path.read_bytes(), 0
    for seed in range(150):
        path.write_bytes(flipped(whole, seed))
        try:
            state = checkpoint.load_state(path, "t")
        except UserError as error:
            assert "a.pt" in str(error)
            refused += 1
        else:  # padding, or a date that nobody reads
            assert torch.equal(state["w"], weight) and state["step"] == 7
    assert refused > 100


def test_a_flipped_bit_in_weights_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(path, {"w": torch.randn(500), "half": torch.ones(3, dtype=torch.bfloat16)}, {"width": 3})
    whole = path.read_bytes()
    for seed in range(150):
        path.write_bytes(flipped(whole, seed))
        with pytest.raises(UserError, match=r"w\.safetensors"):
            checkpoint.load_weights(path)


def test_weights_carry_their_config_and_older_files_have_it_beside_them(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(path, {"w": torch.ones(2)}, {"step": 1})
    (tmp_path / "w.json").write_text('{"step": 2}')  # a kill between the two writes
    assert checkpoint.load_weights(path)[1] == {"step": 1}
    (tmp_path / "w.json").unlink()
    assert checkpoint.load_weights(path)[1] == {"step": 1}
    save_file({"w": torch.ones(2)}, tmp_path / "old.safetensors")
    (tmp_path / "old.json").write_text('{"step": 3}')
    assert checkpoint.load_weights(tmp_path / "old.safetensors")[1] == {"step": 3}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.full((2, 3), float("nan")), "not finite: weight"),
        (torch.zeros(2, 3, dtype=torch.int64), "other kind of number: weight"),
        (torch.zeros(2, 3, dtype=torch.complex64), "other kind of number: weight"),
        ([1.0, 2.0], "no tensor: weight"),
        (None, "no tensor: weight"),
        (torch.zeros(3, 2), "other shape: weight"),
    ],
)
def test_load_into_refuses_what_is_no_weight(value, reason):
    module = torch.nn.Linear(3, 2)
    before = module.weight.clone()
    with pytest.raises(UserError, match=reason):
        checkpoint.load_into(module, {"weight": value, "bias": torch.zeros(2)}, "file")
    assert torch.equal(module.weight, before)
    checkpoint.load_into(module, {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)}, "file")
    assert bool((module.weight == 1).all())


def test_a_buffer_takes_its_own_kind_of_number_alone():
    """Counters, masks and spectra: none becomes another by a silent cast."""
    kinds = {"float": torch.float32, "whole": torch.int64, "complex": torch.complex64, "bool": torch.bool}
    for own, dtype in kinds.items():
        module = torch.nn.Module()
        module.register_buffer("buffer", torch.zeros(3, dtype=dtype))
        for other, given in kinds.items():
            tensors = {"buffer": torch.ones(3, dtype=given)}
            if own == other:
                checkpoint.load_into(module, tensors, "file")
                assert bool(module.buffer.all())
            else:
                with pytest.raises(UserError, match="other kind of number: buffer"):
                    checkpoint.load_into(module, tensors, "file")


def trained(**settings):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), **settings)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_an_optimiser_keeps_its_own_settings_and_takes_the_moments():
    _, old = trained(lr=0.1)
    _, new = trained(lr=0.5, fused=True)
    new.state.clear()
    checkpoint.load_optimizer(new, old.state_dict(), "file")
    assert new.param_groups[0]["lr"] == 0.5 and new.param_groups[0]["fused"] is True
    for one, two in zip(old.state.values(), new.state.values(), strict=True):
        assert torch.equal(one["exp_avg"], two["exp_avg"]) and float(two["step"]) == 1
    checkpoint.load_optimizer(new, old.state_dict(), "file", own_settings=False)
    assert new.param_groups[0]["lr"] == 0.1 and new.param_groups[0]["fused"] is True


def test_the_step_counter_follows_the_kernel():
    """A fused or capturable Adam reads its counter on the parameter's device, the plain one on the CPU."""
    parameter = torch.nn.Parameter(torch.zeros(2, device="meta"))
    for fused, there in ((True, "meta"), (False, "cpu")):
        state = {"step": torch.tensor(4.0)}
        checkpoint._fit(state, parameter, {"fused": fused})
        assert state["step"].device.type == there


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("param_groups"),
        lambda state: state["param_groups"][0].pop("params"),
        lambda state: state["state"][0].update(exp_avg=torch.zeros(7)),
        lambda state: state["state"][0].update(exp_avg_sq=torch.full((2, 3), float("inf"))),
        lambda state: state["state"][0].update(step="often"),
        lambda state: state.update(state=3),
    ],
)
def test_a_damaged_optimiser_state_is_one_line(damage):
    _, old = trained()
    _, new = trained()
    state = copy.deepcopy(old.state_dict())
    damage(state)
    with pytest.raises(UserError, match="the optimiser's state in file does not fit or is damaged"):
        checkpoint.load_optimizer(new, state, "file")


@pytest.mark.parametrize("key", ["python", "numpy", "torch"])
def test_damaged_random_states_are_one_line(key):
    good = checkpoint.rng_state()
    for bad in (None, [1, 2], torch.zeros(3)):
        with pytest.raises(UserError, match="random states are damaged"):
            checkpoint.restore_rng({**good, key: bad})
    with pytest.raises(UserError, match="random states are damaged"):
        checkpoint.restore_rng({name: value for name, value in good.items() if name != key})
    checkpoint.restore_rng(good)
