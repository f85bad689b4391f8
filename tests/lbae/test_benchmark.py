"""The benchmark runs, and the pieces it compares give the same results (it checks that itself)."""

import re

from lbae import benchmark


def test_benchmark_prints_ratios(capsys):
    benchmark.main(
        [
            "--zsize",
            "40",
            "--codes",
            "10",
            "--rows",
            "500",
            "--images",
            "4",
            "--width",
            "2",
            "--img_size",
            "32",
            "--device",
            "cpu",
        ]
    )
    printed = capsys.readouterr().out
    assert len(re.findall(r"\d+\.\d+x", printed)) == 3
    assert re.search(r"generated images per second .*: \d+\.\d", printed)
