"""Run a script under a launcher on CPUs, with accelerate's FSDP2 plug-in and DeepSpeed accepted there: on_cpu.py SCRIPT [ARGUMENTS]."""

import os
import runpy
import sys
from pathlib import Path

from tests.support.sharding_accelerate import take_cpus
from tests.support.zero import backend_of_cpus

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    if "--deepspeed" in sys.argv or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        backend_of_cpus().start()
    else:
        take_cpus()
    runpy.run_path(sys.argv[0], run_name="__main__")
