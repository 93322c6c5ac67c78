"""Run by test_checkpoint.py: a run of train.py that is killed (SIGKILL) 20 times, in rollout, update and saving by turns, each time at a
random moment, and continued with --resume; beside it the same run in one piece.   killed.py OUT"""
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint  # noqa: E402
import train  # noqa: E402

torch.set_num_threads(1)  # and no thread is ever started here, so that fork() is safe
OUT, PHASES = Path(sys.argv[1]), {"rollout": (train, "collect"), "update": (train, "update"), "saving": (checkpoint, "save")}
FLAGS = ("--model shapes --no-kl --filter-low --filter-warmup 4 --steps 40 --prompts-per-step 3 --group-size 4 --unmask-steps 4 --eval-every 0 "
         "--sample-every 0 --save-every 1 --keep-last 2 --lr 1e-3").split()


def start(folder, *flags):
    """train.py in a child -> its process id, and a pipe with a byte for every phase that begins."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    for letter, (module, name) in zip(b"rus", PHASES.values()):
        def announced(*args, plain=getattr(module, name), letter=letter):
            os.write(write, bytes([letter]))
            return plain(*args)
        setattr(module, name, announced)
    sys.stdout = open(os.devnull, "w")
    sys.argv = ["train.py", *FLAGS, "--out", str(OUT / folder), *flags]
    try:
        train.run(train.main)
    except BaseException as error:  # SystemExit too
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def finish(child, pipe):
    """Wait for its end -> seconds of each phase, by its letter."""
    seconds, letter, since = {}, b"", 0.0
    while begins := os.read(pipe, 1):
        seconds.setdefault(letter, []).append(time.time() - since)
        letter, since = begins, time.time()
    os.close(pipe)
    assert os.waitpid(child, 0)[1] == 0
    return {letter: statistics.median(times) for letter, times in seconds.items()}


dice = random.Random(0)
seconds, begun, torn = finish(*start("straight")), [], 0
for kill in range(20):
    phase = list(PHASES)[kill % 3]
    child, pipe = start("killed", *(["--resume"] if kill else []))
    left = dice.choice([1, 2])
    while left:
        begins = os.read(pipe, 1)
        assert begins, "it ended before it was killed"
        left -= begins == phase[:1].encode()
    time.sleep(dice.uniform(0, seconds[phase[:1].encode()]))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    os.close(pipe)
    whole = [checkpoint.step_of(f) for f in checkpoint.checkpoints(OUT / "killed") if checkpoint.damage(f) is None]
    assert len(whole) == len(checkpoint.checkpoints(OUT / "killed")), "a checkpoint that has its name is not whole"
    begun.append(whole[-1] if whole else 0)
    torn += len(list((OUT / "killed").glob(".checkpoint-*")))
finish(*start("killed", "--resume"))
print([begun, torn])
