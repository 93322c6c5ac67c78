"""What the scripts share: flags, processes and collectives, prompt files, the log, grids."""
import argparse
import datetime
import errno
import json
import math
import os
import re
import resource
import signal
import sys
import textwrap
import time
import traceback
import warnings
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from checkpoint import InputError, first_line, is_shapes, parse_json, read_json, write_json

# ------------------------------------------------------------------------------ flags

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose --help shows the defaults."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def error(self, message):
        first = os.environ.get("RANK", "0") == "0"      # all processes have the same flags
        line = f"{self.prog}: error: {' '.join(message.split())} (see --help)\n"
        self.exit(2, line if first else None)


def in_range(kind, low, high=math.inf):
    """Return an argparse type: kind (int or float) from low to high, both included."""
    def parse(text):
        """Return the value of a flag."""
        try:
            value = kind(text)
        except ValueError:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name}") from None
        most = 10 ** 12 if high == math.inf else high
        if not low <= value <= most:
            bounds = f"from {low} to {most}"
            if high == math.inf and not most < value < math.inf:
                bounds = f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {bounds}")
        return value
    return parse


def add_model_flags(add):
    """Add the flags that say which weights to load, and where; add: a parser's add_argument."""
    add("--model", default="showlab/show-o-512x512",
        help="hub id (ID@REVISION pins it), folder or state_dict; shapes = the tiny base")
    add("--ckpt", help="weights in place of the model's: a checkpoint folder, or a state_dict")
    add("--vq", help="hub id or folder of MAGVIT-v2 (default: showlab/magvitv2)")
    add("--tokenizer", help="hub id or folder (default: the model's own, or microsoft/phi-1_5)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on a GPU")


def add_sampling_flags(add):
    """Add the settings of the sampler; add: a parser's add_argument."""
    add("--steps", type=in_range(int, 1), help="T, iterations (default: 50; shapes 12)")
    add("--cfg", type=in_range(float, 0), help="guidance, 0 = none (default: 5; shapes 0)")
    add("--temperature", type=in_range(float, 0), default=1.0, help="of the Gumbel noise")
    add("--schedule", choices=["cosine", "linear"], default="cosine")
    add("--annealing", choices=["compound", "linear", "none"], default="compound",
        help="of the temperature; compound is Show-o's")
    add("--batch", type=in_range(int, 1),
        help="pictures at a time, at least those of one prompt (default: 8; shapes 256)")


def sampling_settings(args) -> dict:
    """Return what sample.generate takes, from the flags of add_sampling_flags."""
    tiny = is_shapes(args.model)
    T, guidance, batch = (12, 0.0, 256) if tiny else (50, 5.0, 8)
    return {"T": T if args.steps is None else args.steps,
            "guidance": guidance if args.cfg is None else args.cfg,
            "batch": batch if args.batch is None else args.batch,
            "temperature": args.temperature, "schedule": args.schedule,
            "annealing": args.annealing}


def check_output(p, out) -> bool:
    """Return whether out is a folder, which is created, and not a PNG. Ends the program with one
    line when it can be neither."""
    out = Path(out)
    if out.suffix.lower() == ".png" and not out.is_dir():
        if not out.absolute().parent.is_dir():
            p.error(f"--out {out}: must be a .png in a folder that exists")
        return False
    picture = out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp")
    if picture or (out.exists() and not out.is_dir()):
        p.error(f"--out {out}: must be a .png, or a folder")
    out.mkdir(parents=True, exist_ok=True)
    return True


def flags_line(values: dict) -> str:
    """Return flags as one line: {"no_kl": True, "lr": 3e-6} -> --no-kl --lr 3e-06."""
    words = []
    for name, value in values.items():
        if isinstance(value, list):
            value = " ".join(map(str, value))
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(words)


def without_passwords(text: str) -> str:
    """Return a text whose URLs have lost their NAME:PASSWORD@."""
    return re.sub(r"(://)[^/\s]*@", r"\1", text)


# ------------------------------------------------------------------------------ processes

STORE = None    # torchrun's key-value store, where the first process that fails says so


def run(main):
    """Call main(). What fault_line() knows becomes one line and exit code 2, on the first process
    that fails; the others, which miss it, end silently."""
    sys.stdout.reconfigure(errors="backslashreplace")   # prompts may hold lone surrogates
    try:
        main()
    except Exception as error:
        line, rank = fault_line(error), os.environ.get("RANK", "0")
        if STORE is None and line is None:
            raise
        if rank == "0" if STORE is None else STORE.add("faults", 1) == 1:
            where = "" if rank == "0" else f"process {rank}: "
            said = f"{Path(sys.argv[0]).name}: {where}error: {line}\n"
            sys.stderr.write(said if line else traceback.format_exc())
        if STORE is not None:
            leave(2 if line else 1)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code):
    """End the process at once: the threads of a process group abort an exit in the usual order."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fault_line(error) -> str | None:
    """Return what an exception says to users; None for one that only a traceback explains."""
    if isinstance(error, InputError):
        return " ".join(str(error).splitlines())    # it may quote line breaks of the user's
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        name = " ".join(str(error.filename or "a file").splitlines())
        return f"{name}: {error.strerror}; make room or choose another"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory; a smaller --micro-batch or --batch needs less ({first_line(error)})"
    lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    if STORE is not None and isinstance(error, RuntimeError) and lost:
        return f"lost another process, or the network between them ({first_line(error)[:80]})"
    return None


def setup(device=None):
    """Choose the device (None = a GPU where there is one) and join torchrun's other processes.

    Returns rank, world size and torch.device. Raises InputError for a device that is not there."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", local_rank if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise InputError(f"--device {device}: cannot be used ({first_line(error)[:100]})") from None
    if world > 1:
        global STORE
        on_gpu, an_hour = device.type == "cuda", datetime.timedelta(hours=1)
        STORE, _, _ = next(dist.rendezvous("env://", timeout=an_hour))
        dist.init_process_group("nccl" if on_gpu else "gloo", store=STORE, rank=rank,
                                world_size=world, timeout=an_hour,
                                device_id=device if on_gpu else None)
    return rank, world, device


def get_rank() -> int:
    """Return this process's rank, 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(tensor):
    """Return the sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_cat(tensor):
    """Return the equally shaped tensors of all processes, joined along dim 0 in order of ranks."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_lists(items: list) -> list:
    """Return the lists of all processes, joined in the order of ranks."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def on_rank_0(function, *args, **kwargs):
    """Call a function on process 0 alone; all return what it returns, or raise InputError with
    what fault_line() makes of its error."""
    outcome = [None, None]
    if get_rank() == 0:
        try:
            outcome[0] = function(*args, **kwargs)
        except Exception as error:
            outcome[1] = fault_line(error)
            if outcome[1] is None:
                raise
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1]:
        raise InputError(outcome[1])
    return outcome[0]


class StopSignal:
    """SIGTERM and SIGINT ask for a stop at the next step boundary, where all processes agree on it.

    A second signal ends the process, unless it comes within a second: torchrun passes on what the
    whole process group gets, too. In a collective, either is heard when it returns."""

    def __init__(self):
        self.asked = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        """Note the signal; Python calls this between two of its instructions."""
        if self.asked and time.monotonic() - self.asked > 1:
            os._exit(128 + number)
        self.asked = self.asked or time.monotonic()


# ------------------------------------------------------------------------------ devices

def choose_dtype(name, device) -> torch.dtype:
    """Return the type that --dtype names: auto is bf16 on a GPU, fp32 on a CPU."""
    half = name == "bf16" or (name == "auto" and torch.device(device).type == "cuda")
    if half and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # the head's float32 products on tensor cores
    return torch.bfloat16 if half else torch.float32


def peak_gib(device) -> float:
    """Return the most memory that this process held, in GiB: of the GPU, or resident on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


# ------------------------------------------------------------------------------ prompt files

NOT_TAGS = ("step", "overall", "exact", "objects", "objects_asked", "images", "interval95")


def read_prompts(path) -> list[dict]:
    """Return the entries of a prompt file, each a dict with "prompt"; empty lines are skipped.

    .jsonl: an object a line, with "prompt", optional "reward_prompt" and GenEval metadata; any
    other name: a prompt a line. Raises InputError with the line's number."""
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(f"--prompts {path}: cannot be read ({error.strerror})") from None

    examples = []
    for number, line in enumerate(lines, 1):
        where = f"--prompts {path}: line {number}"
        if line.strip() and str(path).endswith(".jsonl"):
            example = parse_json(line, where)
            if not isinstance(example, dict) or not isinstance(example.get("prompt"), str):
                raise InputError(f'{where} has no "prompt" text')
            if not isinstance(example.get("reward_prompt", ""), str):
                raise InputError(f'{where} has a "reward_prompt" that is no text')
            tag = example.get("tag", "")
            if not isinstance(tag, str) or tag in NOT_TAGS:
                raise InputError(f"{where} has the tag {tag!r}, which is the name of another number"
                                 " or no text")
            examples.append(example)
        elif line.strip():
            try:
                examples.append({"prompt": line.decode("utf-8").strip()})
            except UnicodeDecodeError:
                raise InputError(f"{where} is not UTF-8 text") from None
    if not examples:
        raise InputError(f"--prompts {path}: no prompts in it")
    return examples


# ------------------------------------------------------------------------------ the log

ALARMS = {"ratio_max": 10.0, "approx_kl": 0.5, "kl_ref": 10.0}


class Log:
    """Lines above a progress bar, and rows of OUT/NAME.jsonl, all by process 0."""

    def __init__(self, out, args, start=0):
        self.out, self.steps, self.on, self.wandb = out, args.steps, get_rank() == 0, None
        # disable=None: no bar where the output is no terminal
        self.bar = tqdm(total=args.steps, initial=start, disable=None if self.on else True)
        if self.on and args.wandb:
            import wandb
            self.wandb = wandb.init(project=args.wandb, name=out.name, config=vars(args))

    def say(self, text):
        """Print a text above the bar, unless it is empty."""
        if self.on and text:
            tqdm.write(text)
            sys.stdout.flush()

    def row(self, name, row):
        """Append a row to OUT/NAME.jsonl; what is not finite becomes null. Raises InputError."""
        if not self.on:
            return
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value
               for key, value in row.items()}
        path = self.out / f"{name}.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); make room and "
                             "continue with --resume") from None
        if self.wandb:
            self.wandb.log({f"{name}/{key}": value for key, value in row.items()}, row["step"])

    def evaluation(self, row):
        """Log a row of eval.jsonl."""
        self.row("eval", row)
        numbers = " ".join(f"{key} {value:.3f}" for key, value in row.items() if key != "step")
        self.say(f"eval step {row['step']} {numbers}")

    def step(self, row):
        """Log a row of metrics.jsonl: one optimizer step, and what is alarming in it."""
        self.row("metrics", row)
        self.bar.update()
        self.say(
            f"{row['step']:5d}/{self.steps} | reward {row['reward_mean']:.3f} "
            f"zero-adv {row['adv_zero']:.2f} ratio {row['ratio_mean']:.3f} "
            f"kl {row['approx_kl']:.1e} clip {row['clip_fraction']:.2f} "
            f"grad {number(row['grad_norm'])} entropy {number(row['entropy'])} "
            f"lr {row['lr']:.1e} "
            f"| {row['images_per_s']:.1f} img/s")
        for name, most in ALARMS.items():
            if row[name] > most:
                self.say(f"ALARM: {name} {row[name]:.3g} is above {most:g}; a smaller --lr or "
                         "fewer --inner-epochs may help")
        if row["skipped"]:
            prompts = "; ".join(row["bad_prompts"]) or "the sum of the gradients"
            self.say(f"step {row['step']} skipped, something was not finite: {prompts}")


def number(value) -> str:
    """Return a number with two digits, - for one that was not computed."""
    return f"{value:.2f}" if math.isfinite(value) else "-"


def before_after_table(rows) -> str:
    """Return the first and the last row of eval.jsonl side by side."""
    first, last = rows[0], rows[-1]
    lines = [f"{'':<16}{'before':>8} -> {'after':<8}  (steps {first['step']} and {last['step']})"]
    for name in first:
        if name != "step" and isinstance(first[name], float) and isinstance(last.get(name), float):
            lines.append(f"{name:<16}{first[name]:8.3f} -> {last[name]:<8.3f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------ pictures

def to_pil(image):
    """Return uint8 [3, H, W] as a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def read_picture(path):
    """Return a picture file as uint8[3, H, W], or None when it is missing, broken or a bomb."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                rgb = numpy.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning,
            Image.DecompressionBombError):
        return None
    return torch.from_numpy(rgb).permute(2, 0, 1)


def prepare_out(out, settings, rank):
    """Make the output folder and note in settings.json what its pictures depend on.

    Raises InputError when it was drawn with other settings, or holds something else."""
    path = out / "settings.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        known = path.exists() and path.stat().st_size > 0
        others = [file for file in out.iterdir() if file != path]
    except OSError as error:
        raise InputError(f"--out {out}: cannot be used ({first_line(error)})") from None
    if known and read_json(path) != settings:
        raise InputError(f"--out {out}: was drawn with other settings ({path.name}); "
                         "give the same ones or choose a new folder")
    if others and not known:
        raise InputError(f"--out {out}: is not empty, and not a folder of this program; "
                         "choose a new one")
    barrier()  # nobody writes before everybody has looked
    if rank == 0:
        write_json(path, settings)


def draw_files(files: dict, prompts, n, draw, batch) -> int:
    """Draw the pictures that are missing or broken, and return how many were.

    files: {i: n paths}, the pictures of prompt i, whose seed is i. draw(prompts, n=, seeds=)
    returns uint8[len(prompts) * n, 3, H, W]; about batch pictures at a time are in memory. A
    picture has its name when it is whole."""
    lacking = {i: [path for path in paths if read_picture(path) is None]
               for i, paths in files.items()}
    todo, chunk = [i for i, paths in lacking.items() if paths], max(1, batch // n)
    for start in range(0, len(todo), chunk):
        numbers = todo[start:start + chunk]
        pictures = draw([prompts[i] for i in numbers], n=n, seeds=numbers)
        for i, group in zip(numbers, pictures.split(n), strict=True):
            for path, picture in zip(files[i], group, strict=True):
                if path in lacking[i]:
                    tmp_path = path.with_suffix(".part")
                    to_pil(picture).save(tmp_path, "PNG")
                    tmp_path.rename(path)
    return sum(map(len, lacking.values()))


def grid(images, captions, columns):
    """Return one PIL image of uint8 [B, 3, H, W], a caption (or "") under each.

    Small pictures are enlarged to about 144 pixels."""
    scale = max(1, 144 // images.shape[-1])
    height, width = (side * scale for side in images.shape[-2:])
    text_height = 28 if any(captions) else 0
    font = ImageFont.load_default(size=11)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + 4 + text_height)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = i % columns * (width + 4) + 2
        y = i // columns * (height + 4 + text_height) + 2
        sheet.paste(to_pil(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        lines = textwrap.wrap(caption, max(1, width // 6))[:2]
        draw.text((x, y + height + 1), "\n".join(lines), "black", font, spacing=1)
    return sheet


def before_and_after(folder):
    """Write the first grid of a folder above its last one, in before_after.png."""
    first = Image.open(folder / "step-000000.png")
    last = Image.open(max(folder.glob("step-*.png")))
    sheet = Image.new("RGB", (first.width, first.height + last.height + 8), "black")
    sheet.paste(first, (0, 0))
    sheet.paste(last, (0, first.height + 8))
    sheet.save(folder / "before_after.png")
