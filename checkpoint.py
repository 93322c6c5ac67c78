"""Saving and resuming a run of train.py.

OUT/metrics.jsonl, eval.jsonl      one JSON object per optimizer step, per evaluation
OUT/samples/step-STEP.png          grids of fixed evaluation prompts
OUT/checkpoint-STEP/               Show-o's own layout (load it anywhere Show-o is loaded) + trainer.pt: step, flags,
                                   optimizer, filter history. Random states need no saving: they are functions of the seed,
                                   the step and the prompt slot.
"""
import json
import pickle
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from model import InputError

SAME = ("model", "group_size", "prompts_per_step", "unmask_steps", "transition", "inner_epochs", "no_kl", "steps", "lr", "seed")


def save(folder, step, showo, optimizer, sample_filter, args):
    """Write a checkpoint folder; it gets its name only when it is complete."""
    aside = folder.with_name("." + folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    showo.save(aside)
    torch.save({"step": step, "args": vars(args), "optimizer": optimizer.state_dict(),
                "filter": sample_filter.state_dict() if sample_filter else {"history": []}}, aside / "trainer.pt")
    if folder.exists():
        shutil.rmtree(folder)
    aside.rename(folder)


def find(args):
    """--resume -> (checkpoint folder, its trainer.pt). Raises InputError when there is none, or it is of another kind of run."""
    folder = Path(args.resume)
    if args.resume == "auto":
        found = [f for f in Path(args.out).glob("checkpoint-*") if (f / "trainer.pt").exists()]
        if not found:
            raise InputError(f"--resume: no checkpoint in {args.out}")
        folder = max(found, key=lambda f: int(f.name.split("-")[1]))
    try:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"--resume {folder}: trainer.pt cannot be read ({str(error).splitlines()[0][:150]})") from None
    for name in SAME:
        if state["args"].get(name) != getattr(args, name):
            raise InputError(f"--resume {folder}: that run has --{name.replace('_', '-')} {state['args'].get(name)}, not "
                             f"{getattr(args, name)}; give the same value, or start a new run in another --out")
    return folder, state


def output_folder(args, rank) -> Path:
    """--out, the folder of the run to resume, or a new one under runs/. Raises InputError when it holds another run."""
    if args.out or args.resume:
        out = Path(args.out or Path(args.resume).resolve().parent)
    else:
        name = [f"{Path(args.model).name}-{time.strftime('%Y%m%d-%H%M%S')}"]
        if dist.is_initialized():
            dist.broadcast_object_list(name)
        out = Path("runs") / name[0]
    if not args.resume and (out / "metrics.jsonl").exists():
        raise InputError(f"--out {out}: holds another run; continue it with --resume or choose another folder")
    if dist.is_initialized():
        dist.barrier()  # nobody writes before everybody has looked
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    return out


def read_rows(path) -> list[dict]:
    """The objects of a jsonl file; none when there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rewind(out, step):
    """Drop the rows after a step: a resumed run computes them again."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        kept = [row for row in read_rows(out / name) if row["step"] <= step]
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in kept))
