"""What the scripts share: flags, processes, errors, prompt files, the log, pictures."""
import argparse
import csv
import datetime
import io
import json
import math
import os
import signal
import sys
import textwrap
import time
import traceback
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from checkpoint import read_json, write_json


def add_model_flags(add):
    """Add the flags that say which weights to load, and where; add: a parser's add_argument."""
    add("--model", default="showlab/show-o-512x512",
        help="hub id (ID@REVISION pins it), folder or state_dict; shapes = the tiny base")
    add("--ckpt", help="weights in place of the model's: a checkpoint folder, or a state_dict")
    add("--vq", help="MAGVIT-v2 (default: showlab/magvitv2)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    add("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on a GPU")
    add("--compile", action=argparse.BooleanOptionalAction, help="fuse the kernels of a layer, by "
        "torch.compile (default: on a GPU)")


SAMPLING = ("T", "guidance", "temperature", "batch")    # for generate()


def is_tiny(p) -> bool:
    """Return whether the --model given is the tiny base; p: a parser that is not yet whole."""
    from model import is_shapes
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    return is_shapes(p.parse_known_args(words)[0].model)


def add_sampling_flags(p):
    tiny, add = is_tiny(p), p.add_argument
    add("--steps", type=int, default=12 if tiny else 50, dest="T", help="iterations")
    add("--cfg", type=float, default=0.0 if tiny else 5.0, dest="guidance", help="0 = none")
    add("--temperature", type=float, default=1.0, help="of the Gumbel noise")
    add("--batch", type=int, default=256 if tiny else 8, help="pictures at a time")


STORE = None    # torchrun's key-value store, in which the first process that fails says so


def run(main):
    """Call main(). SystemExit with a text, or a lack of GPU memory, ends the program with one plain
    line, by the process that fails first; the others, which then miss it, end silently."""
    try:
        main()
    except BaseException as error:
        line = code = error.code if isinstance(error, SystemExit) else None
        if isinstance(error, torch.OutOfMemoryError):
            line = "out of GPU memory: take a smaller --micro-batch, --grad-checkpoint or --lora"
        if STORE is None and not isinstance(line, str):
            raise
        first = STORE.add("failed", 1) == 1 if STORE else os.environ.get("RANK", "0") == "0"
        if first and not isinstance(code, int):
            print(line or traceback.format_exc(), file=sys.stderr)
        sys.stdout.flush()
        # threads of a process group can abort an exit in the usual order
        os._exit(code if isinstance(code, int) else 1)
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


def setup(device=None):
    """Choose the device and join torchrun's other processes -> rank, world size, device."""
    global STORE
    number, n = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", local_rank if device.index is None else device.index)
            torch.cuda.set_device(device)
            torch.backends.cuda.enable_cudnn_sdp(False)     # it plans anew for every length
            torch.set_float32_matmul_precision("high")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, AttributeError) as error:     # each by a build of torch
        raise SystemExit(f"--device {device}: there is none ({str(error)[:99]})") from None
    if n > 1:
        gpu, hour = device.type == "cuda", datetime.timedelta(hours=1)
        STORE, _, _ = next(dist.rendezvous("env://", timeout=hour))
        dist.init_process_group("nccl" if gpu else "gloo", store=STORE, rank=number, world_size=n,
                                timeout=hour, device_id=device if gpu else None)
    return number, n, device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def choose_dtype(name, device) -> torch.dtype:
    """Return the type that --dtype names: auto is bf16 on a GPU, fp32 on a CPU."""
    half = name == "bf16" or (name == "auto" and torch.device(device).type == "cuda")
    return torch.bfloat16 if half else torch.float32


def now(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def all_sum(tensor):
    """Return the sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_cat(tensor):
    """Return the tensors of all processes, which have one shape, joined in order of ranks."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_lists(items: list) -> list:
    """Return the lists of all processes, joined in order of ranks."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])


def barrier():
    if dist.is_initialized():
        dist.barrier()


class StopSignal:
    """A signal asks the run to save and to end after the step. A second one ends it at once, but
    not within a second of the first: torchrun passes on what its processes have received, too."""

    def __init__(self):
        self.number, self.since = 0, 0.0
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
            number = getattr(signal, name, None)    # Windows has two of them; nohup ignores HUP
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.number and time.monotonic() - self.since > 1:
            os._exit(128 + number)
        if not self.number:
            self.number, self.since = number, time.monotonic()


KEYS = ("prompt", "prompts", "caption", "text")


def read_prompts(path) -> list[dict]:
    """Return the examples of a file: .txt, a prompt a line; .jsonl, an object or a text a line;
    .json, a list of them; .csv or .tsv with a header. The prompt of an object or a row is the first
    of KEYS that it has, in any case; FILE:KEY names another. Optional: "reward_prompt", what the
    reward is told instead, and GenEval's metadata; the rest stays with the example."""
    file, _, key = str(path).rpartition(":")
    if not Path(file).is_file():
        file, key = str(path), ""
    kind = Path(file).suffix.lower()
    if kind not in (".txt", ".jsonl", ".json", ".csv", ".tsv"):
        raise SystemExit(f"{path}: wanted .txt, .jsonl, .json, .csv or .tsv")
    try:
        text = Path(file).read_text("utf-8-sig")
        rows = [line for line in text.split("\n") if line.strip()]
        if kind in (".csv", ".tsv"):
            try:
                rows = list(csv.DictReader(io.StringIO(text), delimiter=",\t"[kind == ".tsv"],
                                           strict=kind == ".tsv"))
            except csv.Error:       # a .tsv whose quotes are text, as PartiPrompts'
                rows = list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=3))
        elif kind != ".txt":
            rows = json.loads(text) if kind == ".json" else [json.loads(line) for line in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise SystemExit(f"{path}: cannot be read ({error})") from None
    examples = []
    for row in rows if isinstance(rows, list) else [rows]:
        row = {"prompt": row} if isinstance(row, str) else row
        names = {str(name).lower(): name for name in row} if isinstance(row, dict) else {}
        name = key or next((names[k] for k in KEYS if k in names), None)
        if not names or not isinstance(row.get(name), str):
            has = ", ".join(map(str, names.values())) or repr(row)
            raise SystemExit(f"{path}: number {len(examples) + 1} has no prompt, but {has[:99]}; "
                             f"name one: {file}:KEY")
        examples.append({**row, "prompt": row[name].strip()})
    return [e for e in examples if e["prompt"]] or sys.exit(f"{path}: there is no prompt in it")


class Log:
    """Process 0's lines above a progress bar, rows of OUT/metrics.jsonl and eval.jsonl, wandb."""

    def __init__(self, out, args, start):
        self.out, self.steps, self.on, self.wandb = out, args.steps, rank() == 0, None
        # disable=None: no bar where the output is no terminal
        self.bar = tqdm(total=args.steps, initial=start, disable=None if self.on else True)
        if self.on and args.wandb:
            import wandb
            self.known = {"metrics": -1, "eval": -1, **read_json(out / "wandb.json")}
            self.wandb = wandb.init(project=args.wandb, name=out.name, config=vars(args), dir=out,
                                    id=self.known.get("id"), resume="allow")
            self.known["id"] = self.wandb.id

    def say(self, text):
        if self.on:
            tqdm.write(text)
            sys.stdout.flush()

    def row(self, name, row):
        """Append a row to OUT/NAME.jsonl; what is not finite becomes null."""
        if self.on:
            row = {k: v if math.isfinite(v) else None for k, v in row.items()}
            with open(self.out / f"{name}.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.wandb and row["step"] > self.known[name]:   # else before it was resumed
                grid = self.out / f"samples/step-{row['step']:06d}.png"
                more = {"grid": sys.modules["wandb"].Image(str(grid))} if name == "eval" else {}
                values = {f"{name}/{k}": v for k, v in (row | more).items()}
                self.wandb.log(values, step=row["step"])
                self.known[name] = row["step"]
                write_json(self.out / "wandb.json", self.known)

    def step(self, row):
        """Log the numbers of a training step."""
        self.row("metrics", row)
        self.bar.update()
        self.say(f"{row['step']:5d}/{self.steps} | reward {row['reward_mean']:.3f} zero-adv "
                 f"{row['adv_zero']:.2f} ratio {row['ratio_mean']:.3f} kl {row['approx_kl']:.1e} "
                 f"clip {row['clip_fraction']:.2f} grad {row['grad_norm']:.2f} entropy "
                 f"{row['entropy']:.2f} lr {row['lr']:.1e} | {row['images_per_s']:.1f} img/s"
                 + " | NOT TAKEN: not finite" * (not row["taken"]))

    def evaluation(self, row):
        """Log the numbers of an evaluation."""
        self.row("eval", row)
        self.say("eval " + " ".join(f"{key} {value:.3g}" for key, value in row.items()))

    def close(self):
        """Write the first grid above the last one, in before_after.png, and end wandb's run."""
        grids = [Image.open(path) for path in sorted(self.out.glob("samples/step-*.png"))]
        if self.on and len(grids) > 1:
            first, last = grids[0], grids[-1]
            sheet = Image.new("RGB", (first.width, first.height + last.height + 8), "black")
            sheet.paste(first, (0, 0))
            sheet.paste(last, (0, first.height + 8))
            sheet.save(self.out / "samples/before_after.png")
        if self.wandb:
            self.wandb.finish()


def to_pil(image):      # uint8[3, H, W]
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def read_picture(path):     # -> uint8[3, H, W]
    image = Image.open(path)
    if image.mode.startswith("I"):      # 16 bits of grey, which PIL would cut off at 255
        image = Image.fromarray((numpy.array(image) / 257).round().astype("uint8"))
    return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)


def draw_missing(files, examples, draw, batch) -> int:
    """Draw the pictures that are not there yet -> how many were drawn.

    files: {i: n paths}, the pictures of example i. draw(prompts, n=, seeds=) -> uint8[B, 3, H, W].
    A picture has its name when it is whole."""
    n = len(next(iter(files.values()), []))
    todo = [i for i, paths in files.items() if not all(path.exists() for path in paths)]
    for numbers in (todo[k:k + batch // n or 1] for k in range(0, len(todo), batch // n or 1)):
        pictures = draw([examples[i]["prompt"] for i in numbers], n=n, seeds=numbers)
        for path, picture in zip((p for i in numbers for p in files[i]), pictures, strict=True):
            to_pil(picture).save(path.with_suffix(".part"), "PNG")
            path.with_suffix(".part").rename(path)
    return n * len(todo)


def grid(images, captions, columns):
    """Return one PIL image of uint8[B, 3, H, W], a caption under each; small ones are enlarged."""
    scale = max(1, 144 // images.shape[-1])
    height, width, text = images.shape[-2] * scale, images.shape[-1] * scale, 28
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + 4 + text)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * (width + 4) + 2, i // columns * (height + 4 + text) + 2
        sheet.paste(to_pil(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        lines = textwrap.wrap(caption, max(1, width // 6))[:2]
        draw.text((x, y + height + 1), "\n".join(lines), "black", font, spacing=1)
    return sheet
