"""Run under torchrun by test_processes.py: train.py's main, in two processes, in one scenario after the other; what each leaves in
its folder under OUT is looked at there.   two_processes.py OUT"""
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from test_processes import FLAGS  # noqa: E402

torch.set_num_threads(1)
OUT, GRADIENTS = Path(sys.argv[1]), []
place = train.setup()
train.setup = lambda: place
RANK = place[0]
plain = {name: getattr(train, name) for name in ("make_reward", "update")}
whole = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x  # noqa: E731


class AdamW(torch.optim.AdamW):
    """Records every gradient, and demands that the processes' parameters are equal after every step."""

    def step(self, closure=None):
        super().step()
        if not self.param_groups[0]["lr"]:  # loading a state takes an empty step first
            return
        params = [p for group in self.param_groups for p in group["params"]]
        GRADIENTS.append(torch.cat([whole(p.grad).flatten() for p in params]))
        flat = torch.cat([whole(p.detach()).flatten() for p in params])
        assert all(torch.equal(other, flat) for other in train.all_cat(flat[None])), "the processes' parameters differ"


def call(name, *flags):
    """train.py in OUT/name; its gradients go to OUT/name.pt."""
    GRADIENTS.clear()
    sys.argv = ["train.py", *FLAGS, "--out", str(OUT / name), *map(str, flags)]
    train.main()
    if RANK == 0:
        torch.save(GRADIENTS, OUT / f"{name}.pt")


def copy(name, other, *without):
    """OUT/name as OUT/other, but for some checkpoints."""
    if RANK == 0:
        shutil.copytree(OUT / name, OUT / other, ignore=lambda *_: without)
    dist.barrier()


torch.optim.AdamW = AdamW
call("two", "--save-every", 1)
call("fsdp", "--save-every", 1, "--fsdp")
copy("two", "two-then-two", "checkpoint-2")
call("two-then-two", "--resume")
copy("two", "two-then-fsdp", "checkpoint-2")
call("two-then-fsdp", "--resume", "--fsdp")
copy("fsdp", "fsdp-then-two", "checkpoint-2")
call("fsdp-then-two", "--resume")


def spoilt(value):
    """A reward that gives value to every picture of process 1, in steps 1 to 3."""
    def make(*args, **kwargs):
        reward, calls = plain["make_reward"](*args, **kwargs), []

        def score(images, prompts, metadata):
            out = reward(images, prompts, metadata)
            score.log = reward.log
            calls.append(len(out))
            return torch.full_like(out, value) if RANK == 1 and sum(calls[:-1]) < 3 * 16 * (1 + 2 * (value == 0)) else out
        return score
    return make


train.make_reward = spoilt(0.0)  # its groups are all under the bar, three times in each of these steps
call("filtered", "--steps", 5, "--unmask-steps", 16, "--filter-low", "--filter-warmup", 1, "--max-resample", 2)
train.make_reward = spoilt(float("nan"))
call("not-finite", "--steps", 5)
try:
    call("never-finite", "--steps", 5, "--save-every", 1, "--max-bad-steps", 2)
except train.InputError as error:
    (OUT / f"never-finite-{RANK}.txt").write_text(str(error))
train.make_reward = plain["make_reward"]


def update(step, batch, args, showo, reference, optimizer):
    """Process 1 is asked to stop in step 2."""
    if step == 1 and RANK == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return plain["update"](step, batch, args, showo, reference, optimizer)


train.update = update
call("asked", "--steps", 5)


def update(step, batch, args, showo, reference, optimizer):  # noqa: F811
    """Process 1 loses a bit of a parameter in step 2."""
    out = plain["update"](step, batch, args, showo, reference, optimizer)
    if step == 1 and RANK == 1:
        with torch.no_grad():
            next(showo.parameters())[3, 5] += 1e-6
    return out


train.update = update
try:
    call("drifted", "--steps", 5, "--check-every", 1, "--save-every", 1)
except train.InputError as error:
    (OUT / f"drifted-{RANK}.txt").write_text(str(error))
dist.destroy_process_group()
