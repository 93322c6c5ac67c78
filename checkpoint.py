"""What lies on the disk: weight files, folders of the hub, and a run's checkpoints.

    OUT/checkpoint-STEP/    Show-o's own layout, which loads wherever Show-o is loaded, and
                            trainer.pt: step, flags, filter, LoRA adapters
                            optimizer.pt: its state; the newest two checkpoints keep it

A folder of this name is complete: it is written under another name, then renamed. Only tensors and
plain values are read. SystemExit carries the plain line that common.run() prints.
"""
import json
import os
import re
import shutil
import sys
import time
import zipfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save_file

WEIGHTS = ("pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin", "model.bin")
TOKENIZER = ("*token*", "vocab*", "merges.txt")     # a tokenizer's files
# a resumed run must have these flags as it had them
FIXED = "model ckpt group_size unmask_steps transition inner_epochs kl lora seed".split()


def fetch(path_or_hub_id, *files) -> Path:
    """Return a local path as it is, else the local folder of a hub repository (ID or ID@REVISION).

    files: patterns of what to download (default: all, but no .bin beside safetensors)."""
    path = Path(path_or_hub_id)
    if path.parts[:1] == ("shapes",):       # the embedded default, from any working folder
        path = Path(__file__).parent / path
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
    except (OSError, ValueError) as error:  # what the hub client's errors have in common
        why = str(error).splitlines()[0].split(". ")[0]
        raise SystemExit(f"{path_or_hub_id}: no such file or folder here, and the hub does not give"
                         f" it ({why}); check the name, or where there is a network: hf download "
                         f"{name}") from None
    return path


def read_weights(path, device="cpu", dtype=None) -> dict:
    """Return the state_dict of a weight file, of a folder with one, or of a folder of shards."""
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in WEIGHTS if (path / name).exists()][:1]
        for index in sorted(path.glob("*.index.json"))[:1] if not files else []:
            names = set(json.loads(index.read_text())["weight_map"].values())
            files = [path / name for name in sorted(names)]
        if not files:
            raise SystemExit(f"{path}: no weights there, that is none of {', '.join(WEIGHTS)}")
        return {k: v for file in files for k, v in read_weights(file, device, dtype).items()}
    if not path.exists():
        raise SystemExit(f"{path}: there is no such file of weights")
    if path.suffix == ".safetensors":
        names = list(safe_open(path, "pt").keys())

        def read(name):     # from a mapping of its own, whose pages go when it was moved
            return safe_open(path, "pt").get_tensor(name)
    else:
        new = zipfile.is_zipfile(path)      # only then can it be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=new)
        for key in ("state_dict", "model_state_dict", "model", "module"):   # other trainers
            state = state[key] if isinstance(state.get(key), dict) else state
        read, names = state.get, list(state)
    weights = {}
    for name in names:      # read, cast and moved one by one
        weight = read(name)
        if isinstance(weight, torch.Tensor):
            name = re.sub(r"^((module|_orig_mod)\.)+", "", name)        # DDP, torch.compile
            weights[name] = weight.to(device, dtype if weight.is_floating_point() else None)
    return weights or sys.exit(f"{path}: holds no weights, but {', '.join(map(str, names))[:99]}")


def load_strict(model, state, path):
    """Let the model's weights be those of a state_dict, which came from path, without a copy."""
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
    shutil.copymode(path.with_name(f"{key}.json"), tmp)     # safetensors lets the owner alone read
    os.replace(tmp, path)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def read_rows(path) -> list[dict]:
    """Return the rows of a jsonl file, without a last line that a crash cut off."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def checkpoints(out) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    folders = [f for f in Path(out).glob("checkpoint-*") if f.name[11:].isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]))


def open_run(args, rank):
    """Return the output folder, the checkpoint to go on from, or None, and process 0's lock of the
    folder, which the system releases when its owner is gone."""
    folder = Path(args.resume) if args.resume and args.resume != "auto" else None
    now = time.strftime("%Y%m%d-%H%M%S")
    new = f"{Path(args.model).name}-seed{args.seed}-{now}-{os.getpid()}"
    out = Path(args.out or (folder.parent if folder else Path("runs") / new))
    if args.resume == "auto":
        folder = (checkpoints(out) or [None])[-1]       # None: the run ended before it saved
    rows, own = out / "metrics.jsonl", folder and folder.resolve().parent == out.resolve()
    if args.resume and not (folder / "trainer.pt" if folder else rows).exists():
        raise SystemExit(f"--resume: there is no checkpoint in {folder or out}")
    lock = FileLock(out / "lock", fallback_to_soft=False)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=bool(args.out or folder))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise SystemExit(f"--out {out}: another run is in it; wait for it, or end it") from None
        except OSError as error:    # as of Lustre
            print(f"WARNING: {out} cannot be locked ({error.strerror}): take care that no other run"
                  " writes into it", file=sys.stderr)
        used = rows.exists() and rows.stat().st_size or checkpoints(out)
        if used and not (own or args.resume == "auto"):
            raise SystemExit(f"--out {out}: holds another run; choose another, or add --resume")
        rows.touch()
    return out, folder, lock


def rewind(out, step):
    """Drop the rows and rename the checkpoints of the steps that a resumed run will do again."""
    for folder in checkpoints(out):
        if int(folder.name[11:]) > step:
            folder.rename(f"{folder}.replaced-{time.time_ns()}")
    for path in filter(Path.exists, (out / "metrics.jsonl", out / "eval.jsonl")):
        rows = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
        path.with_suffix(".part").write_text("".join(rows))
        path.with_suffix(".part").rename(path)


def save(out, step, showo, optimizer, sample_filter, args):
    """Write a checkpoint folder, then delete all older ones but --keep-last (0 = keep all)."""
    for left in out.glob(".checkpoint-*"):      # by a process that was killed
        shutil.rmtree(left)
    tmp = out / f".checkpoint-{step}"
    showo.save(tmp)
    torch.save(optimizer.state_dict(), tmp / "optimizer.pt")
    torch.save({"step": step, "args": vars(args), "filter": sample_filter.state_dict(),
                "lora": showo.trainable() if args.lora else {}}, tmp / "trainer.pt")
    tmp.rename(out / f"checkpoint-{step}")
    for old in checkpoints(out)[:-2]:
        (old / "optimizer.pt").unlink(missing_ok=True)
    for old in checkpoints(out)[:-args.keep_last] if args.keep_last else []:
        shutil.rmtree(old.rename(out / f".{old.name}"))


def load_trainer(folder, args) -> dict:
    """Return trainer.pt of a checkpoint of the same kind of run."""
    trainer = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
    changed = [f"--{name.replace('_', '-')} {trainer['args'][name]}" for name in FIXED
               if trainer["args"][name] != getattr(args, name)]
    if changed:
        raise SystemExit(f"--resume {folder}: that run has {', '.join(changed)}; give the same, or "
                         "begin anew in another --out")
    if trainer["step"] > args.steps:
        raise SystemExit(f"--resume {folder}: that run is past --steps {args.steps}")
    if not (folder / "optimizer.pt").exists():
        raise SystemExit(f"--resume {folder}: the optimizer's state is kept with the newest two "
                         f"checkpoints alone; begin anew from its weights, with --ckpt {folder}")
    state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    return {**trainer, "optimizer": state}
