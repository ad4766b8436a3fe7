"""Tiny random models of HF's vision-language classes, one `Case` a class, and padded batches for them.

case = CASES["llava_next"]
model = case.make()
batch = make_batch(case, model, [[5, IMAGE, 6], [VIDEO, 7]], padding="left")
model.generate(**batch.inputs)
"""

from tests.support.families.batches import IMAGE, ROWS, VIDEO, Batch, RowOf, make_batch
from tests.support.families.case import Case
from tests.support.families.chunked import CHUNKED
from tests.support.families.convolving import CONVOLVING
from tests.support.families.grids import GRIDS
from tests.support.families.masked import MASKED
from tests.support.families.other_grids import OTHER_GRIDS
from tests.support.families.recurrent import RECURRENT
from tests.support.families.rows import BY_ROW
from tests.support.families.tiles import TILED
from tests.support.families.towers import SIMPLE

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *SIMPLE,
        *TILED,
        *BY_ROW,
        *GRIDS,
        *OTHER_GRIDS,
        *MASKED,
        *CHUNKED,
        *CONVOLVING,
        *RECURRENT,
    )
}

__all__ = ["CASES", "IMAGE", "ROWS", "VIDEO", "Batch", "Case", "RowOf", "make_batch"]
