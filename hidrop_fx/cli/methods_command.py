"""`hidrop methods`."""

from typing import Any

from hidrop_fx.cli.application import app, print_json
from hidrop_fx.cli.options import AsJson
from hidrop_fx.cli.plan_command import LLAVA_7B


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the published methods that a schedule may name, with what each costs at its authors' settings.

    Vision tokens a layer and FLOPs are those of LLaVA-1.5-7B: 576 vision tokens, 64 of text.

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
        "| method | rule | vision tokens a layer | prefill FLOPs | KV cache | trained with | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        most = "<= " if row["at_most"] else ""
        lines.append(
            f"| `{row['method']}` | {row['rule']} | {most}{row['vision_tokens_per_layer']} | "
            f"{most}{row['prefill_flops_share']:.0%} | {most}{row['kv_share']:.0%} | {'yes' if row['trained_with'] else 'no'} | {row['source']} |"
        )
    return lines


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
                "kv_share": costs.kv_bytes / costs.identity.kv_bytes,
                "trained_with": method.trains,
                "at_most": schedule.decides_by_pixels,
                "source": method.source,
            }
        )
    return found
