"""Memory of head and loss in a training step: with all logits at once, and a part at a time (`fused_loss=True`).

    python benchmarks/fused_loss.py --batch 4 --text-tokens 1024

A step of a small decoder with a large vocabulary on a CPU, eager, so that every tensor is an operator's: the bytes that are
alive at once, parameters left out, and seconds, with every text token supervised and with a quarter of them.
"""

import argparse
import time
from typing import Any

import geometries
import measure
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hidrop_fx as hidrop

IGNORE = -100


class LiveBytes(TorchDispatchMode):
    """The most bytes of storage that were alive at once, of those that operators made."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self.largest = 0
        self._own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._own:
                    reference = StorageWeakRef(storage)
                    self._alive[reference.cdata] = reference, storage.nbytes()
                    self.largest = max(self.largest, storage.nbytes())
        gone = [key for key, (reference, _) in self._alive.items() if reference.expired()]
        for key in gone:
            del self._alive[key]
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return found


def main() -> None:
    options = _parse()
    size = geometries.Size(
        layers=options.layers, width=options.width, intermediate=2 * options.width, heads=4,
        vocabulary=options.vocabulary, dtype=torch.float32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = geometries.build(size).train()
    shape = {"vision_tokens": options.vision_tokens, "text_tokens": options.text_tokens}
    inputs = geometries.prompt(model, batch=options.batch, **shape)
    result: dict[str, Any] = {
        "layers": options.layers,
        "width": options.width,
        "vocabulary": options.vocabulary,
        "batch": options.batch,
        **shape,
        "environment": measure.environment(),
        "steps": {},
    }
    for share in (1.0, 0.25):
        labels = inputs["input_ids"].clone()
        labels[labels == geometries.IMAGE_TOKEN] = IGNORE
        labels[:, : -int(options.text_tokens * share)] = IGNORE
        for fused in (False, True):
            hidrop.compile(model, options.schedule, backend="eager", fused_loss=fused)
            found = _measured(model, inputs | {"labels": labels})
            name = f"{'fused' if fused else 'all logits'}, {share:.0%} supervised"
            result["steps"][name] = found
            print(
                f"{name:28} peak {found['peak_bytes'] / 2**20:8.1f} MiB, {found['seconds']:.2f} s"
            )
    name = f"fused-loss-{options.width}x{options.vocabulary}-b{options.batch}-cpu"
    measure.write(name, result, options.output)


def _measured(model: Any, inputs: dict[str, Any]) -> dict[str, float]:
    """Return bytes and seconds of a step, and its loss; the first of three is not counted."""

    def step() -> float:
        given = {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])}
        model.zero_grad(set_to_none=True)
        loss = model(**given).loss
        loss.backward()
        return float(loss.detach())

    step()
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    with LiveBytes(model) as live:
        loss = step()
    model.zero_grad(set_to_none=True)
    return {
        "peak_bytes": live.peak,
        "largest_tensor_bytes": live.largest,
        "seconds": seconds,
        "loss": loss,
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32064)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--vision-tokens", type=int, default=64)
    parser.add_argument("--text-tokens", type=int, default=1024)
    parser.add_argument("--schedule", default="inject=1,prune=1:16,exit=3")
    parser.add_argument("--output", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
