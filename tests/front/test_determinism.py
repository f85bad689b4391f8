"""`--deterministic` (LBAE and NFPI: `deterministic=1`): two runs of each paper's smoke give identical metric files.

Every .csv and .json that a run writes is compared byte by byte but timing.csv, where the seconds stand: a time in any
other file fails here, and so does a random number that no seed governs. Each run is a process of its own.
Costs about 20 CPU seconds.
"""

import pytest
from front.commands import PAPERS, output, run

FLAGS = {
    "lbae": ["deterministic=1"],
    "glancenet": ["--deterministic", "true"],
    "latent_flow": ["--deterministic"],
    "inv_flow": ["--deterministic"],
    "nfpi": ["deterministic=1"],
}


@pytest.mark.parametrize("paper", PAPERS)
def test_two_runs_give_identical_metric_files(tmp_path, paper):
    found = []
    for name in ("first", "second"):
        assert run(paper, tmp_path / name, *FLAGS[paper]) == 0, output(tmp_path / name)
        files = [p for p in (tmp_path / name).rglob("*") if p.suffix in (".csv", ".json") and p.name != "timing.csv"]
        place = str(tmp_path / name).encode()  # the one thing in which the runs differ
        found.append({str(p.relative_to(tmp_path / name)): p.read_bytes().replace(place, b".") for p in files})
    assert found[0].keys() == found[1].keys() >= set(PAPERS[paper].tables)
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []
