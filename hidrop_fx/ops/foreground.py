"""The cells of an image that stay for a vision tower: the pixels of each, and which of them are foreground.

    logits = classifier(first_frames(patches, ...))        # [cells], of cells [cells, C, p, p]
    stays = with_neighbours(logits.view(t, h, w))

A cell is the square of patches that a tower merges to one token.
"""

from torch import Tensor
from torch.nn.functional import max_pool2d


def first_frames(patches: Tensor, *, channels: int, frames: int, side: int, merge: int) -> Tensor:
    """Put the patches of each cell together: [n, C * frames * side * side] -> [n / merge^2, C, merge * side, merge * side].

    Patches come cell by cell, as Qwen's processors order them; of the frames of a patch the first is taken.

    Args:
        side: of a patch, in pixels. merge: patches of a cell in each direction.
    """
    cells = patches.view(-1, merge, merge, channels, frames, side, side)[:, :, :, :, 0]
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, merge * side, merge * side)


def with_neighbours(logits: Tensor) -> Tensor:
    """Return which cells are above 0, or beside one that is, or at its corner: bool [t, h, w] of logits [t, h, w]."""
    above = (logits > 0).float()
    return max_pool2d(above[:, None], kernel_size=3, stride=1, padding=1)[:, 0] > 0
