"""Small tensors between host and device: many in one transfer, where each would have a launch and a wait of its own.

columns, counts = to_device([columns, counts], device)
mask, ids = to_host([mask, ids])
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Kernels read up to 16 bytes at once; a cache line has 128.
_ALIGNED = 128


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Move tensors to a device; to CUDA, those of the host through one pinned buffer."""
    found = list(tensors)
    packed = [
        place
        for place, value in enumerate(found)
        if device.type == "cuda" and value.device.type == "cpu" and not value.requires_grad
    ]
    if len(packed) > 1:
        parts = _through_one_buffer([found[place] for place in packed], device)
        for place, part in zip(packed, parts, strict=True):
            found[place] = part
    return [value.to(device) for value in found]


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Move tensors to the host; integers and booleans of one CUDA device with one wait for it."""
    devices = {value.device for value in tensors}
    whole = not any(value.is_floating_point() for value in tensors)
    if len(tensors) < 2 or len(devices) > 1 or next(iter(devices)).type != "cuda" or not whole:
        return [value.cpu() for value in tensors]
    joined = torch.cat([value.reshape(-1).to(torch.int64) for value in tensors]).cpu()
    parts = joined.split([value.numel() for value in tensors])
    return [
        part.view(value.shape).to(value.dtype) for part, value in zip(parts, tensors, strict=True)
    ]


def _through_one_buffer(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    starts, end = [], 0
    for value in tensors:
        starts.append(end)
        end += -(-value.nbytes // _ALIGNED) * _ALIGNED
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    for start, value in zip(starts, tensors, strict=True):
        _part(buffer, start, value).copy_(value)
    there = buffer.to(device, non_blocking=True)
    # No views in autograd's sense: a compiler would trace the whole buffer for each of them.
    return [_part(there, start, value).data for start, value in zip(starts, tensors, strict=True)]


def _part(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
