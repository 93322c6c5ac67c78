"""Speed and memory, measured side by side in one run; JSON under results/.

    python tests/bench.py load      # memory: loading a synthetic full-size Show-o (5.8 GB, a sparse file), decoding 6 x 512 x 512
"""
import argparse
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT, DATA = Path(__file__).parent.parent, Path(__file__).parent / "data"
sys.path.insert(0, str(ROOT))


# --------------------------------------------------------------------------------------------------- load

LOAD = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
from model import load_showo
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
showo = load_showo({folder!r}, tokenizer={tokenizer!r}, dtype=torch.{dtype})
for p in showo.parameters():
    p.data.view(-1)[::1024].sum()                   # every page of a mapped weight is read
print(sum(p.numel() * p.element_size() for p in showo.parameters()), peak() - before)
"""


CONVERT = """
import os, torch
from safetensors.torch import load_file
torch.save(load_file({folder!r} + "/pytorch_model.safetensors"), {folder!r} + "/pytorch_model.bin")
os.unlink({folder!r} + "/pytorch_model.safetensors")
"""

DECODE = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
from model import MAGVITv2
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
magvit = MAGVITv2().requires_grad_(False)
before = peak()
magvit.decode(torch.randint(8192, (6, 1024)))
print(peak() - before)
"""


def measure(code, **names):
    """The whole numbers that a Python process of its own prints."""
    text = subprocess.run([sys.executable, "-c", code.format(root=str(ROOT), **names)], check=True, capture_output=True, text=True).stdout
    return [int(word) for word in text.split()]


def full_size_folder(folder):
    """A checkpoint of Show-o 512's names and shapes, all zeros, as a sparse file."""
    tensors = json.loads((DATA / "showo/showo_512_manifest.json").read_text())["w_clip_vit_false"]["tensors"]
    header, end = {}, 0
    for name, entry in tensors.items():
        size = 4
        for n in entry["shape"]:
            size *= n
        header[name] = {"dtype": "F32", "shape": entry["shape"], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "pytorch_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(dict(vocab_size=58498, llm_vocab_size=50295, codebook_size=8192, num_vq_tokens=1024)))


def bench_load():
    """Peak of the resident memory while loading and then reading all weights, over the weights' bytes."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        full_size_folder(Path(folder))
        for name, dtype in (("safetensors", "float32"), ("safetensors", "bfloat16"), ("bin", "bfloat16")):
            if name == "bin":
                measure(CONVERT, folder=folder)
            stays, peak = measure(LOAD, folder=folder, tokenizer=str(DATA / "prompting/tokenizer"), dtype=dtype)
            out[f"{name} as {dtype}"] = {"weights_gb": stays / 1e9, "peak_gb": peak / 1e9, "ratio": peak / stays}
            print(f"load {name} as {dtype}: weights {stays / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, ratio {peak / stays:.3f}", flush=True)
    [chunked] = measure(DECODE)
    out["decode_gb"] = chunked / 1e9
    print(f"decode 6 pictures of 512 x 512: {chunked / 1e9:.2f} GB on top of the weights", flush=True)
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["load"])
    p.add_argument("--json", type=Path, help="also write the numbers there")
    args = p.parse_args()
    numbers = bench_load()
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
