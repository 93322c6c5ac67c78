"""Run under torchrun by test_train.py: train.py's main, writing every step's gradient and checking that the parameters of all
processes are equal after it.  two_processes.py OUTPUT.pt train.py's flags ..."""
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402

torch.set_num_threads(1)
OUTPUT = sys.argv.pop(1)
gradients, original = [], torch.optim.AdamW.step


def step(self, *args, **kwargs):
    params = [p for group in self.param_groups for p in group["params"]]
    gradients.append(torch.cat([p.grad.flatten() for p in params]))
    out = original(self, *args, **kwargs)
    flat = torch.cat([p.detach().flatten() for p in params])
    for other in train.all_cat(flat[None]):
        assert torch.equal(other, flat), "the processes' parameters differ"
    return out


torch.optim.AdamW.step = step
train.main()
if not dist.is_initialized() or dist.get_rank() == 0:
    torch.save(gradients, OUTPUT)
