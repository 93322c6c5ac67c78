"""A long run in two processes, watched: resident memory and open files of every process, by step.

    python tests/soak.py --json results/soak.json

500 steps of train.py on shapes with checkpoints, evaluations and pictures on the way; the last line says how much each process
grew from its first row after step 100 (and what happens at that step: an evaluation, a grid, a checkpoint) to its largest."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = ("--model shapes --no-kl --filter-low --prompts-per-step 4 --group-size 4 --eval-every 100 --eval-n 1 --sample-every 100 --save-every 50 "
         "--keep-last 2 --check-every 10").split()


def look(pid):
    """Resident MiB and open files of a process; Linux."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return [round(pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20, 1), len(os.listdir(f"/proc/{pid}/fd"))]


def summary(rows):
    """Growth of each process's memory after step 100, and the numbers of files it had open."""
    late = [row for row in rows if row[0] > 100]
    return {"columns": ["step", "MiB", "files", "MiB", "files"], "growth_after_100": [round(max(row[i] for row in late) / late[0][i] - 1, 4) for i in (1, 3)],
            "files_after_100": [sorted({row[i] for row in late}) for i in (2, 4)]}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=500)
    p.add_argument("--json", help="file for the rows: step, then MiB and open files of each process")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out, rows, seen, start = Path(folder) / "run", [], 0, time.time()
        started = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py"),
                                    *FLAGS, "--steps", str(args.steps), "--out", str(out)], stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while started.poll() is None:
            time.sleep(0.2)
            step = (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0
            if step >= seen + 10 and step < args.steps:
                seen = step - step % 10
                rows.append([step, *(x for pid in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split() for x in look(pid))])
                print(*rows[-1], flush=True)
        if started.returncode:
            sys.exit(f"train.py ended with {started.returncode}")
    result = {"steps": args.steps, "seconds": round(time.time() - start), **summary(rows), "rows": rows}
    print({k: v for k, v in result.items() if k != "rows"})
    if args.json:
        Path(args.json).write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
