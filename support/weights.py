"""Weight files and hub folders: fetch, read, fit strictly, write, tell apart.

Only tensors and plain values are read: safetensors, or torch.load(weights_only=True). Errors that
users meet are SystemExit(text), which processes.run() prints as one line.
"""
import functools
import hashlib
import importlib
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ("pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin", "model.bin")
DECLARED = []
TOKENIZER = ("*token*", "vocab*", "merges.txt")     # a tokenizer's files


@functools.cache
def library(name):
    """Import transformers or open_clip. Both import torchvision, and its CUDA build, which pip
    installs beside a CPU build of torch, fails until two operators have been declared."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        operators = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            operators.define(f"{operator}(Tensor dets, Tensor scores, float iou) -> Tensor")
        DECLARED.append(operators)          # they are gone when the object is
    return importlib.import_module(name)


def local(path) -> Path:
    """Resolve a path from any working folder: shapes/ is always this project's, and so is prompts/
    unless the file exists where you are."""
    room, path = Path(path).parts[:1], Path(path)
    own = room == ("shapes",) or room == ("prompts",) and not path.exists()
    return ROOT / path if own else path


def fetch(path_or_hub_id, *files) -> Path:
    """Return a local path as it is, else the local folder of a hub repository (ID or ID@REVISION).

    files: patterns of what to download (default: all, but no .bin beside safetensors)."""
    path = local(path_or_hub_id)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    name, _, revision = str(path_or_hub_id).partition("@")
    try:
        for ignored in (["*.bin", "*.msgpack", "*.h5"], None):
            path = Path(snapshot_download(name, revision=revision or None,
                                          allow_patterns=files or None, ignore_patterns=ignored))
            if files or any(path.glob("*model*.safetensors")):
                break
    except (OSError, ValueError) as error:  # base classes of huggingface_hub's errors
        why = str(error).splitlines()[0].split(". ")[0]
        raise SystemExit(f"{path_or_hub_id}: no such file or folder here, and the hub does not give"
                         f" it ({why}); check the name, or where there is a network: hf download "
                         f"{name}") from None
    return path


def weight_files(path) -> list[Path]:
    """Return the weight file at a path, or in a folder, or all shards in a folder."""
    files = [Path(path)]
    if files[0].is_dir():
        files = [files[0] / name for name in WEIGHTS if (files[0] / name).exists()][:1]
        for index in sorted(Path(path).glob("*.index.json"))[:1] if not files else []:
            names = set(json.loads(index.read_text())["weight_map"].values())
            files = [index.with_name(name) for name in sorted(names)]
        if not files and (Path(path) / "adapter_config.json").exists():
            raise SystemExit(f"{path}: is an adapter of peft; merge it into its base first")
        if not files:
            raise SystemExit(f"{path}: no weights there, that is none of {', '.join(WEIGHTS)}")
    for file in files:
        if not file.exists():
            raise SystemExit(f"{file}: there is no such file of weights")
    return files


def digest(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def fingerprint(path_or_hub_id) -> str:
    """Return a digest of weight files, of their sizes and 64 blocks of each: training moves nearly
    every weight, so two checkpoints differ in most blocks."""
    found = hashlib.sha256()
    for file in weight_files(fetch(path_or_hub_id)):
        size = file.stat().st_size
        found.update(str(size).encode())
        with open(file, "rb") as content:
            for i in range(64):
                content.seek(i * size // 64)
                found.update(content.read(4096))
    return found.hexdigest()[:12]


def read_weights(path, device="cpu", dtype=None) -> dict:
    """Return the state_dict of a weight file, of a folder with one, or of a folder of shards."""
    files = weight_files(path)
    if len(files) > 1:
        return {k: w for file in files for k, w in read_weights(file, device, dtype).items()}
    path, = files
    if path.suffix == ".safetensors":
        names = list(safe_open(path, "pt").keys())

        def read(name):     # reopen per tensor: its memory-mapped pages are freed after the copy
            return safe_open(path, "pt").get_tensor(name)
    else:
        new = zipfile.is_zipfile(path)      # older files cannot be memory-mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=new)
        for key in ("state_dict", "model_state_dict", "model", "module"):   # other trainers
            state = state[key] if isinstance(state.get(key), dict) else state
        read, names = state.get, list(state)

    # read, cast and move one by one
    weights = {}
    for name in names:
        weight = read(name)
        if isinstance(weight, torch.Tensor):
            name = re.sub(r"^((module|_orig_mod)\.)+", "", name)        # DDP, torch.compile
            weights[name] = weight.to(device, dtype if weight.is_floating_point() else None)
    return weights or sys.exit(f"{path}: holds no weights, but {', '.join(map(str, names))[:99]}")


def load_strict(model, state, path):
    """Make a state_dict the model's weights, without a copy. path: where it came from."""
    own = {name: weight.shape for name, weight in model.state_dict().items()}
    given = {name: weight.shape for name, weight in state.items()}
    wrong = sorted(n for n in own.keys() | given.keys() if own.get(n) != given.get(n))
    if wrong:
        raise SystemExit(f"{path}: {len(wrong)} weights do not fit {type(model).__name__}, such as "
                         f"{', '.join(wrong[:3])}; is it the right checkpoint, of this size?")
    model.load_state_dict(state, assign=True)


def write_model(folder, name, state, **configs):
    """Write a folder with NAME.safetensors, and a JSON file for each of configs. The weights may be
    mapped from the very file that they replace."""
    path = Path(folder) / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    for key, config in configs.items():
        write_json(path.with_name(f"{key}.json"), config)
    tmp = path.with_name(f".{path.name}")
    save_file({k: w.contiguous() for k, w in state.items()}, tmp, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(tmp, 0o666 & ~umask)       # save_file makes files that only the owner can read
    os.replace(tmp, path)


def write_json(path, content):
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)


def read_json(path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def mend_tokenizer(folder):
    """Give a saved tokenizer the class that transformers 4 knows, too."""
    path = Path(folder) / "tokenizer_config.json"
    config = read_json(path)
    if config["tokenizer_class"] == "TokenizersBackend":
        write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def is_shapes(model) -> bool:
    """Return whether --model names the tiny base, or a checkpoint trained from it."""
    config = read_json(Path(model) / "config.json")
    return model == "shapes" or config.get("llm_model_path") == "shapes"


def image_tokenizer(model) -> str:
    """Return the default of --vq: the image tokenizer that belongs to --model."""
    return "shapes/magvitv2" if is_shapes(model) else "showlab/magvitv2"
