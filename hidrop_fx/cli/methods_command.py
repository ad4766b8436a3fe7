"""`hidrop methods`."""

from typing import TYPE_CHECKING, Any

from hidrop_fx.cli.application import app, print_json
from hidrop_fx.cli.options import AsJson
from hidrop_fx.cli.plan_command import LLAVA_7B

if TYPE_CHECKING:
    from hidrop_fx.schedule import Schedule


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the published methods that a schedule may name, with what each costs at its authors' settings.

    Vision tokens a layer and FLOPs are those of LLaVA-1.5-7B: 576 vision tokens, 64 of text. Scoring is what filter
    layers compute beside their survivors; that of stages before the decoder and on the cache is not counted ("-").

    \b
    Example: hidrop plan --schedule "fastv(layer=2,keep=0.25)"
    """
    rows = _rows()
    if as_json:
        print_json(rows)
        return
    print("\n".join(methods_table(rows)))


def methods_table(rows: list[dict[str, Any]]) -> list[str]:
    """Write the lines of a Markdown table."""
    lines = [
        "| method | rule | vision tokens a layer | prefill FLOPs | scoring GFLOPs | KV cache | trained with | families | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        most = "<= " if row["at_most"] else ""
        counted = row["scoring_flops"] or not row["scored_elsewhere"]
        scoring = f"{row['scoring_flops'] / 1e9:.3g}" if counted else "-"
        lines.append(
            f"| `{row['method']}` | {row['rule']} | {most}{row['vision_tokens_per_layer']} | "
            f"{most}{row['prefill_flops_share']:.0%} | {scoring} | {most}{row['kv_share']:.0%} | "
            f"{'yes' if row['trained_with'] else 'no'} | {row['families']} | {row['source']} |"
        )
    return lines


def families(schedule: "Schedule") -> str:
    """Say which model families a schedule is for: those with what it reads, without what it cannot go with."""
    reducer = None if schedule.reduction is None else schedule.reduction.reducer
    if reducer is not None and reducer.reads_tower:
        return "towers as LLaVA's"
    if reducer is not None and reducer.module is not None:
        return "towers as Qwen2.5-VL's"
    rule = schedule.position_rule
    refused = {
        "M-RoPE": rule.renumbers_after_prunes or rule.renumbers_text,
        "deepstack": bool(reducer or schedule.reads or schedule.merge or schedule.modules),
        "recurrent layers": bool(schedule.cache or schedule.reads)
        or schedule.bottleneck is not None,
    }
    base = "M-RoPE" if reducer is not None and reducer.members else "all"
    names = ", ".join(name for name, wrong in refused.items() if wrong)
    return f"{base}; not {names}" if names else base


def _rows() -> list[dict[str, Any]]:
    from hidrop_fx.methods import METHODS
    from hidrop_fx.planning import plan
    from hidrop_fx.schedule import Schedule

    found = []
    for name, method in METHODS.items():
        schedule = Schedule.preset(name)
        costs = plan(schedule, text_tokens=64, **LLAVA_7B)
        found.append(
            {
                "method": str(method),
                "rule": method.summary,
                "vision_tokens_per_layer": round(costs.average_vision_tokens, 1),
                "prefill_flops_share": costs.flops / costs.identity.flops,
                "scoring_flops": sum(costs.event_flops.values()),
                "scored_elsewhere": schedule.before is not None or schedule.cut is not None,
                "kv_share": costs.kv_bytes / costs.identity.kv_bytes,
                "trained_with": method.trains,
                "families": families(schedule),
                "at_most": schedule.decides_by_pixels,
                "source": method.source,
            }
        )
    return found
