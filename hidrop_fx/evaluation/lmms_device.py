"""The device of one of several processes of an evaluation."""

import os

import torch


def device_of_process(device: str | None) -> str | None:
    """Return the device of this process: of several on one machine each has the GPU of its number.

    Args:
        device: what the user asked for; a numbered GPU or a CPU is left alone. None for a GPU if there is one.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not several or device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    number = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(number)
    return f"cuda:{number}"
