"""Units with a reset register of their own."""

from __future__ import annotations

from amaranth.hdl import ClockDomain, ClockSignal, DomainRenamer, Module, ResetSignal, Signal

__all__ = ["local_reset"]


def local_reset(m: Module, name: str, unit, reset=None):
    """``unit`` in a clock domain ``name`` of module ``m``, reset a cycle later than ``m``.

    A reset of a core has thousands of readers all over a device. With a register for each unit, which `keep` (see
    hw/synthesis.py) holds apart from its equals, it reaches those in two steps, and no gate joins several resets.
    Whatever resets ``m`` lasts two cycles or more, so that nothing leaves a unit for one that was reset before.

    reset : what resets the unit; the reset of ``m`` if None.
    """
    restart = Signal(init=1, name=f"restart_{name}", attrs={"keep": 1}, reset_less=True)
    m.domains += ClockDomain(name, local=True)
    m.d.sync += restart.eq(ResetSignal(allow_reset_less=True) if reset is None else reset)
    m.d.comb += [ClockSignal(name).eq(ClockSignal()), ResetSignal(name).eq(restart)]
    return DomainRenamer(name)(unit)
