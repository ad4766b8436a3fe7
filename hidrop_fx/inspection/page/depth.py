"""Data of the page's upper part: tokens and costs over depth, and the events."""

from dataclasses import replace
from typing import Any

from hidrop_fx.planning import Costs, Event, Plan


def depth(row: Costs) -> dict[str, Any]:
    """Return tokens and costs from layer to layer, and the cost and savings of each event."""
    whole = row.identity
    return {
        "text": row.text_tokens,
        "vision": list(row.vision_tokens),
        "flops": list(row.layer_flops),
        "kv": list(row.layer_kv_bytes),
        "identity_tokens": whole.tokens[0],
        "identity_flops": list(whole.layer_flops),
        "identity_kv": list(whole.layer_kv_bytes),
        "totals": {
            "flops": [row.flops, whole.flops],
            "kv": [row.kv_bytes, whole.kv_bytes],
            "tokens": [sum(row.tokens), sum(whole.tokens)],
        },
        "events": [_event(row, event) for event in row.plan.events if event.layer or event.keep],
    }


def _event(row: Costs, event: Event) -> dict[str, Any]:
    """Compare an event with the same schedule without it."""
    schedule, layer = row.schedule, event.layer
    if (
        schedule.average is not None
    ):  # what it makes of the other events does not change with one of them
        total = row.entering_vision_tokens
        counts = {e.layer: row.segment_vision_tokens[e.name] for e in row.plan.of_kind("prune")}
        schedule = schedule.with_keeps({k: max(1, n) / max(1, total) for k, n in counts.items()})
    if event.kind == "prune":
        left = schedule.with_keeps({k: n for k, n in schedule.prune.items() if k != layer})
    else:
        left = replace(schedule, **({"inject": 0} if event.kind == "inject" else {"exit": None}))
    without = replace(row, plan=Plan.of(left, row.plan.num_layers))
    parent = row.plan.opened_by(event).parent
    assert parent is not None
    return {
        "layer": layer,
        "reason": event.kind,
        "before": row.segment_vision_tokens[parent],
        "after": row.vision_tokens[layer],
        "cost": row.event_flops[event.name],
        "saved_flops": without.flops - row.flops,
        "saved_kv": without.kv_bytes - row.kv_bytes,
    }
