"""How the processes of a test that torchrun has started end."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist


def leave_together():
    """The end of a process that has done all it had to, once every rank has come here.

    A rank that destroys the process group earlier takes it from those that still talk to it. And gloo's threads outlive
    the process group: one that still holds a tensor when the interpreter shuts down waits for the GIL to give it back,
    is ended there, and ends the process with it ("terminate called without an active exception"). So the interpreter
    does not shut down.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
