"""`hidrop calibrate`."""

import typer

from hidrop_fx.cli.application import app, check, print_json, report_progress
from hidrop_fx.cli.calibration_options import CalibrationOptions
from hidrop_fx.cli.options import AsJson, spelled_out


@app.command()
@spelled_out
def calibrate(options: CalibrationOptions, as_json: AsJson = False) -> None:
    """Find a schedule for a model from data; every other command takes the file it writes.

    \b
    Example: hidrop calibrate --budget 16 --refine 50
    Example: hidrop calibrate --model llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json \\
                 --images images --samples 128 --budget 64
    """
    from hidrop_fx.cli.calibration_files import calibrate_files, report

    check(None, options.backend)
    with report_progress(as_json) as progress:
        done = calibrate_files(options, progress)
    if as_json:
        print_json(report(done))
    else:
        typer.echo(done.calibration.table())
        typer.echo(f"\nschedule  {done.schedule}\nwritten   {', '.join(map(str, done.files))}")
