"""Two products with one factor in common: two multipliers, or one with both other factors packed into an operand.

Not part of the core: it measures what two int8 products per DSP would save (docs/silicon.md).
"""

from __future__ import annotations

from amaranth.hdl import Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["ProductPair"]

OFFSET = 16      # a product of two int8 has 16 bits, so the operand has 25 and fits a DSP48E1's 25 x 18 bits


class ProductPair(wiring.Component):
    """Two neighbouring elements of a weight-stationary row: ``sum[k]`` = ``above[k]`` + ``left`` * ``weight[k]``.

    Packed, one multiplier gives ``left`` * (``weight[1]`` * 2**16 + ``weight[0]``). Its lower 16 bits are product 0;
    product 1 is the rest, plus 1 where product 0 is negative, because that one borrowed from it.

    Attributes
    ----------
    left : In(signed(8)). weight : In(signed(8)).array(2). above : In(signed(32)).array(2).
    sum : Out(signed(32)).array(2), three cycles after its operands: all inputs, the products and the sums are
        registered, as a DSP's own registers are.
    """

    def __init__(self, *, packed: bool):
        self.packed = packed
        super().__init__({"left": In(signed(8)), "weight": In(signed(8)).array(2), "above": In(signed(32)).array(2),
                          "sum": Out(signed(32)).array(2)})

    def elaborate(self, platform):
        m = Module()

        def registered(value, name):
            register = Signal(value.shape(), name=name, reset_less=True)
            m.d.sync += register.eq(value)
            return register

        left = registered(self.left, "left_in")
        above = [registered(registered(self.above[k], f"above{k}_in"), f"above{k}") for k in range(2)]
        if self.packed:
            operand = Signal(signed(OFFSET + 9), reset_less=True)
            m.d.sync += operand.eq((self.weight[1] << OFFSET) + self.weight[0])
            both = registered(operand * left, "both")
            products = [both[:OFFSET].as_signed(), both[OFFSET:].as_signed() + both[OFFSET - 1]]
        else:
            products = [registered(registered(self.weight[k], f"weight{k}_in") * left, f"product{k}")
                        for k in range(2)]
        for k in range(2):
            m.d.sync += self.sum[k].eq(above[k] + products[k])
        return m
