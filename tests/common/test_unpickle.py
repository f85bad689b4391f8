"""The restricted reader of pickles: what it rebuilds, and that a file changes nothing of ours."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from common import unpickle
from common.errors import UserError
from common.unpickle import ARRAYS, TENSORS, read_pickle

NAMES = {**ARRAYS, **TENSORS}


def stored(tmp_path, content, protocol=4):
    path = tmp_path / "file.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_tensors_and_containers_come_back(tmp_path, protocol):
    content = {"a": np.arange(6.0).reshape(2, 3), "t": torch.arange(4), "l": [1, (2.5, "x")], "s": np.float32(0.5)}
    back = read_pickle(stored(tmp_path, content, protocol), NAMES)
    assert np.array_equal(back["a"], content["a"]) and torch.equal(back["t"], content["t"])
    assert back["l"] == content["l"] and back["s"] == np.float32(0.5)


def test_a_state_dict_with_its_notes_is_read(tmp_path):
    state = OrderedDict(w=torch.ones(2))
    state._metadata = {"version": 1}
    assert torch.equal(read_pickle(stored(tmp_path, state), NAMES)["w"], torch.ones(2))


@pytest.mark.parametrize(
    "name", [b"c_codecs\nencode\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"]
)
def test_a_file_cannot_set_attributes_of_what_it_names(tmp_path, name):
    """The state {"__defaults__": ("evil",)} for a function or a class of ours."""
    defaults, keys = unpickle._encode.__defaults__, set(vars(OrderedDict))
    path = stored(tmp_path, name + b"(dX\x0c\x00\x00\x00__defaults__X\x04\x00\x00\x00evil\x85sb.")
    with pytest.raises(UserError, match="it sets attributes of a"):
        read_pickle(path, NAMES)
    assert unpickle._encode.__defaults__ == defaults and set(vars(OrderedDict)) == keys


class _Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", [_Evil(), {"a": [_Evil()]}, np.array([_Evil()], object), print, np.ones])
def test_other_names_are_refused_unrun(tmp_path, capsys, content):
    with pytest.raises(UserError, match=r"file\.pkl is refused"):
        read_pickle(stored(tmp_path, content), NAMES)
    assert capsys.readouterr().out == ""
