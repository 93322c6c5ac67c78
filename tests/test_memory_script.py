"""tools/memory.py runs at its smallest size and counts what can be known beforehand."""
import json

import bench
import memory
import pytest
from helpers import run


def test_table_of_memory(monkeypatch, tmp_path):
    """A row for each setting, of two iterations; 16 bytes a parameter for weight, gradient and two
    moments."""
    md, numbers = tmp_path / "memory.md", tmp_path / "memory.json"
    monkeypatch.setitem(bench.SIZES, "shapes", (*bench.SIZES["shapes"][:4], 2, 8))
    monkeypatch.setattr(memory.Showo, "prefill", memory.Showo.prefill)      # it puts its own there
    monkeypatch.setattr(memory.Memory, "answers", memory.Memory.answers.copy())
    run(memory, "--size", "shapes", "--md", md, "--json", numbers)
    found = json.loads(numbers.read_text())
    size, lora, rows = found["bytes"]["all weights"], found["bytes"]["--lora"], found["GB"]
    assert size["weights"] + size["gradients"] + size["moments"] == 16 * found["parameters"]
    assert size["weights"] // 2 < size["reference"] < size["weights"]   # projections in half
    assert lora["weights"] - lora["gradients"] == size["reference"] and lora["reference"] == 0
    assert lora["moments"] == 2 * lora["gradients"]

    lines = md.read_text().splitlines()
    assert lines[0].startswith("`python tools/memory.py --size shapes")
    assert sum(line.startswith("| p") for line in lines) == len(rows) == 8
    table = {(row["transition"], row["--grad-checkpoint"], row["--lora"]): row for row in rows}
    assert set(table) == {(kind, checkpointing, rank) for kind in ("p2", "p1")
                          for checkpointing in ("no", "yes") for rank in ("no", 16)}
    for (kind, checkpointing, rank), row in table.items():
        stays = lora if rank == 16 else size
        sharded = row["--no-kl"] - row["--no-kl --zero"]
        assert sharded == pytest.approx(stays["moments"] * 7 / 8 / 1e9)
        assert row["--kl"] >= row["--no-kl"] + stays["reference"] / 1e9
        assert row["--no-kl"] > sum(stays[name] for name in ("weights", "moments")) / 1e9
        if checkpointing == "yes":
            assert row["--no-kl"] <= table[kind, "no", rank]["--no-kl"]
    assert table["p1", "no", "no"]["--kl"] > table["p2", "no", "no"]["--kl"]
