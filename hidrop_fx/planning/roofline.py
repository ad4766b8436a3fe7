"""The least time that a device needs for a plan: arithmetic against memory traffic, run of layers by run.

    r = plan("hidrop-64", model, batch_size=8).on("h100")
    r.prefill_seconds       # of the whole batch
    print(r)                # what bounds each run of layers

A bound, not a forecast: launches, norms, softmax, activations between kernels and the host are not in it.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from hidrop_fx.errors import HidropError

Bound = Literal["compute", "memory"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device's sustained rates: what large 16-bit products and long copies reach, not the data sheet's peaks."""

    name: str
    flops: float
    """16-bit matrix products, FLOPs a second, two a multiply-add."""
    bandwidth: float
    """Memory traffic, bytes a second."""

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

    def bound_of(self, work: Work) -> Bound:
        """Return which of the two takes longer."""
        arithmetic, traffic = work.flops / self.device.flops, work.bytes / self.device.bandwidth
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
        return {
            "device": asdict(self.device),
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
            "identity": {
                "prefill_seconds": self.identity_prefill.seconds,
                "decode_seconds": self.identity_decode.seconds,
            },
        }

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
        return "\n".join(lines)
