"""What lies on the disk: weight files and hub folders, which model.py reads and writes, and the folder of a run of train.py.

OUT/metrics.jsonl, eval.jsonl      one JSON object per optimizer step, per evaluation
OUT/samples/step-STEP.png          grids of fixed evaluation prompts
OUT/checkpoint-STEP/               Show-o's own layout (load it anywhere Show-o is loaded) + trainer.pt: step, flags,
                                   optimizer, filter history + manifest.json: size and CRC-32 of every file. Random states
                                   need no saving: they are functions of the seed, the step and the prompt slot.
"""
import atexit
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule

WEIGHT_NAMES = [stem + ext for ext in (".safetensors", ".bin") for stem in ("pytorch_model", "model")]
FILES = {"config": ["config.json", "phi_config.json"], "weights": ["pytorch_model*", "model*"],
         "tokenizer": ["tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"]}


class InputError(ValueError):
    """Something the user gave is wrong; the message names the file, line or flag and what to do about it."""


# ------------------------------------------------------------------------------------------- weight files

def read_weights(path, *, device="cpu", dtype=None) -> dict:
    """A weight file, or a folder with one (or with shards and their index) -> state_dict. No pickled objects are run.

    Files are mapped: a weight that stays on the CPU as it is costs no copy, others are moved and cast (those in floating
    point, to dtype) one by one. Raises InputError."""
    path = Path(path)
    if path.is_dir():
        for name in WEIGHT_NAMES:
            if (path / name).exists():
                return read_weights(path / name, device=device, dtype=dtype)
            if (path / (name + ".index.json")).exists():
                shards = read_json(path / (name + ".index.json")).get("weight_map")
                if not isinstance(shards, dict) or not shards or not all((path / str(shard)).is_file() for shard in shards.values()):
                    raise InputError(f"{path / name}.index.json: names shards that are not there; fetch or copy the folder again")
                return {k: v for shard in sorted(set(shards.values())) for k, v in read_weights(path / shard, device=device, dtype=dtype).items()}
        raise InputError(f"{path}: no weights there; expected one of {', '.join(WEIGHT_NAMES)}")
    move = lambda weight: weight.to(device, dtype if dtype and weight.is_floating_point() else weight.dtype)  # noqa: E731
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path, move)
        return _read_pickle(path, move)
    except (MemoryError, torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # torch.load raises whatever a damaged archive makes it raise
        raise InputError(f"{path}: cannot be read as a {'safetensors' if isinstance(error, SafetensorError) else 'weights'} "
                         f"file ({first_line(error)}); fetch or copy it again") from None


def _read_safetensors(path, move):
    file, state = safe_open(path, framework="pt"), {}
    for name in file.keys():
        weight = file.get_tensor(name)
        state[name] = move(weight)
        if state[name] is not weight:
            del weight
            file = safe_open(path, framework="pt")  # the old mapping goes, and the pages read through it
    return state


def _read_pickle(path, move):
    """torch.save's files. Mapped like the others; the mapping is of the whole file, so it is made anew every 64 MB, and the
    largest weights come first, while little else is in memory."""
    load = lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # noqa: E731
    state, out, copied = load(), {}, 0
    nested = isinstance(state, dict) and "state_dict" in state
    state = state["state_dict"] if nested else state
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided and not v.is_meta
                                              for k, v in state.items()):
        raise InputError(f"{path}: not a state_dict (a flat mapping from names to tensors)")
    for name in sorted(state, key=lambda name: -state[name].nbytes):
        out[name] = move(state[name])
        copied += out[name].nbytes if out[name] is not state[name] else 0
        if copied > 2 ** 26:
            state, copied = None, 0
            state = load()["state_dict"] if nested else load()
    return out


def write_weights(path, state):
    """Aside, then renamed: the weights may be mapped from the very file they replace."""
    aside = path.with_name("." + path.name)
    save_file({name: weight.contiguous() for name, weight in state.items()}, aside, metadata={"format": "pt"})
    os.replace(aside, path)


def build(path, kind, *args, **kwargs):
    """kind(*args, **kwargs) without memory for its weights; raises InputError that names path when its sizes are odd."""
    try:
        with torch.device("meta"):
            return kind(*args, **kwargs)
    except Exception as error:  # whatever odd sizes lead to
        raise error if isinstance(error, InputError) else InputError(f"{path}: cannot build {kind.__name__} of these sizes ({first_line(error)})") from None


def load_strict(model, state, path):
    """model.load_state_dict without a copy; raises InputError with the names and shapes that do not fit."""
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    given = {k: tuple(v.shape) for k, v in state.items()}
    faults = ([f"missing {k}" for k in wanted.keys() - given.keys()] + [f"surplus {k}" for k in given.keys() - wanted.keys()]
              + [f"{k} has shape {list(given[k])}, wanted {list(wanted[k])}" for k in wanted.keys() & given.keys()
                 if wanted[k] != given[k]])
    if faults:
        raise InputError(f"{path}: {len(faults)} weights do not fit {type(model).__name__}: {'; '.join(sorted(faults)[:5])}"
                         f"{' ...' if len(faults) > 5 else ''}; is this the right checkpoint, or its config.json of another size?")
    model.load_state_dict(state, assign=True)


def fetch(path_or_hub_id, needed, optional=(), revision=None) -> Path:
    """A local path as it is; else the folder of a hub repository (NAME or NAME@REVISION), which may be in the hub's cache.
    needed, optional: kinds of FILES, or file names. Raises InputError that says what is missing and how to fetch it."""
    path = Path(path_or_hub_id)
    if path.parts[:1] == ("shapes",):  # the embedded default, from any working folder
        path = Path(__file__).parent / path
    if path.exists():
        return path
    name, _, pinned = str(path_or_hub_id).partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{path_or_hub_id}: no such file or folder, and not a hub id (owner/name)")
    from huggingface_hub import constants, snapshot_download
    revision, missing = revision or pinned or None, needed
    try:
        for without in (["*.bin", "*.bin.index.json"], None) if "weights" in needed else (None,):  # of weights in both formats one is enough
            path = Path(snapshot_download(name, revision=revision, local_files_only=constants.HF_HUB_OFFLINE, ignore_patterns=without,
                                          allow_patterns=[f for kind in (*needed, *optional) for f in FILES.get(kind, [kind])]))
            if any(path.glob("*model*.safetensors")):
                break
        missing = [kind for kind in needed if not any(True for pattern in FILES.get(kind, [kind]) for _ in path.glob(pattern))]
        why = "the repository, or its copy in the hub's cache, lacks them"
    except Exception as error:  # the hub client's network errors have no common class
        why = first_line(error)
    if missing:
        raise InputError(f"{path_or_hub_id}: no such folder, and missing on the hub or in its cache: {', '.join(FILES.get(kind, [kind])[0] for kind in missing)} "
                         f"({why}); check the name, or where there is network run: hf download {name}{f' --revision {revision}' if revision else ''}")
    return path


def read_json(path) -> dict:
    """The object in a JSON file; raises InputError."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object")
    return content


def write_json(path, content):
    """For people: indented."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def first_line(error) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ------------------------------------------------------------------------------------------- the folder of a run

SAME = ("model", "group_size", "unmask_steps", "transition", "trajectory", "inner_epochs", "no_kl", "seed")
FREE = ("out", "resume", "wandb", "recipe", "prompts_per_step", "eval_every", "sample_every", "save_every", "keep_last", "check_every")  # may change unsaid
ALARMS = {"ratio_max": 10.0, "approx_kl": 0.5, "kl_ref": 10.0}  # above it, the policy has left what sampled, or the reference, far behind


def save(folder, state, weights, showo, keep_last=0):
    """Write a checkpoint folder: aside, flushed to the disk, then renamed, so that its name means that it is complete; then drop
    older ones but the last keep_last (0 = keep all).

    state: what trainer.pt holds; weights: showo's state_dict. Raises InputError when it cannot be written; older ones stay as they are."""
    for left in folder.parent.glob(".checkpoint-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name("." + folder.name)
    try:
        showo.save(aside, weights)
        torch.save(state, aside / "trainer.pt")
        write_json(aside / "manifest.json", {file.name: [file.stat().st_size, crc32(file)] for file in sorted(aside.iterdir())})
        for path in (*aside.iterdir(), aside):
            flush(path)
        aside.rename(folder)
        flush(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        kept = checkpoints(folder.parent)
        raise InputError(f"{folder}: cannot be saved ({first_line(error)}); {f'{kept[-1]} is whole' if kept else 'none was saved before'}; "
                         "make room and continue with --resume") from None
    older = [old for old in checkpoints(folder.parent) if step_of(old) <= state["step"]]
    for old in older[:-keep_last] if keep_last else ():
        shutil.rmtree(old.rename(old.with_name("." + old.name)), ignore_errors=True)


def whole(showo, optimizer):
    """Weights and optimizer state under the names of the weights, as one process alone has them; all processes call it. When they
    are in shards (--fsdp), they are put together on the CPU of process 0, the others get nothing."""
    sharded = isinstance(showo, FSDPModule)
    if sharded:
        showo.reshard()
    stepped = optimizer if optimizer.state else ()  # of one that has not, the library would make a state by a step
    state = get_state_dict(showo, stepped, options=StateDictOptions(full_state_dict=True, cpu_offload=sharded))
    if sharded:
        showo.unshard()
    return state


def load_optimizer(showo, optimizer, state):
    """What whole() gave -> optimizer, in shards if its parameters are."""
    decay = optimizer.param_groups[0]["weight_decay"]
    if state:
        set_optimizer_state_dict(showo, optimizer, state, options=StateDictOptions(full_state_dict=True))
    optimizer.param_groups[0]["weight_decay"] = decay  # as the flag says now


def flush(path):
    """What was written there is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def crc32(path) -> int:
    """The CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2 ** 24):
            value = zlib.crc32(block, value)
    return value


def step_of(folder) -> int:
    """checkpoint-STEP -> STEP."""
    return int(folder.name[11:])


def checkpoints(out) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    return sorted((f for f in Path(out).glob("checkpoint-*") if f.name[11:].isdigit() and f.is_dir()), key=step_of)


def damage(folder) -> str | None:
    """What is wrong with a checkpoint folder, by its manifest; None when it is as it was saved."""
    if not folder.is_dir():
        return "no such folder"
    try:
        manifest = read_json(folder / "manifest.json")
        for name, (size, crc) in manifest.items():
            if (folder / name).stat().st_size != size or crc32(folder / name) != crc:
                return f"{folder / name} is not as it was saved"
    except (OSError, ValueError, TypeError) as error:
        return first_line(error)
    return None if "trainer.pt" in manifest else f"{folder}/manifest.json does not list trainer.pt"


def find(args, rank):
    """--resume -> (checkpoint folder, its trainer.pt); auto: the newest whole one of --out, or (None, None) when that run was
    stopped before it saved one. Process 0 looks for all. Raises InputError when there is none, or it is of another kind of run."""
    found = [None, None]
    if rank == 0:
        try:
            found[0] = newest(args.out) if args.resume == "auto" else Path(args.resume)
            fault = damage(found[0]) if found[0] and args.resume != "auto" else None
            found[1] = fault and f"--resume {found[0]}: cannot be used: {fault}"
        except InputError as error:
            found[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    folder, fault = found
    if fault or folder is None:
        if fault:
            raise InputError(fault)
        return None, None
    try:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
        saved = state["args"]
    except Exception as error:  # torch.load raises whatever a damaged archive makes it raise
        raise InputError(f"--resume {folder}: trainer.pt cannot be read ({first_line(error)})") from None
    for name in SAME:
        if saved.get(name) != getattr(args, name):
            raise InputError(f"--resume {folder}: that run has --{name.replace('_', '-')} {saved.get(name)}, not "
                             f"{getattr(args, name)}; give the same value, or start a new run in another --out")
    return folder, state


def newest(out):
    """The newest whole checkpoint of a run; None when it was stopped before it saved one. Raises InputError when all are damaged, or
    there is no run."""
    there = checkpoints(out)
    for folder in reversed(there):
        if (fault := damage(folder)) is None:
            return folder
        print(f"--resume: passing over {folder.name}: {fault}", file=sys.stderr)
    if there:
        raise InputError(f"--resume: no checkpoint in {out} is whole; to begin again, choose another --out")
    if not (Path(out) / "metrics.jsonl").exists():
        raise InputError(f"--resume: no checkpoint in {out}")


def differences(resumed, args, world):
    """What a resumed run does not have in common with the one it continues -> lines to say."""
    saved = resumed["args"]
    before, now = resumed["world"] * saved["prompts_per_step"], world * args.prompts_per_step
    if before != now:
        yield f"notice: a step takes {now} prompts, it was {before}: their order and the size of a batch are not those of the run before"
    elif resumed["world"] != world:
        yield f"notice: {world} processes, they were {resumed['world']}: the same prompts and noise, but for the last digits of sums"
    for name, value in vars(args).items():
        if name not in FREE and name in saved and saved[name] != value:
            yield f"notice: --{name.replace('_', '-')} is {value}, it was {saved[name]}"


class Stop:
    """SIGTERM and SIGINT ask for a stop at the next step boundary, where all processes agree; a second one ends at once, unless it
    comes within a second (torchrun passes on what the whole process group gets, too). A thread listens, since the main one may be
    waiting for other processes."""

    def __init__(self):
        self.asked, (heard, said) = 0.0, socket.socketpair()
        said.setblocking(False)
        signal.set_wakeup_fd(said.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        thread = threading.Thread(target=self.listen, args=(heard,), daemon=True)
        thread.start()

        def end():
            """Before the interpreter goes, and a thread that waits in it."""
            signal.set_wakeup_fd(-1)
            said.close()  # and recv() below returns nothing
            thread.join()
        atexit.register(end)

    def listen(self, heard):
        """Runs beside the training."""
        while number := heard.recv(1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                if self.asked and time.monotonic() - self.asked > 1:
                    os._exit(128 + number[0])
                self.asked = self.asked or time.monotonic()


def in_step(params, gather):
    """Raise InputError, naming them, when some processes no longer hold the parameters of most, bit by bit. params: float32;
    gather: Long[1] -> Long[world], as train.py's all_cat."""
    sums = gather(sum(p.detach().view(torch.int32).sum(dtype=torch.int64) for p in params)[None]).tolist()
    usual, n = Counter(sums).most_common(1)[0]
    off = [str(rank) for rank, value in enumerate(sums) if value != usual]
    if off:
        raise InputError(f"process {', '.join(off)} of {len(sums)} no longer holds the parameters of {'the others' if 2 * n > len(sums) else 'process 0'}; "
                         "look at the memory and the links of its machine, and go back to a checkpoint with --resume")


def output_folder(args, rank) -> Path:
    """--out, the folder of the run to resume, or a new one under runs/. Raises InputError when it holds another run."""
    if args.out or args.resume:
        out = Path(args.out or Path(args.resume).resolve().parent)
    else:
        name = [f"{Path(args.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"]
        if dist.is_initialized():
            dist.broadcast_object_list(name)
        out = Path("runs") / name[0]
    own = args.resume and (args.resume == "auto" or out.resolve() == Path(args.resume).resolve().parent)
    rows = out / "metrics.jsonl"
    if not own and rows.exists() and rows.stat().st_size:
        raise InputError(f"--out {out}: holds another run; continue it with --resume or choose another folder")
    if dist.is_initialized():
        dist.barrier()  # nobody writes before everybody has looked
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        rows.touch()  # from now on --resume continues this run, whenever it is stopped
    return out


def read_rows(path) -> list[dict]:
    """The objects of a jsonl file; none when there is no such file; a last line cut off by a crash is passed over."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path}: cannot be read as text; mend it, or move it away") from None
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if i + 1 < len(lines):
                raise InputError(f"{path}: line {i + 1} is not JSON") from None
    return rows


def rewind(out, step):
    """What came after a step is computed again: set its checkpoints aside, then its grids, then its rows."""
    stamp = f"before-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    for folder in checkpoints(out):
        if step_of(folder) > step:
            folder.rename(folder.with_name(f"{folder.name}.{stamp}"))
    for picture in (out / "samples").glob("step-*.png"):
        if picture.stem[5:].isdigit() and int(picture.stem[5:]) > step:
            picture.rename(picture.with_name(f"{picture.name}.{stamp}"))
    for name in ("metrics.jsonl", "eval.jsonl"):
        rows = read_rows(out / name)
        if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
            raise InputError(f"{out / name}: a line of it is no row of a run; mend that line, or move the file away")
        kept = [row for row in rows if row["step"] <= step]
        aside = out / ("." + name)
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
        flush(aside)
        if len(kept) < len(rows):
            shutil.copy(out / name, out / f"{name}.{stamp}")
        aside.replace(out / name)


class Log:
    """metrics.jsonl, eval.jsonl, one line a step on the screen; only the first process writes."""

    def __init__(self, out, args, rank, start_step):
        self.out, self.args, self.on, self.begun, self.start = out, args, rank == 0, time.time(), start_step
        self.wandb = None
        if self.on:
            rewind(out, start_step)
            if args.wandb:
                import wandb
                self.wandb = wandb.init(project=args.wandb, name=out.name, config=vars(args))

    def __call__(self, name, row):
        if self.on:
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}  # JSON knows no NaN
            try:
                with open(self.out / name, "a") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise InputError(f"{self.out / name}: cannot be written ({error.strerror}); make room and continue with --resume") from None
            if self.wandb:
                self.wandb.log({f"{name.split('.')[0]}/{k}": v for k, v in row.items()}, step=row["step"])

    def say(self, *words):
        if self.on:
            print(*words, flush=True)

    def step(self, row):
        """One optimizer step: a row of metrics.jsonl, and a line with a progress bar and the time left."""
        self("metrics.jsonl", row)
        done, steps = row["step"], self.args.steps
        left = (time.time() - self.begun) / max(done - self.start, 1) * (steps - done)
        bar = "#" * (20 * done // steps)
        self.say(f"{done:5d}/{steps} [{bar:<20}] {left // 60:.0f}:{left % 60:02.0f} left | reward {row['reward_mean']:.3f} "
                 f"zero-adv {row['adv_zero']:.2f} ratio {row['ratio_mean']:.3f} kl {row['approx_kl']:.1e} clip {row['clip_fraction']:.2f} "
                 f"grad {row['grad_norm']:.2f} entropy {row['entropy']:.2f} lr {row['lr']:.1e} | {row['images_per_s']:.1f} img/s")
        for name, most in ALARMS.items():
            if row[name] > most:
                self.say(f"ALARM: {name} {row[name]:.3g} is above {most:g}; a smaller --lr or fewer --inner-epochs may help")
        if row["skipped"]:
            self.say(f"step {done} skipped, something was not finite: {'; '.join(row['faults']) or 'the sum of the gradients'}")


def closing_table(out, say):
    rows = read_rows(out / "eval.jsonl")
    if len(rows) > 1:
        say(f"\n{'':<16}{'before':>8} -> {'after':<8}  (steps {rows[0]['step']} and {rows[-1]['step']})")
        for name in (key for key in rows[0] if key != "step" and None not in (rows[0][key], rows[-1].get(key))):
            say(f"{name:<16}{rows[0][name]:8.3f} -> {rows[-1][name]:<8.3f}")


def before_and_after(folder):
    """The first grid above the last one, in before_after.png."""
    first, last = Image.open(folder / "step-000000.png"), Image.open(max(folder.glob("step-*.png")))
    sheet = Image.new("RGB", (first.width, first.height + last.height + 8), "black")
    sheet.paste(first, (0, 0))
    sheet.paste(last, (0, first.height + 8))
    sheet.save(folder / "before_after.png")
