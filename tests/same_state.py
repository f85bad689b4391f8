"""Comparison of two saved states."""

import torch


def same(a, b, where: str = "state") -> None:
    """Assert that two nested states are equal to the bit: same types, keys, lengths, tensors and values."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}[{index}]")
    else:
        assert a == b, where
