"""Watch a long run in two processes: resident memory and open files of each, by step (Linux).

    python results/soak.py --json results/soak.json

500 steps of train.py on shapes, with checkpoints, evaluations and pictures on the way. The last
line says how much the memory of each process grew from its first row after step 100 (with an
evaluation, a grid and a checkpoint behind it) to its largest.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("--model shapes --no-kl --filter-low --prompts-per-step 4 --group-size 4 --eval-every 100 "
         "--eval-n 1 --sample-every 100 --save-every 50 --keep-last 2").split()


def usage(pid):
    """Return the resident MiB and the number of open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    mib = pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
    return [round(mib, 1), len(os.listdir(f"/proc/{pid}/fd"))]


def children(pid):
    """Return the ids of the processes that a process started."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def steps_done(out):
    """Return how many steps the log of a run holds."""
    log = out / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def watch(steps, every):
    """Train for so many steps -> a row about every `every` steps: step, MiB, files, MiB, files."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node", "2", str(ROOT / "train.py"), *FLAGS,
                   "--steps", str(steps), "--out", str(out)]
        training = subprocess.Popen(command, stdout=subprocess.DEVNULL,
                                    env={**os.environ, "OMP_NUM_THREADS": "1"})
        seen = 0
        while training.poll() is None:
            time.sleep(0.2)
            step = steps_done(out)
            if seen + every <= step < steps:
                seen = step - step % every
                row = [step]
                for pid in children(training.pid):
                    row += usage(pid)
                rows.append(row)
                print(*row, flush=True)
    if training.returncode:
        sys.exit(f"train.py ended with {training.returncode}")
    return rows


def summary(rows, after):
    """Return each process's growth of memory after a step, and the numbers of files it had open."""
    late = [row for row in rows if row[0] > after]
    growth = [round(max(row[i] for row in late) / late[0][i] - 1, 4) for i in (1, 3)]
    files = [sorted({row[i] for row in late}) for i in (2, 4)]
    return {
        "columns": ["step", "MiB", "files", "MiB", "files"],
        f"growth_after_{after}": growth,
        f"files_after_{after}": files,
    }


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--every", type=int, default=10, help="steps between two rows")
    p.add_argument("--after", type=int, default=100, help="step from which growth counts")
    p.add_argument("--json", type=Path, help="also write the numbers and all rows there")
    args = p.parse_args()
    start = time.time()
    rows = watch(args.steps, args.every)
    result = {"steps": args.steps, "seconds": round(time.time() - start)}
    result |= summary(rows, args.after)
    print(result)
    if args.json:
        args.json.write_text(json.dumps(result | {"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
