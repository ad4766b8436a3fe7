"""`hidrop eval`."""

import typer

from hidrop_fx.cli.application import app, check, hide_bars, print_json
from hidrop_fx.cli.evaluation_options import EvaluationOptions
from hidrop_fx.cli.options import AsJson, spelled_out
from hidrop_fx.cli.prompts import schedule_text
from hidrop_fx.distributed.processes import joined, take_own_gpu


@app.command(name="eval")
@spelled_out
def evaluate(options: EvaluationOptions, as_json: AsJson = False) -> None:
    """Measure accuracy, vision tokens and seconds of methods at equal budgets; every answer goes to samples.jsonl.

    The shipped model answers questions about drawn pictures; another needs --data with answers. Run again, it goes on where it
    was interrupted. Started by torchrun, each process answers a part. With --tasks, lmms-eval asks, and scores.

    \b
    Example: hidrop eval --method hidrop --method fastv --budget 11
    Example: hidrop eval --model llava-hf/llava-1.5-7b-hf --schedule hidrop-64 --tasks gqa,pope
    Example: torchrun --nproc-per-node 8 -m hidrop_fx eval --model llava-hf/llava-1.5-7b-hf \\
                 --data questions.json --images images --schedule hidrop-64
    """
    for schedule in options.schedules or ():
        check(schedule_text(options.model, schedule), options.backend)
    check(None, options.backend)
    if options.tasks is not None:
        from hidrop_fx.cli.lmms_hand_over import hand_over

        hand_over(options)
        return
    take_own_gpu(options.device)
    from hidrop_fx.cli.evaluation import evaluated, table

    hide_bars()
    with joined() as processes:
        rows = evaluated(options, processes, as_json=as_json)
    if processes.is_first:
        if as_json:
            print_json([row.to_dict() for row in rows])
        else:
            typer.echo(table(rows))
