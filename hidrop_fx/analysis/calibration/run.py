"""Calibrate a model: every measurement of it on some samples.

samples  = prepare_samples(model, batches)                  # images encoded once
measured = measure_layers(model, samples)           # one pass
exits, injections = sweeps(trials)                  # one pass for every layer, over fewer tokens
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hidrop_fx.analysis.calibration.calibration import Calibration
from hidrop_fx.analysis.data.samples import prepare_samples
from hidrop_fx.analysis.measuring.attention_similarity import TOPS, WINDOWS
from hidrop_fx.analysis.measuring.hooked_decoder import decoder_layers, eval_mode
from hidrop_fx.analysis.measuring.layers import measure_layers, sketch
from hidrop_fx.analysis.measuring.sweeps import exit_sweep, injection_sweep
from hidrop_fx.analysis.progress_bar import progress_bar
from hidrop_fx.analysis.searching.trials import check_backend
from hidrop_fx.analysis.searching.workbench import Workbench
from hidrop_fx.capture.parallel_styles import check_undivided
from hidrop_fx.errors import InputError
from hidrop_fx.models import backbone_of, family_of

TOLERANCE = 0.02


def calibrate(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    tolerance: float = TOLERANCE,
    windows: Sequence[int] = WINDOWS,
    tops: Sequence[int] = TOPS,
    backend: str = "eager",
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Measure where a model uses its vision tokens, so that a schedule can be chosen for it.

    The model may be compiled or not, and stays as it is; it is in eval mode meanwhile. Its own attention
    implementation runs: attention is read by computing a few query rows beside it. The decoder runs once
    over the samples with twice their rows, and once for every exit and injection layer through compiled
    programs, which are captured once.

    Args:
        model: a transformers VLM, compiled or not.
        batches: mappings of what `model.forward` takes, as its processor returns them: any padding,
            any number of images. With `labels` (-100 where nothing is asked) damage is the drop in
            accuracy, a sample being right where all its supervised tokens are the likeliest, and
            attention is read before each answer; without, damage is the KL divergence of the next token.
        tolerance: damage that a choice may do, as a share of the worst that the sweeps find.
        windows: layers ahead that ILVAS compares.
        tops: numbers of vision tokens that it compares.
        backend: of the sweeps' programs: "eager" compiles nothing, "inductor" pays for long data.
        seed: default of `Calibration.refine`.
        progress: show bars on stderr.

    Raises:
        InputError: no samples, no images, a batch that does not fit, or a model that gives NaN; says which
            and what to do.
        UnsupportedModelError: the model cannot be compiled, or its attention cannot be read.
    """
    check_backend(backend)
    if not 0 <= tolerance <= 1:
        raise InputError(f"tolerance={tolerance!r}: use a share of the worst damage, in [0, 1]")
    for name, values in (("windows", windows), ("tops", tops)):
        if any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
            raise InputError(f"{name}={tuple(values)}: use integers >= 1")
    check_undivided(model, "hidrop.calibrate")
    family_of(model)
    backbone_of(model)
    layers = len(decoder_layers(model))
    started = time.perf_counter()
    with eval_mode(model):
        samples = prepare_samples(model, batches, progress=progress)
        count = sum(map(len, samples))
        with progress_bar("measuring", count, shown=progress) as tick:
            measured, reference = measure_layers(
                model, samples, windows=windows, tops=tops, tick=tick
            )
        bench = Workbench(model, samples, reference, backend)
        with progress_bar("sweeps", 2 * layers * count, shown=progress) as tick:
            exits = exit_sweep(bench.all, layers, tick)
            injections = injection_sweep(bench.all, layers, tick)
    return Calibration(
        model=getattr(model, "name_or_path", "") or type(model).__name__,
        typical=bench.typical,
        samples=count,
        digest=bench.digest,
        measurements=measured,
        exits=exits,
        injections=injections,
        tolerance=tolerance,
        seed=seed,
        passes=len(samples) + bench.passes,
        seconds=time.perf_counter() - started,
        sketch=sketch(reference),
        bench=bench,
        progress=progress,
    )
