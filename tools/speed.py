"""Make speed.md of what was measured: speed_notes.md, a table in the place of each [table NAME].

    python tools/speed.py --out results/speed.md

gpu: gpu.json, what gpu_check.py last wrote, or, as long as no card has run the present code,
gpu-earlier.json, what earlier code did. cpu: bench-small-cpu.json. load: bench-load.json.
"""
import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"


def read(name):
    """Return what a file of results/ holds."""
    return json.loads((RESULTS / name).read_text())


def markdown(rows) -> str:
    """Return rows of cells as a Markdown table; the first row is its head."""
    head, *rows = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows])


def shown(value) -> str:
    """Return a number, bool or text as a table shows it."""
    return str(value) if isinstance(value, bool | str) else f"{value:.4g}"


def findings(found) -> str:
    """Return what gpu_check.py found as Markdown, a table for each part."""
    return "\n\n".join(
        markdown([[part, ""], *([name.replace("_", " "), shown(value)]
                                for name, value in figures.items())])
        for part, figures in found.items())


def gpu() -> str:
    """Return the table of GPUs, of gpu.json if it is there."""
    if (RESULTS / "gpu.json").exists():
        return findings(read("gpu.json"))
    earlier = read("gpu-earlier.json")
    rows = [[name, *row] for name, row in earlier["rows"].items()]
    return markdown([["", *earlier["columns"]], *rows]) + "\n\n" + "\n".join(earlier["note"])


def cpu() -> str:
    """Return the table of seconds and GB on a CPU, plain beside ours."""
    found = read("bench-small-cpu.json")
    s, peak, share = found["seconds"], found["update_peak_gb"], found["share_of_matmul_rate"]
    rows = [["", "plain", "ours", "ratio", "ours, share of the matmul rate"]]
    for part, unit in (("rollout", "an image"), ("update", "an iteration of 6 images (p2)")):
        rows.append([f"{part}, s {unit}", f"{s[part + '_plain']:.2f}", f"{s[part + '_ours']:.2f}",
                     f"**{found[part + '_ratio']:.1f}**", f"{share[part]:.0%}"])
    rows.append(["peak memory of an update, GB", f"{peak['plain']:.2f}", f"{peak['ours']:.2f}",
                 f"**{found['update_memory_ratio']:.2f}**", ""])
    return markdown(rows)


def load() -> str:
    """Return the table of the GB that loading a checkpoint takes, by its format."""
    rows = [["file", "weights, GB", "peak, GB", "ratio"]]
    for name, row in read("bench-load.json").items():
        if name != "decode_gb":
            rows.append([name, *(f"{row[key]:.2f}" for key in ("weights_gb", "peak_gb", "ratio"))])
    return markdown(rows)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=RESULTS / "speed.md")
    args = p.parse_args()
    text = (RESULTS / "speed_notes.md").read_text()
    for name, make in (("gpu", gpu), ("cpu", cpu), ("load", load)):
        text = text.replace(f"[table {name}]", make())
    args.out.write_text(text)


if __name__ == "__main__":
    main()
