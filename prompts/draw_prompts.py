"""Draw some prompts of a large file, always the same ones -> a .txt, a prompt a line.

    python prompts/draw_prompts.py captions_val2014.json:annotations --n 30000 --out coco.txt
"""
import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.prompts import read_prompts  # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", help="see support/prompts.py; FILE:KEY")
    p.add_argument("--n", type=int, default=30_000, help="how many (%(default)s), or all")
    p.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    p.add_argument("--out", type=Path, required=True, help="a .txt")
    args = p.parse_args()
    texts = [" ".join(example["prompt"].split()) for example in read_prompts(args.file)]
    drawn = random.Random(args.seed).sample(texts, min(args.n, len(texts)))
    args.out.write_text("".join(text + "\n" for text in drawn))


if __name__ == "__main__":
    main()
