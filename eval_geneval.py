"""GenEval (arXiv 2310.11513): draw the prompts in its folder layout, score a folder, summarise.

    python eval_geneval.py --model showlab/show-o-512x512 --out runs/geneval
    torchrun --nproc_per_node 8 eval_geneval.py --ckpt runs/NAME/checkpoint-1000 --out runs/after
    python eval_geneval.py --score-only DIR                   # pictures of any other model
    python eval_geneval.py --model shapes --out runs/eval     # the tiny base, its exact detector

A folder holds NNNNN/metadata.jsonl and NNNNN/samples/KKKK.png for each prompt, as upstream; and
drawn.json, which says what drew the pictures: others are never taken for them. Rules and detector:
support/geneval.py. Prompts: prompts/geneval.jsonl, made by prompts/make_geneval.py.
"""
import argparse
import json
from pathlib import Path

import torch

from sample import drawer
from shapes import world
from support import flags, geneval, pictures, processes
from support.prompts import read_prompts
from support.weights import is_shapes, read_json, write_json


def folders_of(out, examples, n) -> dict:
    """Write metadata.jsonl for every example that this process draws -> {i: its n pictures}."""
    files = {}
    for i in range(processes.rank(), len(examples), processes.world()):
        folder = out / f"{i:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(json.dumps(examples[i]))
        files[i] = [folder / f"samples/{k:04d}.png" for k in range(n)]
    return files


def folders_in(out) -> list:
    """Return all folders of pictures in the official layout; SystemExit for one that has none."""
    folders = sorted(f for f in out.glob("*") if f.is_dir() and f.name.isdigit())
    if not folders:
        raise SystemExit(f"{out}: no pictures there, OUT/NNNNN/samples/*.png")
    for folder in folders:
        if not (folder / "metadata.jsonl").exists() or not any(folder.glob("samples/*.png")):
            raise SystemExit(f"{folder}: has no metadata.jsonl, or no picture samples/*.png; draw "
                             "it again, or remove the folder")
    return folders


def score_folder(folder, detect) -> list[dict]:
    """Score the pictures of one prompt -> rows of results.jsonl, columns as upstream."""
    example, rows = json.loads((folder / "metadata.jsonl").read_text()), []
    by_size = {}
    for file in sorted(folder.glob("samples/*.png")):
        image = pictures.read_picture(file)
        by_size.setdefault(image.shape, []).append((file, image))

    # a detector takes pictures of one size
    for files, images in (zip(*group, strict=True) for group in by_size.values()):
        found = detect(torch.stack(images), [example] * len(files))
        for file, (raw, colours) in zip(files, found, strict=True):
            kept = geneval.filter_detections(raw, example["tag"])
            correct, reason = geneval.score(kept, example, colours)
            rows.append({"filename": str(file), "tag": example["tag"], "prompt": example["prompt"],
                         "correct": correct, "reason": reason, "metadata": json.dumps(example),
                         "details": json.dumps(kept)})
    return rows


def report(out, rows, facts):
    """Write results.jsonl, summary.txt and summary.json, and print the summary."""
    text = geneval.summary(rows)
    shares = geneval.shares((row["tag"], row["metadata"], row["correct"]) for row in rows)
    intervals = {tag: [round(mean + z * error, 5) for z in (-1.96, 1.96)]
                 for tag, (mean, error) in shares.items()}
    try:
        (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (out / "summary.txt").write_text(text)
        write_json(out / "summary.json", {
            **{tag: round(mean, 5) for tag, (mean, _) in shares.items()}, "images": len(rows),
            **facts, "interval95": intervals})
    finally:        # also if they cannot be written
        print(text, *(f"{tag:<16} {mean:.3f} [{intervals[tag][0]:.3f}, {intervals[tag][1]:.3f}]"
                      for tag, (mean, _) in shares.items()), sep="\n")


def main():
    p = flags.parser(__doc__)
    add = p.add_argument
    add("--out", type=Path, help="folder to draw into and score; its own pictures stay")
    add("--score-only", type=Path, metavar="DIR", help="only score pictures in the official layout")
    add("--images-only", action="store_true", help="draw, for another scorer")
    add("--prompts", help="jsonl with metadata (default: the 553 official ones, or shapes' 63)")
    add("--detector", default=geneval.DETECTOR, help="hub id or folder of a Mask2Former")
    add("--write-prompts", help=argparse.SUPPRESS)
    flags.add_model_flags(add)
    flags.add_sampling_flags(add)
    args = flags.parse(p, {name: preset | {"n": 4} for name, preset in flags.SAMPLING.items()})
    tiny, out = is_shapes(args.model), args.score_only or args.out
    if args.write_prompts:
        p.error("--write-prompts is now: python prompts/make_geneval.py --train FILE --n N")
    if not out:
        p.error("give --out, the folder to draw into, or --score-only, a folder of pictures")
    if args.score_only and (args.out or args.images_only):
        p.error("--score-only draws nothing: without --out and --images-only")
    rank, world_size, device = processes.setup(args.device)

    # what is to be drawn, or what is there
    if args.score_only:
        folders = folders_in(out)
        examples = [json.loads((folder / "metadata.jsonl").read_text()) for folder in folders]
    else:
        examples = read_prompts(args.prompts or ("shapes/eval.jsonl" if tiny
                                                 else "prompts/geneval.jsonl"))
    geneval.check_metadata(examples, *((world.CLASSES, world.COLOURS) if tiny else ()))
    dtype = processes.choose_dtype(args.dtype, device)
    if not args.score_only:
        _lock = pictures.claim_folder(out, pictures.drawn_with(args, examples, dtype))
    # before the drawing, so that its faults show at once
    if not args.images_only:
        detect = world.detect if tiny else geneval.Detector(args.detector, device)

    # each process scores what it drew, or its share of what is there
    if not args.score_only:
        files = folders_of(out, examples, args.n)
        draw = drawer(args, device, dtype, [e["prompt"] for e in examples])
        pictures.draw_missing(files, examples, draw, args.batch)
        del draw        # the models, whose memory the detector needs
        folders = [paths[0].parent.parent for paths in files.values()]
    if not args.images_only:
        mine = folders[rank::world_size] if args.score_only else folders
        rows = [row for folder in mine for row in score_folder(folder, detect)]
        rows = sorted(processes.all_lists(rows), key=lambda row: row["filename"])
        if rank == 0:
            report(out, rows, {"detector": "shapes, exact" if tiny else args.detector,
                               "drawn": read_json(out / "drawn.json")})


if __name__ == "__main__":
    processes.run(main)
