"""Count what a model's programs launch under a plan, from the model or from its config alone.

    costs = hidrop_fx.plan("hidrop-64", config)
    print(costs.on("h100", launches=hidrop_fx.count_launches(config, costs)))

The decoder is captured and rewritten as for a call, and its programs run on fake tensors: seconds, and no memory
for weights.
"""

from dataclasses import replace
from typing import Any

from torch import nn

from hidrop_fx.capture.captured import CapturedDecoder
from hidrop_fx.capture.layers import layer_list, text_decoder
from hidrop_fx.capture.twin import with_layers
from hidrop_fx.errors import ScheduleError
from hidrop_fx.lowering.launches import Launches, launches
from hidrop_fx.models import family_of
from hidrop_fx.models.weightless import weightless_model
from hidrop_fx.options import Options
from hidrop_fx.planning.costs import Costs
from hidrop_fx.planning.launch_counts import LaunchCounts, StepLaunches
from hidrop_fx.program.variant import Kind, Variant
from hidrop_fx.runtime.captures import Capture, capture_model
from hidrop_fx.runtime.given_modules import given_modules
from hidrop_fx.runtime.programs import Programs

_HEAD = 1
"""The product with the output head's weights."""


def count_launches(model: Any, costs: Costs) -> LaunchCounts:
    """Count the launches of a prefill and of a decode step under a plan, and without a schedule.

    Every operator that is more than a view counts, before a compiler fuses any; embeddings, the vision tower and
    the host's own copies are not in it. Rows of a batch are taken to be of different lengths: they decode under
    masks, as every recorded decode step does.

    Args:
        model: a transformers VLM, compiled or not, or its config.
        costs: what `hidrop_fx.plan` returned for it.

    Raises:
        ScheduleError: the plan is for another number of layers.
        UnsupportedModelError, CaptureError: the model cannot be compiled.
    """
    if not isinstance(model, nn.Module):
        model = weightless_model(model, dtype_bytes=costs.geometry.dtype_bytes)
    found = model.config.get_text_config().num_hidden_layers
    if found != costs.plan.num_layers:
        raise ScheduleError(
            f"the plan is for {costs.plan.num_layers} layers and {type(model).__name__} has {found}: launches are "
            "counted from the model's own program; plan for its own number of layers"
        )
    capture = replace(capture_model(model, found), branch=_branch(model, costs))
    prefill, decode = _counted(model, capture, costs)
    identity_prefill, identity_decode = _counted(model, capture, costs.identity)
    return LaunchCounts(
        prefill=prefill,
        decode=decode,
        identity_prefill=identity_prefill,
        identity_decode=identity_decode,
    )


def _branch(model: Any, costs: Costs) -> CapturedDecoder | None:
    """Capture the side branch that a score of the plan reads: the model's, or as many layers like its own."""
    if "twig" not in costs.schedule.modules:
        return None
    decoder, layer = text_decoder(model), min(costs.schedule.prune)
    twig = given_modules(model).get("twig")
    if not isinstance(twig, nn.ModuleList):
        own, count = layer_list(decoder)[1], costs.geometry.twig_layers
        first = max(0, min(layer, len(own) - count))
        twig = nn.ModuleList([*own[first : first + count]])
    return capture_model(model, None, with_layers(decoder, twig)).decoder


def _counted(model: Any, capture: Capture, costs: Costs) -> tuple[StepLaunches, StepLaunches]:
    options = Options(backend="eager", lowering="bodies")
    programs = Programs(model, costs.plan, options)
    capture = replace(capture, executables={})

    def counted(kind: Kind, variant: Variant) -> Launches:
        return launches(programs.executable(capture, kind, variant))

    def step(plain: Launches, recorded: Launches) -> StepLaunches:
        return StepLaunches(
            runs=tuple(
                sum(plain.layers[k] for k in range(run.start, run.stop)) for run in costs.segments
            ),
            between=plain.between,
            head=_HEAD if costs.geometry.vocab_size else 0,
            replay=1 + recorded.copies,
        )

    prefill = counted("prefill", _of_prompt(model, capture, costs))
    masked = counted("decode", Variant(masked=True))
    plain = masked if costs.batch_size > 1 else counted("decode", Variant())
    return step(prefill, prefill), step(plain, masked)


def _of_prompt(model: Any, capture: Capture, costs: Costs) -> Variant:
    """Return the variant of a prompt with images, of which the last token's logits are wanted."""
    columns = costs.text_tokens + costs.total_vision_tokens
    blocks = family_of(model).blocks is not None
    floors = costs.schedule.bottleneck is not None
    asked = (
        (name, rule.for_call(columns, blocks=blocks, floors=floors))
        for name, rule in capture.rules.items()
    )
    masks = tuple((name, rule) for name, rule in asked if rule is not None)
    return Variant(output="chosen", masks=masks)
