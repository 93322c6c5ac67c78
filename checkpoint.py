"""What a run of train.py leaves in its folder, and how it is taken up again.

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

from PIL import Image

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
        found = [f for f in Path(args.out).glob("checkpoint-*") if (f / "trainer.pt").exists() and f.name[11:].isdigit()]
        if not found:
            raise InputError(f"--resume: no checkpoint in {args.out}")
        folder = max(found, key=lambda f: int(f.name[11:]))
    try:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
        saved = state["args"]
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(f"--resume {folder}: trainer.pt cannot be read ({(str(error) or 'damaged').splitlines()[0][:150]})") from None
    for name in SAME:
        if saved.get(name) != getattr(args, name):
            raise InputError(f"--resume {folder}: that run has --{name.replace('_', '-')} {saved.get(name)}, not "
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
    own = args.resume and (args.resume == "auto" or out.resolve() == Path(args.resume).resolve().parent)
    if not own and (out / "metrics.jsonl").exists():
        raise InputError(f"--out {out}: holds another run; continue it with --resume or choose another folder")
    if dist.is_initialized():
        dist.barrier()  # nobody writes before everybody has looked
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    return out


def read_rows(path) -> list[dict]:
    """The objects of a jsonl file; none when there is no such file; a last line cut off by a crash is passed over."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if i + 1 < len(lines):
                raise InputError(f"{path}: line {i + 1} is not JSON") from None
    return rows


def rewind(out, step):
    """Drop the rows after a step: a resumed run computes them again."""
    for name in ("metrics.jsonl", "eval.jsonl"):
        kept = [row for row in read_rows(out / name) if row["step"] <= step]
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in kept))


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
            with open(self.out / name, "a") as file:
                file.write(json.dumps(row) + "\n")
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


def closing_table(out, say):
    rows = read_rows(out / "eval.jsonl")
    if len(rows) > 1:
        say(f"\n{'':<16}{'before':>8} -> {'after':<8}  (steps {rows[0]['step']} and {rows[-1]['step']})")
        for name in (key for key in rows[0] if key != "step"):
            say(f"{name:<16}{rows[0][name]:8.3f} -> {rows[-1][name]:<8.3f}")


def before_and_after(folder):
    """The first grid above the last one, in before_after.png."""
    first, last = Image.open(folder / "step-000000.png"), Image.open(max(folder.glob("step-*.png")))
    sheet = Image.new("RGB", (first.width, first.height + last.height + 8), "black")
    sheet.paste(first, (0, 0))
    sheet.paste(last, (0, first.height + 8))
    sheet.save(folder / "before_after.png")
