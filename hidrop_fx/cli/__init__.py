"""The command line: `hidrop demo`, `run`, `plan`, `explain`, `inspect`, `dump`, `compare`, `bench`,
`calibrate`, `eval`, `methods`, `import-llava`.

    hidrop run --model llava-hf/llava-1.5-7b-hf --image cat.png --prompt "What is this?" \\
        --schedule hidrop-64
    hidrop inspect                    # without --model: the small model that is shipped, offline

Results go to stdout, as tables or (`--json`) as one JSON object; progress and errors go to stderr.
Exit codes: 0 success; 1 the command found something wrong (`compare`, `explain`); 2 the arguments are wrong,
with one line on stderr. Commands import what is heavy when they run, so that `--help` and `plan` answer at once.
"""

from hidrop_fx.cli import (  # noqa: F401 - each adds its commands to the application
    ask_commands,
    bench_command,
    calibrate_command,
    eval_command,
    import_command,
    inspection_commands,
    methods_command,
    plan_command,
)
from hidrop_fx.cli.application import app, main

__all__ = ["app", "main"]
