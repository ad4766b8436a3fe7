"""The least time that a device needs for a plan: arithmetic against memory traffic, run of layers by run.

    r = plan("hidrop-64", model, batch_size=8).on("h100")
    r.prefill_seconds       # of the whole batch
    print(r)                # what bounds each run of layers

A bound, not a forecast: norms, softmax and activations between kernels are not in it, and launches only where they
were counted (`hidrop_fx.count_launches`).
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from hidrop_fx.errors import HidropError
from hidrop_fx.planning.launch_counts import LaunchCounts, StepLaunches

Bound = Literal["compute", "memory", "launches"]

LAUNCH_SECONDS = 4e-6
"""A short kernel that is launched behind others costs 3.8 us: NVIDIA's technical blog, "Getting Started with CUDA Graphs"
(on a V100, from C++). PyTorch's eager mode needs more for an operator, its compiled code about this; not measured here."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device's sustained rates: what large 16-bit products and long copies reach, not the data sheet's peaks."""

    name: str
    flops: float
    """16-bit matrix products, FLOPs a second, two a multiply-add."""
    bandwidth: float
    """Memory traffic, bytes a second."""
    launch: float = LAUNCH_SECONDS
    """Time of the host for a launch, seconds."""

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if not value > 0:
                raise HidropError(f"{field.name}={value!r} of {self.name} must be above 0")


DEVICES: dict[str, Device] = {
    "h100": Device(name="H100", flops=800e12, bandwidth=3.0e12),
    "h200": Device(name="H200", flops=800e12, bandwidth=4.3e12),
}


def device_of(device: str | Device) -> Device:
    """Return a device by its name.

    Raises:
        HidropError: no device of this name is known.
    """
    if isinstance(device, Device):
        return device
    found = DEVICES.get(str(device).lower())
    if found is None:
        raise HidropError(
            f"device={device!r}: its rates are not known; use one of {', '.join(DEVICES)}, or pass "
            "hidrop_fx.Device(name=..., flops=..., bandwidth=...)"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Work:
    """Arithmetic and memory traffic of one step through consecutive layers, for a whole batch."""

    name: str
    flops: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step through all layers: its work in order, and the time that a device needs at least."""

    device: Device
    work: tuple[Work, ...]

    def seconds_of(self, work: Work) -> float:
        """Return the longer of the time for the arithmetic and the time for the traffic."""
        return max(work.flops / self.device.flops, work.bytes / self.device.bandwidth)

    def bound_of(self, work: Work, launches: int = 0) -> Bound:
        """Return which of the two takes longer, or "launches" where the host needs longer still for so many."""
        arithmetic, traffic = work.flops / self.device.flops, work.bytes / self.device.bandwidth
        if launches * self.device.launch > max(arithmetic, traffic):
            return "launches"
        return "compute" if arithmetic >= traffic else "memory"

    @property
    def seconds(self) -> float:
        """Sum over all work."""
        return sum(map(self.seconds_of, self.work))

    def to_dict(self) -> dict[str, Any]:
        """Return work, times and bounds as plain JSON types."""
        lines = [
            {**asdict(work), "seconds": self.seconds_of(work), "bound": self.bound_of(work)}
            for work in self.work
        ]
        return {"seconds": self.seconds, "work": lines}


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least time for a prefill and for the decode step behind it, and the same without a schedule."""

    device: Device
    prefill: Step
    decode: Step
    identity_prefill: Step
    identity_decode: Step
    launches: LaunchCounts | None = None
    """Launches of the same steps, where they were counted."""

    @property
    def prefill_seconds(self) -> float:
        """Time of the whole batch's prefill."""
        return self.prefill.seconds

    @property
    def decode_seconds(self) -> float:
        """Time of one decode step of the whole batch: one token a row."""
        return self.decode.seconds

    def to_dict(self) -> dict[str, Any]:
        """Return device, work and times as plain JSON types."""
        found: dict[str, Any] = {
            "device": asdict(self.device),
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
            "identity": {
                "prefill_seconds": self.identity_prefill.seconds,
                "decode_seconds": self.identity_decode.seconds,
            },
        }
        if self.launches is not None:
            found["launches"] = self.launches.to_dict()
            for name, step, counted in self._counted(self.launches):
                found["launches"][name]["seconds"] = expected_seconds(step, counted.total)
                found["launches"][name]["recorded_seconds"] = expected_seconds(
                    step, counted.recorded
                )
        return found

    def __str__(self) -> str:
        d = self.device
        lines = [
            f"least time on {d.name} ({d.flops / 1e12:g} TFLOP/s, {d.bandwidth / 1e12:g} TB/s), ms",
            f"{'layers':>8}  {'prefill':>9}  {'bound':<7}  {'decode':>9}  {'bound':<7}",
        ]
        for ours, step in zip(self.prefill.work, self.decode.work, strict=True):
            lines.append(
                f"{ours.name:>8}  {self.prefill.seconds_of(ours) * 1e3:>9.3f}  "
                f"{self.prefill.bound_of(ours):<7}  {self.decode.seconds_of(step) * 1e3:>9.3f}  "
                f"{self.decode.bound_of(step):<7}"
            )
        for label, prefill, decode in (
            ("all", self.prefill.seconds, self.decode.seconds),
            ("identity", self.identity_prefill.seconds, self.identity_decode.seconds),
        ):
            lines.append(f"{label:>8}  {prefill * 1e3:>9.3f}  {'':<7}  {decode * 1e3:>9.3f}")
        faster = (
            self.identity_prefill.seconds / self.prefill.seconds,
            self.identity_decode.seconds / self.decode.seconds,
        )
        lines.append(f"{'ratio':>8}  {faster[0]:>8.2f}x  {'':<7}  {faster[1]:>8.2f}x")
        if self.launches is not None:
            lines += ["", *self._launch_lines(self.launches)]
        return "\n".join(lines)

    def _counted(self, launches: LaunchCounts) -> tuple[tuple[str, Step, StepLaunches], ...]:
        return ("prefill", self.prefill, launches.prefill), ("decode", self.decode, launches.decode)

    def _launch_lines(self, launches: LaunchCounts) -> list[str]:
        """Return the table of launches, with what the host needs for them and what bounds each run of layers."""
        each = self.device.launch
        sides = self._counted(launches)
        title = "  ".join(f"{name:>8}  {'ms':>7}  {'bound':<8}" for name, _, _ in sides)
        lines = [
            f"launches without a graph, before any are fused, {each * 1e6:g} us of the host each; bound: the longest",
            f"{'layers':>8}  {title}",
        ]
        for place, work in enumerate(self.prefill.work):
            cells = []
            for _, step, counted in sides:
                number = (*counted.runs, counted.head)[place]
                bound = step.bound_of(step.work[place], number)
                cells.append(f"{number:>8}  {number * each * 1e3:>7.3f}  {bound:<8}")
            lines.append(f"{work.name:>8}  {'  '.join(cells)}")
        rest = ("between", [counted.between for _, _, counted in sides])
        total = ("all", [counted.total for _, _, counted in sides])
        without = ("identity", [launches.identity_prefill.total, launches.identity_decode.total])
        replayed = ("recorded", [counted.recorded for _, _, counted in sides])
        for label, numbers in (rest, total, without, replayed):
            cells = [f"{n:>8}  {n * each * 1e3:>7.3f}  {'':<8}" for n in numbers]
            lines.append(f"{label:>8}  {'  '.join(cells)}".rstrip())
        for name, step, counted in sides:
            plain, recorded = (expected_seconds(step, n) for n in (counted.total, counted.recorded))
            by = "its launches" if plain > step.seconds else "the device"
            lines.append(
                f"expected of a {name}: {plain * 1e3:.2f} ms without a graph, bound by {by}; "
                f"{recorded * 1e3:.2f} ms recorded"
            )
        return lines


def expected_seconds(step: Step, launches: int) -> float:
    """Return the time of a step at best: the host launches while the device computes."""
    return max(step.seconds, launches * step.device.launch)
