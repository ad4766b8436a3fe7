"""The schedule, and what it learned, saved beside a model's own weights."""

from collections.abc import Collection, Mapping
from typing import Any

from hidrop_fx.capture.parallel_styles import writes_files
from hidrop_fx.planning.geometry import MODULES
from hidrop_fx.runtime.given_modules import given_modules
from hidrop_fx.runtime.hf.override import arguments, call_replaced, record_of
from hidrop_fx.runtime.runtime import Runtime
from hidrop_fx.training.saved_modules import write_modules
from hidrop_fx.training.sidecar import gather_ratios, write_sidecar


def save_pretrained(owner: Any, runtime: Runtime, *args: Any, **kwargs: Any) -> Any:
    """Save a model, or PEFT's model around it, and the schedules that are in force now."""
    record = record_of(runtime.model)
    if record is not None:
        given = arguments(type(owner).save_pretrained, owner, args, kwargs)
        contents = record.schedules.contents()
        if not given.get("is_main_process", True):
            gather_ratios(contents)  # the process that writes waits for this one's part
        elif writes_files(runtime.model):
            write_sidecar(given["save_directory"], contents)
            write_modules(given["save_directory"], given_modules(runtime.model))
        if kwargs.get("state_dict") is not None:
            beside = {runtime.ratios_at for runtime in record.schedules.named.values()} | {MODULES}
            kwargs["state_dict"] = _weights(kwargs["state_dict"], beside)
    return call_replaced(owner, "save_pretrained", *args, **kwargs)


def _weights(state: Mapping[str, Any], beside: Collection[str]) -> dict[str, Any]:
    """Return a state dict without what schedules brought: ZeRO-3 makes one of all parameters, asking no module."""
    return {name: v for name, v in state.items() if name.split(".")[0] not in beside}
