"""What lies on the disk: weight files, folders of the hub, and the checkpoints of a run.

    OUT/checkpoint-STEP/    Show-o's own layout, which loads wherever Show-o is loaded, and
                            trainer.pt: step, flags, optimizer, filter and adapters of train.py
    OUT/checkpoint-best/    the same, of the best evaluation (--best)

Random states are not saved: train.py derives them from seed, step and prompt slot. Only tensors and
plain values are read (safetensors, or torch.load with weights_only); no pickled object is ever run.
"""
import fcntl
import json
import os
import shutil
import socket
import sys
import time
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHT_FILES = (
    "pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin", "model.bin")
HUB_FILES = {
    "config": ["config.json", "phi_config.json"],
    "weights": ["pytorch_model*", "model*"],
    "tokenizer": ["tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json",
                  "added_tokens.json"],
    "open_clip": ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]}
# flags of train.py, between a run and its resume
MUST_MATCH = ("model", "group_size", "unmask_steps", "transition", "trajectory", "inner_epochs",
              "kl", "lora", "seed")
MAY_CHANGE = ("out", "resume", "wandb", "recipe", "eval_every", "sample_every", "save_every",
              "keep_last")


class InputError(ValueError):
    """Something the user gave is wrong; the message names it and says what to do about it."""


def first_line(error) -> str:
    """Return the first line of what an exception says."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


# ------------------------------------------------------------------------------ JSON

def parse_json(data: bytes, where):
    """Return the value of JSON in UTF-8, with a BOM or without; where names its source.

    Raises InputError for other encodings, for what is no JSON, and for too deep a nesting."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({first_line(error)})") from None


def read_json(path) -> dict:
    """Return the object in a JSON file of at most 100 MB. Raises InputError."""
    try:
        with open(path, "rb") as file:
            data = file.read(10 ** 8)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    content = parse_json(data, f"{path}:")
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object")
    return content


def write_json(path, content):
    """Write a JSON file, indented for people."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_rows(path) -> list[dict]:
    """Return the rows of a run's jsonl file, each with a "step"; [] when there is no file.

    A last line that a crash cut off is passed over. Raises InputError for any other bad line."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, f"{path}: line {number}")
        except InputError:
            if number < len(lines):
                raise
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise InputError(f"{path}: line {number} is no row of a run; mend or move it")
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------ weights

def read_weights(path, *, device="cpu", dtype=None) -> dict:
    """Return the state_dict of a weight file, or of a folder with one (or with shards, indexed).

    Files are memory-mapped: a weight that stays on the CPU in its own type is not copied, others
    are moved, and cast to dtype if they are floating point, one by one. Of a .bin or .pth, the
    pages that were read stay mapped until all are. Raises InputError."""
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, device, dtype)

    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path, device, dtype)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True,
                               mmap=zipfile.is_zipfile(path))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged archive raises whatever its bytes lead to
        raise InputError(f"{path}: cannot be read as a weights file ({first_line(error)}); fetch "
                         "or copy it again") from None

    if isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    if not _is_state_dict(state):
        raise InputError(f"{path}: not a state_dict (a flat mapping from names to tensors)")
    for name, weight in state.items():
        state[name] = weight.to(device, dtype if weight.is_floating_point() else None)
    return state


def _read_safetensors(path, device, dtype):
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    state = {}
    for name in names:
        # a mapping for each weight: the pages that one read go with it when it is moved or cast
        with safe_open(path, framework="pt") as file:
            weight = file.get_tensor(name)
        state[name] = weight.to(device, dtype if weight.is_floating_point() else None)
    return state


def _read_folder(folder, device, dtype):
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return read_weights(folder / name, device=device, dtype=dtype)
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else [""]
            if not all((folder / name).is_file() for name in names):
                raise InputError(f"{index}: names shards that are not there; fetch or copy the "
                                 "folder again")
            parts = [read_weights(folder / name, device=device, dtype=dtype) for name in names]
            return {name: weight for part in parts for name, weight in part.items()}
    raise InputError(f"{folder}: no weights there; expected one of {', '.join(WEIGHT_FILES)}")


def _is_state_dict(state):
    return isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(weight, torch.Tensor)
        and weight.layout == torch.strided and not weight.is_meta
        for name, weight in state.items())


def write_weights(path, state):
    """Write a safetensors file under another name, then rename it: the weights may be mapped from
    the very file that they replace."""
    tmp_path = path.with_name("." + path.name)
    state = {name: weight.contiguous() for name, weight in state.items()}
    save_file(state, tmp_path, metadata={"format": "pt"})
    os.replace(tmp_path, path)


def build(path, kind, *args, **kwargs):
    """Return kind(*args, **kwargs) without memory for its weights.

    Raises InputError that names path, where the sizes came from."""
    try:
        with torch.device("meta"):
            return kind(*args, **kwargs)
    except InputError:
        raise
    except Exception as error:  # odd sizes raise whatever they lead to
        raise InputError(f"{path}: cannot build {kind.__name__} of these sizes "
                         f"({first_line(error)})") from None


def load_strict(model, state, path):
    """Let the model's weights be those of state, without a copy.

    Raises InputError with the names and shapes that do not fit."""
    own = model.state_dict()
    wanted = {name: list(weight.shape) for name, weight in own.items()}
    given = {name: list(weight.shape) for name, weight in state.items()}
    faults = [f"missing {name}" for name in wanted.keys() - given.keys()]
    faults += [f"surplus {name}" for name in given.keys() - wanted.keys()]
    for name in wanted.keys() & given.keys():
        if wanted[name] != given[name]:
            faults.append(f"{name} has shape {given[name]}, wanted {wanted[name]}")
        elif own[name].is_floating_point() != state[name].is_floating_point():
            faults.append(f"{name} is {state[name].dtype}, wanted {own[name].dtype}")
    if faults:
        shown = "; ".join(sorted(faults)[:5])
        raise InputError(f"{path}: {len(faults)} weights do not fit {type(model).__name__}: "
                         f"{shown}; is this the right checkpoint, with its own config.json?")
    model.load_state_dict(state, assign=True)


def is_shapes(model) -> bool:
    """Return whether --model names the tiny base, or a checkpoint trained from it."""
    config = Path(model) / "config.json"
    if model == "shapes" or not config.exists():
        return model == "shapes"
    return read_json(config).get("llm_model_path") == "shapes"


# ------------------------------------------------------------------------------ the hub

def fetch(path_or_hub_id, needed, optional=()) -> Path:
    """Return a local path as it is, else the folder of a hub repository (NAME or NAME@REVISION).

    needed, optional: keys of HUB_FILES, or file names. Of weights in both formats, safetensors
    are fetched. Raises InputError that says what is missing and how to fetch it."""
    path = Path(path_or_hub_id)
    if path.parts[:1] == ("shapes",):  # the embedded default, from any working folder
        path = Path(__file__).parent / path
    if path.exists():
        return path
    name, _, revision = str(path_or_hub_id).partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{path_or_hub_id}: no such file or folder, nor a hub id (owner/name)")

    try:
        path = _download(name, revision or None, [*needed, *optional])
        missing = [kind for kind in needed if not _has(path, kind)]
        why = "the repository, or its copy in the hub's cache, lacks them"
    except Exception as error:  # the hub client's network errors have no common class
        missing, why = needed, first_line(error)
    if missing:
        files = ", ".join(HUB_FILES.get(kind, [kind])[0] for kind in missing)
        at_revision = f" --revision {revision}" if revision else ""
        raise InputError(
            f"{path_or_hub_id}: no such folder, and missing on the hub or in its cache: {files} "
            f"({why}); check the name, or where there is network: hf download {name}{at_revision}")
    return path


def _download(name, revision, kinds):
    from huggingface_hub import constants, snapshot_download
    patterns = [file for kind in kinds for file in HUB_FILES.get(kind, [kind])]
    for ignored in (["*.bin", "*.bin.index.json"], None):
        path = Path(snapshot_download(
            name, revision=revision, local_files_only=constants.HF_HUB_OFFLINE,
            allow_patterns=patterns, ignore_patterns=ignored))
        if not {"weights", "open_clip"} & set(kinds) or any(path.glob("*model*.safetensors")):
            break
    return path


def _has(folder, kind):
    return any(any(folder.glob(pattern)) for pattern in HUB_FILES.get(kind, [kind]))


# ------------------------------------------------------------------------------ checkpoints

def step_of(folder) -> int:
    """Return STEP of a folder checkpoint-STEP."""
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoints(out) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    folders = [f for f in Path(out).glob("checkpoint-*") if f.is_dir() and f.name[11:].isdigit()]
    return sorted(folders, key=step_of)


def last_one(out) -> str:
    """Return what the newest checkpoint of a run is, as part of a sentence."""
    kept = checkpoints(out)
    return f"{kept[-1]} is whole" if kept else "none was saved before"


def save(folder, showo, trainer, keep_last=0):
    """Write a checkpoint folder, then delete older ones but the last keep_last (0 = keep all).

    It is written under another name, flushed to the disk, and renamed: a folder that has its name
    is complete. trainer: the dict that trainer.pt holds. Raises InputError when it cannot be
    written; the checkpoints before stay as they are."""
    out, tmp_path = folder.parent, folder.with_name("." + folder.name)
    for leftover in out.glob(".checkpoint-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        showo.save(tmp_path)
        torch.save(trainer, tmp_path / "trainer.pt")
        for path in (*tmp_path.iterdir(), tmp_path):
            flush(path)
        replaced = set_aside(folder)
        tmp_path.rename(folder)
        flush(out)
        if not folder.name[11:].isdigit():      # checkpoint-best: the one before was the same run's
            shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(tmp_path, ignore_errors=True)
        raise InputError(f"{folder}: cannot be saved ({first_line(error)}); {last_one(out)}; "
                         "make room and continue with --resume") from None

    older = [old for old in checkpoints(out) if step_of(old) <= trainer["step"]]
    for old in older[:-keep_last] if keep_last else []:
        shutil.rmtree(old.rename(old.with_name("." + old.name)), ignore_errors=True)


class Lock:
    """A folder that belongs to one process until it ends: OUT/lock.json says which.

    The system's own lock on that file ends with its owner, so that a dead owner on this host is
    followed at once. Of an owner on another host (a shared file system) nothing is known: its
    file must be removed by hand."""

    def __init__(self, out):
        self.path, self.file = Path(out) / "lock.json", None

    def acquire(self):
        """Claim the folder, unless it is claimed. Raises InputError that says who holds it."""
        if self.file:
            return
        file = open(self.path, "a+")    # until release()
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        file.seek(0)
        owner = file.read(1000).strip()
        host = socket.gethostname()
        if not free or (owner and f'"host": {json.dumps(host)}' not in owner):
            file.close()
            hint = "wait for it, or end it" if not free else f"if it has ended, delete {self.path}"
            raise InputError(f"--out {self.path.parent}: another run is there ({owner}); {hint}")
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"host": host, "pid": os.getpid(), "started": started}))
        file.flush()
        self.file = file

    def release(self):
        """Give the folder back, if this process holds it."""
        if self.file:
            self.file.truncate(0)       # not deleted: another process may have it open
            self.file.close()
            self.file = None


def flush(path):
    """Return when what was written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def set_aside(folder):
    """Rename a checkpoint that another one is to replace, if it is there -> its new name."""
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    return replaced


def read_trainer(folder) -> dict:
    """Return what trainer.pt of a checkpoint folder holds. Raises InputError."""
    path = Path(folder) / "trainer.pt"
    if not path.exists():
        raise InputError(f"{folder}: no checkpoint of train.py (no trainer.pt there)")
    wanted = {"step": int, "world": int, "n_bad": int, "args": dict, "optimizer": dict,
              "filter": dict}
    try:
        trainer = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive raises whatever its bytes lead to
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from None
    sound = isinstance(trainer, dict) and all(
        type(trainer.get(name)) is kind for name, kind in wanted.items())
    if not sound or trainer["step"] < 0 or trainer["world"] < 1:
        raise InputError(f"{path}: was not written by train.py, or by another version of it")
    return trainer


def newest(out) -> Path | None:
    """Return the newest checkpoint of a run that can be read, None when none was saved yet.

    Raises InputError when there is no run, or none of its checkpoints can be read."""
    best = [Path(out) / "checkpoint-best"]
    folders = [folder for folder in best if folder.is_dir()] + checkpoints(out)
    for folder in reversed(folders):
        try:
            read_trainer(folder)
            read_weights(folder)
            for name in HUB_FILES["config"]:
                read_json(folder / name)
            return folder
        except InputError as error:
            print(f"--resume: passing over {folder.name}: {error}", file=sys.stderr)
    if folders:
        raise InputError(f"--resume: no checkpoint in {out} is whole; to begin again, "
                         "choose another --out")
    if not (Path(out) / "metrics.jsonl").exists():
        raise InputError(f"--resume: no checkpoint in {out}")
    return None


def rewind(out, step):
    """Take back what a run did after a step, which it will do again: rows and grids of pictures are
    deleted, checkpoints renamed. Raises InputError when the rows cannot be read."""
    kept = {name: [row for row in read_rows(out / name) if row["step"] <= step]
            for name in ("metrics.jsonl", "eval.jsonl") if (out / name).exists()}
    # rows last: while they are there, a rewind that is cut off can be done again
    for folder in checkpoints(out):
        if step_of(folder) > step:
            set_aside(folder)
    best = out / "checkpoint-best"
    if best.is_dir() and read_trainer(best)["step"] > step:
        set_aside(best)
    for picture in (out / "samples").glob("step-*.png"):
        if picture.stem[5:].isdigit() and int(picture.stem[5:]) > step:
            picture.unlink()
    for name, rows in kept.items():
        tmp_path = out / f".{name}"
        tmp_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flush(tmp_path)
        tmp_path.replace(out / name)


# ------------------------------------------------------------------------------ a run's folder

def output_path(args) -> Path:
    """Return --out, the folder of the run to resume, or a new one under runs/."""
    if args.out or args.resume:
        out = args.out or str(Path(args.resume).resolve().parent)
        if not out.isprintable():
            raise InputError(f"--out {out!r}: give a name of printable characters")
        return Path(out)
    return Path("runs") / f"{Path(args.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def claim_output(args, out, lock):
    """Create and lock the output folder. Raises InputError when it holds another run."""
    if lock.path.exists():
        lock.acquire()      # says who is there
    own = args.resume == "auto"
    if args.resume and not own:
        own = out.resolve() == Path(args.resume).resolve().parent
    rows = out / "metrics.jsonl"
    if not own and rows.exists() and rows.stat().st_size:
        raise InputError(f"--out {out}: holds another run; continue it with --resume or choose "
                         "another folder")
    out.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    rows.touch()            # from now on --resume continues this run, whenever it is stopped


def read_resumed(folder, args) -> dict:
    """Return trainer.pt of the checkpoint that --resume continues.

    Raises InputError when it cannot be read, or is of another kind of run."""
    resumed = read_trainer(folder)
    if resumed["step"] > args.steps:
        raise InputError(f"--resume {folder}: that run is past --steps {args.steps}")
    for name in MUST_MATCH:
        before, now = resumed["args"].get(name), getattr(args, name)
        if before != now:
            raise InputError(f"--resume {folder}: that run has --{name.replace('_', '-')} {before},"
                             f" not {now}; give the same value, or start anew in another --out")
    return resumed


def resume_notice(resumed, args, world) -> str:
    """Return what a resumed run does not have in common with the one that it continues, or ""."""
    saved = resumed["args"] | {"processes": resumed["world"]}
    changed = [f"{name} {saved[name]} -> {value}"
               for name, value in {**vars(args), "processes": world}.items()
               if name not in MAY_CHANGE and saved.get(name, value) != value]
    return f"notice: changed since that checkpoint: {', '.join(changed)}" if changed else ""


def check_state(resumed, optimizer):
    """Raise InputError unless trainer.pt has what AdamW and the filter keep, of the right shape."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        group, = resumed["optimizer"]["param_groups"]
        fits = group.keys() == optimizer.param_groups[0].keys()
        fits = fits and group["params"] == list(range(len(params)))
        fits = fits and all(isinstance(beta, float) for beta in (*group["betas"], group["eps"]))
        for i, state in resumed["optimizer"]["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                fits = fits and state[name].shape == params[i].shape
            fits = fits and state["step"].numel() == 1
        fits = fits and all(isinstance(std, float) for std in resumed["filter"]["history"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        fits = False
    if not fits:
        raise InputError("--resume: the optimizer or the filter in trainer.pt does not fit this "
                         "model; take another checkpoint")
