"""results/memory.py runs at its tiny size and counts what can be known beforehand."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def test_table_of_memory(tmp_path):
    """A row for each setting; 16 bytes a parameter for weight, gradient and two moments."""
    md, numbers = tmp_path / "memory.md", tmp_path / "memory.json"
    subprocess.run([sys.executable, "results/memory.py", "--size", "tiny", "--md", md,
                    "--json", numbers], cwd=ROOT, check=True, timeout=600,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads(numbers.read_text())
    size, rows = found["bytes"], found["GB"]
    assert size["weights"] + size["gradients"] + size["moments"] == 16 * found["parameters"]
    assert size["reference"] == size["weights"]

    lines = md.read_text().splitlines()
    assert lines[0].startswith("`python results/memory.py --size tiny")
    assert sum(line.startswith("| p") for line in lines) == len(rows) == 12
    table = {(row["transition"], row["--micro-batch"], row["--grad-checkpoint"]): row
             for row in rows}
    assert set(table) == {(kind, B, checkpointing) for kind in ("p2", "p1") for B in (6, 3, 1)
                          for checkpointing in ("no", "yes")}
    for row in rows:
        sharded = row["--no-kl"] - row["--no-kl --zero"]
        assert sharded == pytest.approx(size["moments"] * 7 / 8 / 1e9)
        assert row["--kl"] >= row["--no-kl"] + size["reference"] / 1e9
        assert row["--no-kl"] >= table["p2", 1, "yes"]["--no-kl"]
    for kind in ("p2", "p1"):
        assert table[kind, 6, "yes"]["--kl"] < table[kind, 6, "no"]["--kl"]
    assert table["p1", 6, "no"]["--kl"] > table["p2", 6, "no"]["--kl"]
