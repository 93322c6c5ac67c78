"""A run's folder: which one, may it be used, its log, its checkpoints; and how a run is stopped.

    OUT/checkpoint-STEP/    Show-o's own layout, which loads wherever Show-o is loaded, and
                            trainer.pt: step, flags, filter, LoRA adapters
                            optimizer.pt: its state; the newest two checkpoints keep it
    OUT/metrics.jsonl, eval.jsonl, samples/step-STEP.png and before_after.png, lock, wandb.json

Folders and files are written under a temporary name and then renamed, so that whatever has its name
is complete.
"""
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from support.processes import Ended, all_lists, barrier, of_first, rank, together
from support.weights import read_json, write_json

# a resumed run must keep these flags
FIXED = "model ckpt group_size unmask_steps transition inner_epochs kl lora seed".split()
FREE = "out resume device wandb".split()        # these may change without a word


def read_rows(path) -> list[dict]:
    """Return the rows of a jsonl file, without a last line that a crash cut off."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def checkpoints(out) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    folders = [f for f in Path(out).glob("checkpoint-*") if f.name[11:].isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]))


def grid_path(out, step) -> Path:
    return out / f"samples/step-{step:06d}.png"


# ------------------------------------------------------------------------------ begin, or go on

def open_run(args):
    """Return the output folder, the checkpoint to go on from, or None, and process 0's lock of the
    folder, which the system releases when its owner is gone. Process 0 chooses for all."""
    chosen = together(lambda: choose_folder(args) if rank() == 0 else (None, None, None))
    out, folder = of_first(chosen[:2])
    if folder and not (folder / "trainer.pt").exists():
        raise SystemExit(f"--resume: {folder} is not on the machine of process {rank()}; every "
                         "machine needs it: use a folder that all of them see, or a copy")
    return out, folder, chosen[2]


def choose_folder(args):
    """Choose for open_run(), in process 0. Without --resume, a folder that holds a run is
    refused."""
    resumed = Path(args.resume) if args.resume and args.resume != "auto" else None
    new = f"{Path(args.model).name}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    out = Path(args.out or (resumed.parent if resumed else Path("runs") / new))
    if resumed and checkpoints(resumed):        # a run's folder: its newest
        resumed, out = checkpoints(resumed)[-1], Path(args.out or resumed)
    elif resumed and not (resumed / "trainer.pt").exists():
        raise SystemExit(f"--resume: there is no checkpoint in {resumed}")
    try:
        out.mkdir(parents=True, exist_ok=bool(args.out or resumed))
        lock = lock_folder(out)
        rows = out / "metrics.jsonl"
        holds_a_run = bool(checkpoints(out)) or (rows.exists() and rows.stat().st_size > 0)
        rows.touch()
    except OSError as error:
        raise SystemExit(f"--out {out}: cannot be written to ({error.strerror}); choose a folder "
                         "with --out") from None

    own = resumed and resumed.resolve().parent == out.resolve()
    if holds_a_run and not (own or args.resume == "auto"):
        raise SystemExit(f"--out {out}: holds another run; choose another folder, or go on with "
                         f"--resume --out {out}")
    if args.resume == "auto":
        resumed = (checkpoints(out) or [None])[-1]
        if not resumed:
            print(f"--resume: there is no checkpoint in {out}, the run begins anew", flush=True)
    if resumed and not (resumed / "trainer.pt").exists():
        raise SystemExit(f"--resume: {resumed} has no trainer.pt; go on from an older checkpoint")
    return out, resumed, lock


def lock_folder(out) -> FileLock:
    """Return a lock of a folder; SystemExit if another run has it."""
    lock = FileLock(out / "lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SystemExit(f"--out {out}: another run is in it; wait for it, or end it") from None
    except OSError as error:
        # some file systems have no locks, as Lustre
        print(f"WARNING: {out} cannot be locked ({error.strerror}): take care that no other run"
              " writes into it", file=sys.stderr)
    return lock


def rewind(out, step):
    """Drop the rows and grids and rename the checkpoints of the steps that a resumed run will do
    again."""
    for folder in checkpoints(out):
        if int(folder.name[11:]) > step:
            folder.replace(f"{folder}.replaced-{time.time_ns()}")
    for grid in out.glob("samples/step-*.png"):
        if int(grid.stem[5:]) > step:
            grid.unlink()
    for path in filter(Path.exists, (out / "metrics.jsonl", out / "eval.jsonl")):
        rows = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
        path.with_suffix(".part").write_text("".join(rows))
        path.with_suffix(".part").replace(path)


def begin(out, trainer, sample_filter):
    """Return the step that a run begins with, and whether its weights were evaluated before. What
    a resumed run will do again is dropped: only now, when nothing can fail any more."""
    start, evaluated = 0, False
    if trainer:
        start = trainer["step"]
        sample_filter.load_state_dict(trainer["filter"])
    if rank() == 0:
        rewind(out, start if trainer else -1)
        evaluated = start in [row["step"] for row in read_rows(out / "eval.jsonl")]
    return start, of_first(evaluated)


def load_trainer(folder, args) -> dict:
    """Return trainer.pt of a checkpoint of the same kind of run."""
    trainer = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    changed = [f"--{name.replace('_', '-')} {trainer['args'][name]}" for name in FIXED
               if trainer["args"][name] != getattr(args, name)]
    if changed:
        raise SystemExit(f"--resume {folder}: that run has {', '.join(changed)}; give the same, or "
                         "begin anew in another --out")
    if trainer["step"] > args.steps:
        raise SystemExit(f"--resume {folder}: that run is past --steps {args.steps}")
    if not (folder / "optimizer.pt").exists():
        raise SystemExit(f"--resume {folder}: only the newest two checkpoints keep the optimizer's "
                         f"state; begin anew from its weights, with --ckpt {folder}")
    return trainer


def changes(before: dict, now: dict) -> str:
    """Return each setting that a resumed run changes: "--lr 0.1 -> 0.2, ..."."""
    return ", ".join(("" if " " in name else "--") + f"{name.replace('_', '-')} {before[name]} -> "
                     f"{value}" for name, value in now.items()
                     if name in before and name not in FREE and before[name] != value)


# ------------------------------------------------------------------------------ save

def save(out, step, showo, optimizer, sample_filter, settings, stop):
    """Write a checkpoint, then delete all older ones but --keep-last (0 = keep all). Every process
    calls it, and waits until the checkpoint is whole. A signal during the save is obeyed
    afterwards. Weights that are not finite are not saved."""
    if not all(bool(p.isfinite().all()) for p in showo.parameters()):
        with contextlib.suppress(OSError):
            if rank() == 0:
                print(f"step {step}: the weights are not finite and were not saved", flush=True)
        return
    before, stop.saving = stop.saving, True
    if settings["zero"]:
        optimizer.consolidate_state_dict(to=0)
    if rank() == 0:
        write_checkpoint(out, step, showo, optimizer, sample_filter, settings)
    barrier()
    stop.saving = before


def write_checkpoint(out, step, showo, optimizer, sample_filter, settings):
    """Do process 0's part of save()."""
    for left in out.glob(".checkpoint-*"):      # by a process that was killed
        shutil.rmtree(left)
    tmp = out / f".checkpoint-{step}"
    try:
        showo.save(tmp)
        torch.save(optimizer.state_dict(), tmp / "optimizer.pt")
        torch.save({"step": step, "args": settings, "filter": sample_filter.state_dict(),
                    "lora": showo.trainable() if settings["lora"] else {}}, tmp / "trainer.pt")
    except (OSError, RuntimeError, SafetensorError) as error:   # whichever library was writing
        free = shutil.disk_usage(out).free
        why = "no space left" if free < 2 ** 26 else str(error).splitlines()[0][:99]
        shutil.rmtree(tmp, ignore_errors=True)
        raise SystemExit(f"{tmp}: cannot be written ({why}); the checkpoints before it are "
                         "whole") from None
    tmp.replace(out / f"checkpoint-{step}")

    for old in checkpoints(out)[:-2]:
        (old / "optimizer.pt").unlink(missing_ok=True)
    for old in checkpoints(out)[:-settings["keep_last"]] if settings["keep_last"] else []:
        shutil.rmtree(old.replace(out / f".{old.name}"))


# ------------------------------------------------------------------------------ stop

class StopSignal:
    """A signal asks the run to save and to end. Work inside call() can be repeated, so the signal
    ends it at once; an update is finished first. A second signal ends the run at once, but not
    within a second of the first (torchrun passes on what its processes have received, too), and not
    while .saving."""

    def __init__(self):
        self.number, self.since, self.inside, self.saving = 0, 0.0, False, False
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
            number = getattr(signal, name, None)    # Windows lacks some; nohup ignores HUP
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.number and time.monotonic() - self.since > 1 and not self.saving:
            os._exit(128 + number)
        first = not self.number
        if first:
            self.number, self.since = number, time.monotonic()
        if self.inside:
            self.inside = False
            raise SystemExit(128 + self.number)
        if first and rank() == 0 and not self.saving:
            with contextlib.suppress(OSError):      # no print(): a handler may interrupt another
                os.write(2, b"\nthe run saves and ends after this update; a second signal ends it "
                            b"at once, unsaved\n")

    def check(self):
        """End the run in all processes, if one of them was asked to."""
        if number := max(all_lists([self.number])):
            raise Ended(128 + number)

    def call(self, function, *args):
        """Call a function in every process, together(). A signal may end it in the middle, so it
        must change nothing that outlives it before it returns."""
        def interruptible():
            if self.number and not self.saving:
                raise SystemExit(128 + self.number)
            try:
                self.inside = not self.saving
                return function(*args)
            finally:
                self.inside = False
        return together(interruptible)


# ------------------------------------------------------------------------------ log

class Log:
    """Process 0's lines above a progress bar, rows of OUT/metrics.jsonl and eval.jsonl, wandb."""

    def __init__(self, out, settings, start):
        self.out, self.steps = out, settings["steps"]
        self.on, self.wandb = rank() == 0, None
        # disable=None: no bar where the output is no terminal
        self.bar = tqdm(total=self.steps, initial=start, disable=None if self.on else True)
        if self.on and settings["wandb"]:
            import wandb
            self.known = {"metrics": -1, "eval": -1, **read_json(out / "wandb.json")}
            self.wandb = wandb.init(project=settings["wandb"], name=out.name, config=settings,
                                    dir=out, id=self.known.get("id"), resume="allow")
            self.known["id"] = self.wandb.id

    def say(self, text):
        """Print a line, if anyone reads it: `tee` or a terminal may end before the run does."""
        with contextlib.suppress(OSError):
            if self.on:
                tqdm.write(text)
                sys.stdout.flush()

    def row(self, name, row):
        """Append a row to OUT/NAME.jsonl; what is not finite becomes null."""
        if self.on:
            row = {k: v if math.isfinite(v) else None for k, v in row.items()}
            with open(self.out / f"{name}.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.wandb and row["step"] > self.known[name]:   # else wandb has it already
                grid = {}
                if name == "eval":
                    path = str(grid_path(self.out, row["step"]))
                    grid = {"grid": sys.modules["wandb"].Image(path)}
                values = {f"{name}/{k}": v for k, v in (row | grid).items()}
                self.wandb.log(values, step=row["step"])
                self.known[name] = row["step"]
                write_json(self.out / "wandb.json", self.known)

    def step(self, row):
        """Log the numbers of a training step."""
        self.row("metrics", row)
        with contextlib.suppress(OSError):
            self.bar.update()
        why = "no score" if math.isnan(row["reward_mean"]) else "not finite"
        self.say(f"{row['step']:5d}/{self.steps} | reward {row['reward_mean']:.3f} zero-adv "
                 f"{row['adv_zero']:.2f} ratio {row['ratio_mean']:.3f} kl {row['approx_kl']:.1e} "
                 f"clip {row['clip_fraction']:.2f} grad {row['grad_norm']:.2f} entropy "
                 f"{row['entropy']:.2f} lr {row['lr']:.1e} | {row['images_per_s']:.1f} img/s"
                 + f" | NOT TAKEN: {why}" * (not row["taken"]))

    def evaluation(self, row):
        """Log the numbers of an evaluation."""
        self.row("eval", row)
        self.say("eval " + " ".join(f"{key} {value:.3g}" for key, value in row.items()))

    def close(self):
        """Write the first grid above the last one, in before_after.png, and end wandb's run."""
        grids = sorted(self.out.glob("samples/step-*.png"))
        if self.on and len(grids) > 1:
            first, last = Image.open(grids[0]), Image.open(grids[-1])
            sheet = Image.new("RGB", (first.width, first.height + last.height + 8), "black")
            sheet.paste(first, (0, 0))
            sheet.paste(last, (0, first.height + 8))
            sheet.save(self.out / "samples/before_after.png")
        if self.wandb:
            self.wandb.finish()
