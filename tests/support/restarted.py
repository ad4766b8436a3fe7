"""A process of its own for the tests of what survives one.

python -m tests.support.restarted '{"schedule": "inject=1", "save": "x.hidrop"}'    # prints one line of JSON
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import torch
from torch._dynamo.utils import counters

import hidrop_fx as hidrop
import hidrop_fx.pipeline.pipeline as pipeline
from tests.support.models import IMAGE, batch, tiny_llava
from tests.support.runtimes import runtime_in

ROW = [5, 6, IMAGE, 7, 8, 9]


def main() -> None:
    asked = json.loads(sys.argv[1])
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hidrop_fx").addHandler(handler)
    torch.set_num_threads(1)
    if asked.get("unlike"):
        _write_out_attention()
    model = hidrop.compile(tiny_llava(num_layers=2), asked["schedule"])
    loaded = hidrop.load_compiled(model, asked["load"]) if "load" in asked else None
    inputs = batch(model, [ROW], padding="left")
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        logits = model(**inputs).logits
    if "save" in asked:
        hidrop.save_compiled(model, asked["save"])
    runtime = runtime_in(model)
    found: dict[str, Any] = {
        "tokens": tokens.tolist(),
        "logits": logits.flatten().tolist(),
        "loaded": loaded,
        "compiled": len(runtime.programs.log.entries),
        "fallbacks": runtime.programs.log.fallbacks,
        "said": said,
        "counters": dict(counters["inductor"]) | dict(counters["aot_autograd"]),
    }
    print(json.dumps(found))


def _write_out_attention() -> None:
    """The same passes, one of which rewrites otherwise."""
    original = pipeline.passes_for

    def changed(*args: Any, **options: Any) -> Any:
        listed = original(*args, **options)
        return [(p, {"fused": False} if p.__name__ == "attention" else o) for p, o in listed]

    pipeline.passes_for = changed


if __name__ == "__main__":
    main()
