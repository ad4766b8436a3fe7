"""The pass of each event kind, in the order in which they run.

A kind is registered in `planning/event_kinds.py` (tokens that it leaves, costs), here (its pass) and in
`reference/eager_events.py` (its meaning in the plain loop), under one name.
"""

import hidrop_fx.passes as passes
from hidrop_fx.program.program import Pass

EVENT_PASSES: dict[str, Pass] = {
    "inject": passes.inject,
    "prune": passes.prune,
    "exit": passes.exit_vision,
}
"""Event kind -> its pass, which rewrites all events of the kind: each starts from the segment that the
plan names as its parent."""
