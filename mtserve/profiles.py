"""Profiles: in which precision a checkpoint may compute, and which one serves on which hardware. No torch, no files.

Invariants (tests/test_profiles.py holds them):
1. `choose` is a pure function of what the checkpoints accept, with its recorded speeds, and of the hardware's flags:
   equal ones give the same profile on every start, whatever the order in which they are named.
2. It never gives a profile that is not accepted, that the device cannot run, or that the flags say does not pay while
   another one does.
3. A checkpoint that was never tuned accepts fp32 alone, so fp32 is what it gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mtserve.errors import CheckpointError

Device = Literal["cpu", "cuda"]
Speeds = Mapping[str, float]
"""Tokens a second by hardware key."""


@dataclass(frozen=True)
class Hardware:
    """What there is to compute on: the kind of device, and what of it PyTorch can use.

    cpu    `amx_bf16` `amx_int8` `avx512_bf16` `avx512_vnni`
    cuda   `bf16`, and the compute capability, such as `sm_90`
    """

    device: Device
    flags: frozenset[str] = frozenset()

    @property
    def key(self) -> str:
        """Equal just where device kind and flags are: `cpu`, `cpu:avx512_bf16+avx512_vnni`, `cuda:bf16+sm_90`."""
        return ":".join([self.device, *(["+".join(sorted(self.flags))] if self.flags else [])])


@dataclass(frozen=True)
class Needs:
    """Flags of which a profile needs one on a device; none if empty. Without it, it does not run, or (`runs_anyway`)
    is slower than fp32."""

    one_of: frozenset[str] = frozenset()
    runs_anyway: bool = False

    def met(self, flags: frozenset[str]) -> bool:
        return not self.one_of or bool(self.one_of & flags)


@dataclass(frozen=True)
class Precision:
    """A profile as such, of no checkpoint: what it is, and what it needs on each kind of device that it runs on."""

    meaning: str
    on: Mapping[Device, Needs] = field(default_factory=dict)

    def runs(self, hardware: Hardware) -> bool:
        """Whether the hardware can compute in it at all."""
        needs = self.on.get(hardware.device)
        return needs is not None and (needs.runs_anyway or needs.met(hardware.flags))

    def pays(self, hardware: Hardware) -> bool:
        """Whether the hardware has the units that make it worth its loss of accuracy."""
        needs = self.on.get(hardware.device)
        return needs is not None and needs.met(hardware.flags)


PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision("as trained, 32 bits", {"cpu": Needs(), "cuda": Needs()}),
    "bf16": Precision(
        "trunk in bfloat16",
        {
            "cpu": Needs(frozenset({"amx_bf16", "avx512_bf16"}), runs_anyway=True),
            "cuda": Needs(frozenset({"bf16"})),
        },
    ),
    "fp16": Precision("trunk in float16", {"cuda": Needs()}),
    "int8": Precision(
        "linears of the trunk's layers in 8-bit integers, all else in fp32",
        {"cpu": Needs(frozenset({"amx_int8", "avx512_vnni"}))},
    ),
}
"""All profiles that this version knows, by name."""

_ORDERS: Mapping[Device, tuple[str, ...]] = {
    "cuda": ("fp16", "bf16", "fp32"),  # equally fast, and fp16 has three bits more
    "cpu": ("bf16", "int8", "fp32"),  # where both have their units, bf16 is faster and more exact (docs/profiles.md)
}
"""Profiles from fastest, where no speed was measured."""


def choose(accepted: Mapping[str, Speeds], hardware: Hardware) -> str:
    """The profile to serve in, of those that a checkpoint accepts.

    Candidates are the accepted ones that pay on this hardware (if none does, those that run). If speeds of some were
    measured on hardware with just these flags, the fastest of these; else the first in a fixed order. Ties, and names
    from a later version, go by that order too. Raises CheckpointError where no accepted profile runs.
    """
    known = [name for name in accepted if name in PRECISIONS and PRECISIONS[name].runs(hardware)]
    candidates = [name for name in known if PRECISIONS[name].pays(hardware)] or known
    if not candidates:
        found = ", ".join(sorted(accepted)) or "none"
        raise CheckpointError(f"no profile that the checkpoint accepts runs on {hardware.key}; accepted: {found}")
    candidates.sort(key=_ORDERS[hardware.device].index)
    measured = [name for name in candidates if hardware.key in accepted[name]]
    return max(measured, key=lambda name: accepted[name][hardware.key]) if measured else candidates[0]


def together(*each: Mapping[str, Speeds]) -> dict[str, dict[str, float]]:
    """What several checkpoints of one trunk accept at once: profiles that all accept; speeds that all have measured,
    for the same work by each (the harmonic mean)."""
    first, *others = each
    found: dict[str, dict[str, float]] = {}
    for name in (name for name in first if all(name in other for other in others)):
        keys = [key for key in first[name] if all(key in other[name] for other in others)]
        found[name] = {key: len(each) / sum(1 / one[name][key] for one in each) for key in keys}
    return found


def profile_key(fingerprint: str, profile: str, device: Device) -> str:
    """What a state or an answer depends on beside its input and its head: the same trunk, in the same precision, on the
    same kind of device. For the keys of caches and for journals: of equal keys one may stand for the other, within
    rounding; of different ones never."""
    return f"{fingerprint}:{profile}:{device}"
