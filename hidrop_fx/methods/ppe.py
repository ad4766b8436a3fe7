"""PPE, Positional Preservation Embedding: merged tokens that keep the position ids of several of those they stand for.

The rule is that of the released code (github.com/MouxiaoHuang/PPE, 7b6aa7d: src/models/chatunivi.py, and `merge_tokens`,
`merge_tokens_image` and `apply_multimodal_rotary_pos_emb_ppe` of src/training/monkey_patch_forward.py), before the decoder, with
one spatial ratio, as its scripts/configs/ppe.json has it; without the noise by which it breaks ties of density.
"""

import math

from hidrop_fx.methods.published import Fields, register_method
from hidrop_fx.methods.reducers import REDUCERS, Reducer


def _clusters(tokens: int, *, ratio: float, copies: int) -> int:
    if isinstance(ratio, bool) or not isinstance(ratio, float | int) or not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio!r} is not a share of the tokens; use a float in (0, 1]")
    if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
        raise ValueError(f"copies={copies!r} is not a number of position ids; use an int >= 1")
    return max(math.ceil(tokens * ratio), 1)


REDUCERS.add(
    "density_peaks",
    Reducer(
        name="density_peaks",
        reduce="hidrop_fx.ops.density_peaks:merged_by_density",
        keep=_clusters,
        defaults={"ratio": 0.45, "copies": 8},
        counts=("ratio",),
        moves=True,
        per_frame=True,
        members=True,
    ),
)


@register_method(
    "ppe",
    source="PPE, ICLR 2026, arXiv 2510.22936; github.com/MouxiaoHuang/PPE, its merge before the decoder",
    summary="before the decoder: each frame's density-peak clusters become their mean, with the position ids of several members",
    trains=True,
)
def ppe(*, ratio: float = 0.45, copies: int = 8) -> Fields:
    """Merge each frame to a share of its tokens, rounded up; each bears the ids of its last `copies` members."""
    return {"before": f"density_peaks(ratio={ratio!r},copies={copies!r})"}
