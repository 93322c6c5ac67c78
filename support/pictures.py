"""Pictures on the disk: read, grid, draw what is missing, match a folder with prompts."""
import base64
import io
import math
import re
import textwrap
from collections import Counter
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont

from support.processes import all_lists, barrier, rank, together
from support.run import lock_folder
from support.weights import digest, fingerprint, image_tokenizer, read_json, write_json

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def to_pil(image):      # uint8[3, H, W]
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def encode_png(image) -> str:       # uint8[3, H, W] -> base64
    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def read_picture(path):
    """Return a picture as uint8[3, H, W]; SystemExit with its name if it is not whole."""
    try:
        image = Image.open(path)
        if image.mode.startswith("I"):      # 16 bits of grey, which PIL would cut off at 255
            image = Image.fromarray((numpy.array(image) / 257).round().astype("uint8"))
        return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise SystemExit(f"{path}: is no whole picture ({error}); draw it again, or remove it and "
                         "what belongs to it") from None


def is_whole(path) -> bool:
    """Return whether a picture is there, up to its last byte."""
    try:
        with Image.open(path) as image:
            image.verify()
        return True
    except (OSError, SyntaxError):
        return False


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


# ------------------------------------------------------------------------------ a folder's pictures

def drawn_with(args, examples, dtype) -> dict:
    """Return what a folder's pictures depend on, from the flags of a script that draws. The part
    in brackets is a digest of the content: two folders of the same content are the same."""
    def named(name, content):
        return f"{name} ({content})"
    weights, vq = args.ckpt or args.model, args.vq or image_tokenizer(args.model)
    return {"weights": named(weights, fingerprint(weights)), "vq": named(vq, fingerprint(vq)),
            "prompts": named_prompts([e["prompt"] for e in examples]),
            "n": args.n, "T": args.T,
            "guidance": args.guidance, "temperature": args.temperature, "seed": args.seed,
            "dtype": str(dtype).removeprefix("torch.")}


def named_prompts(prompts) -> str:
    return f"{len(prompts)} prompts ({digest(prompts)})"


def claim_folder(out, facts):
    """Record in OUT/drawn.json what draws a folder's pictures, and return process 0's lock of the
    folder. SystemExit if the pictures that are already there were drawn by something else, or
    another command draws there: its pictures would pass for new ones."""
    def drawn():
        return any(p.suffix.lower() in SUFFIXES for p in out.rglob("*"))
    path = out / "drawn.json"
    if drawn() and not path.exists():
        raise SystemExit(f"--out {out}: holds pictures, but no drawn.json that says what drew "
                         "them; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    lock = together(lambda: lock_folder(out) if rank() == 0 else None)
    before = read_json(path) if drawn() else {}
    other = [f"{name} {before.get(name)}, not {value}" for name, value in facts.items()
             if str(before.get(name)).split(" (")[-1] != str(value).split(" (")[-1]]
    if before and other:
        raise SystemExit(f"--out {out}: its pictures were drawn with {'; '.join(other)}. Choose "
                         "another folder")
    barrier()       # all have looked before one writes
    if not before:
        part = out / f".drawn-{rank()}.json"        # machines may share the folder
        write_json(part, facts)
        part.replace(path)
    return lock


def draw_missing(files, examples, draw, batch) -> int:
    """Draw the pictures that are missing or broken -> how many this process has drawn.

    files: {i: paths}, the pictures of example i. draw(prompts, n=, seeds=) -> uint8[B, 3, H, W]."""
    todo = [i for i, paths in files.items() if not all(map(is_whole, paths))]
    n_files, n_todo = (sum(len(files[i]) for i in part) for part in (files, todo))
    there, wanted = (sum(all_lists([number])) for number in (n_files - n_todo, n_files))
    if there and rank() == 0:
        print(f"{there} of {wanted} pictures are there already and stay", flush=True)

    n = max(map(len, files.values()), default=1)
    chunk = max(1, batch // n)
    for numbers in (todo[k:k + chunk] for k in range(0, len(todo), chunk)):
        pictures = draw([examples[i]["prompt"] for i in numbers], n=n, seeds=numbers)
        for path, picture in zip((p for i in numbers for p in files[i]), pictures, strict=True):
            to_pil(picture).save(path.with_suffix(".part"), "PNG")
            path.with_suffix(".part").replace(path)
    barrier()       # process 0 has the lock
    return n_todo


def find_pictures(folder, prompts) -> list[list[Path]]:
    """Match the pictures under a folder with prompts, the same number each. Tried in this order:
    the file name begins with the prompt; some number in the name takes one value per prompt; sorted
    order. SystemExit if drawn.json has other prompts, or another number of pictures of each."""
    found = {p: str(p.relative_to(folder)) for p in folder.rglob("*")
             if p.suffix.lower() in SUFFIXES and p.stem != "grid"}
    paths = [p for p, name in found.items() if not re.search(r"(^|[/\\])\.", name)]     # hidden
    paths.sort(key=lambda p: [x.zfill(20) for x in re.split(r"(\d+)", found[p])])
    n = len(paths) // len(prompts)
    if not paths or n * len(prompts) != len(paths):
        raise SystemExit(f"--images: {len(paths)} pictures for {len(prompts)} prompts, uneven")
    drawn = read_json(folder / "drawn.json")
    if drawn and (drawn.get("prompts"), drawn.get("n")) != (named_prompts(prompts), n):
        raise SystemExit(f"--images {folder}: was drawn from {drawn.get('prompts')}, "
                         f"{drawn.get('n')} pictures each, not from {named_prompts(prompts)}, {n} "
                         "each; to score it by other texts, copy its pictures without drawn.json")
    lengths, known = sorted(set(map(len, prompts)), reverse=True), set(prompts)
    named = [next((s[:k] for k in lengths for s in (p.name, found[p]) if s[:k] in known), None)
             for p in paths]
    counts = Counter(named)
    times = Counter(prompts)                # equal prompts share theirs, in order
    if any(named) and any(counts[q] != n * times[q] for q in prompts):
        raise SystemExit(f"--images: the names begin with prompts, but not {n} with each")
    numbers = [re.findall(r"\d+", re.sub(r"(?i)seed[-_=]?\d+", "", found[p])) for p in paths]
    # a number that counts from 0 or 1 rather than a seed
    columns = sorted(zip(*numbers, strict=False), key=lambda column: min(map(int, column)) > 1)
    for keys in (named, *columns):
        groups = {}
        for key, path in zip(keys, paths, strict=True):
            groups.setdefault(key, []).append(path)
        if keys is named and None not in groups:
            return [[groups[q].pop(0) for _ in range(n)] for q in prompts]
        if None not in groups and [len(group) for group in groups.values()] == [n] * len(prompts):
            return [groups[q] for q in sorted(groups, key=int)]
    return [paths[i * n:(i + 1) * n] for i in range(len(prompts))]
