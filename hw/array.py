"""The systolic array: weight-stationary (FORWARD, ERROR) and output-stationary (GRADIENT) products."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .descriptor import Mode
from .interfaces import data_register

__all__ = ["ArrayRow", "SystolicArray"]

SUM_BITS = 32
# Sums ORed between two registers of a column's output tree: two levels of LUT4.
TREE_RADIX = 16


class ArrayRow(wiring.Component):
    """One row of elements. Everything that comes in at the left moves one element to the right per cycle.

    Element j: shadow -> weight -> product -> addend -> sum -> shown, a register each. Operand, weight and product
    are the registers inside a DSP block, the addend is the first one outside. One component per row, because one
    per element multiplies the simulation's build time.

    Parameters
    ----------
    columns : elements in the row.

    Attributes
    ----------
    left : In(signed(8))  left operand of element 0.
    load : In(1)  arrives with ``left``: the element takes its shadow as its weight.
    restart, chain : In(1)  arrive two cycles after ``left``. chain: add to the sum of the row above; otherwise
        restart: add to zero; otherwise add to the own sum. restart also shows the old sum.
    shift, weight : In(1), In(signed(8))  moves the shadows one element to the right; ``weight`` enters.
    shift_down : In(columns)  moves the shadow of the row above into this row (``shift`` wins).
    shadow_above, sum_above : In  array of signed bytes, signed(32) per column; from the row above.
    shadow, sum : Out  the same, to the row below.
    shown : Out(signed(32)).array(columns)  one cycle later than the sum: the sum as it was before ``restart``, at
        any other time 0.
    """

    def __init__(self, columns: int):
        self.columns = columns
        lanes, sums = data.ArrayLayout(signed(8), columns), signed(SUM_BITS)
        super().__init__({
            "left": In(signed(8)), "load": In(1), "restart": In(1), "chain": In(1),
            "shift": In(1), "weight": In(signed(8)), "shift_down": In(columns),
            "shadow_above": In(lanes), "sum_above": In(sums).array(columns),
            "shadow": Out(lanes), "sum": Out(sums).array(columns), "shown": Out(sums).array(columns),
        })

    def elaborate(self, platform):
        m = Module()
        columns, above = self.columns, self.shadow_above
        lanes = data.ArrayLayout(signed(8), columns)

        def register(name, shape):
            return Signal(shape, name=name, reset_less=True)

        operand, weight = register("operand", lanes), register("weight", lanes)
        shadow = data_register(m, self.shadow)
        # Elements on a diagonal of the array have the same control bits in the same cycle. `keep` makes synthesis leave
        # each its own (see hw/synthesis.py): a shared one would have readers all over the array.
        waiting, no_restart, chain = (Signal(bits, name=name, reset_less=True, attrs={"keep": 1}) for name, bits in
                                      (("waiting", columns - 1), ("no_restart", columns), ("chain", columns)))
        load = Signal(columns)
        m.d.comb += load.eq(Cat(self.load, waiting))
        m.d.sync += [waiting.eq(load), no_restart.eq(Cat(~self.restart, no_restart)),
                     chain.eq(Cat(self.chain, chain)), operand.eq(Cat(self.left, operand))]

        def merge(select, chosen, other):
            return Cat(Mux(select[j], chosen[j], other[j]) for j in range(columns))

        # What the conditions on whole rows (all, any) add is redundant: synthesis removes it, but simulators
        # handle a row at once, or not at all, in most cycles.
        with m.If(self.shift):
            m.d.sync += shadow.eq(Cat(self.weight, shadow))
        with m.Elif(self.shift_down.all()):
            m.d.sync += shadow.eq(above)
        with m.Elif(self.shift_down.any()):
            m.d.sync += shadow.eq(merge(self.shift_down, above, shadow))
        with m.If(load.all()):
            m.d.sync += weight.eq(shadow)
        with m.Elif(load.any()):
            m.d.sync += weight.eq(merge(load, shadow, weight))
        for j in range(columns):
            product, addend = (register(f"{name}{j}", signed(16)) for name in ("product", "addend"))
            total, total_above = data_register(m, self.sum[j]), self.sum_above[j]
            shown = data_register(m, self.shown[j])
            m.d.sync += [product.eq(operand[j] * weight[j]), addend.eq(product)]
            base, following = (Signal(signed(SUM_BITS), name=f"{name}{j}") for name in ("base", "following"))
            with m.If(chain.all()):
                m.d.comb += base.eq(total_above)
            with m.Elif(chain.any() | ~no_restart.all()):
                m.d.comb += base.eq(Mux(chain[j], total_above, Mux(no_restart[j], total, 0)))
            with m.Else():
                m.d.comb += base.eq(total)
            m.d.comb += following.eq(base + addend)
            # A second register with a synchronous reset costs less than a gate behind the first: 53 instead of
            # 61 LUT4 per element (ECP5, 8x8).
            m.d.sync += [total.eq(following), shown.eq(Mux(no_restart[j], 0, total))]
        return m


class SystolicArray(wiring.Component):
    """``rows`` x ``columns`` multipliers with input skew and column output trees (architecture 3.1).

    FORWARD and ERROR keep a weight tile in the elements; a vector of R bytes enters at the left each cycle
    and leaves as C sums of R products at the bottom. GRADIENT keeps the sums; vectors enter at the left and
    at the top, and each tile leaves row by row while the next one is already running.

    Timing (t: cycle in which inputs are presented; n = C in FORWARD, R in ERROR; inputs should come from
    registers; bubbles are allowed everywhere):

    * A weight tile is n cycles of ``shift``, consecutive or not. The first may come n cycles after the
      previous tile's ``boundary``, the last must come no later than in the cycle of its own ``boundary``,
      which accompanies the tile's first vector. So tiles may follow every max(P, 2 n - 1) cycles.
      FORWARD: vectors over ci on ``left_weight``; ERROR: vectors over ci on ``top``; both begin with the
      last output channel.
    * FORWARD, ERROR: the sums of the vector at t stand on column j in cycle t + latency(mode) + j.
    * GRADIENT: both operands are presented together, ``boundary`` with a tile's first pair, ``left`` = 0 in
      idle cycles. The boundary at t ends the tile before it: its row i stands on column j in cycle
      t + latency(GRADIENT) + i + j, so row i's control word is due in cycle t + i. Boundaries may follow
      every R cycles; one more ends the last tile.
    * ``control_out`` is ``control_in`` delayed by latency(mode): it accompanies column 0.
    * ``mode`` may change in a cycle in which ``empty`` is high; inputs may start in that same cycle.

    The sums are exact modulo 2**32: up to 133,144 products can never wrap (contract section 1).

    Parameters
    ----------
    config : gives ``rows`` and ``columns``.
    control : layout of the control word; a struct with a member ``valid`` of one bit.

    Attributes
    ----------
    mode : In(Mode).
    left, left_weight : In(8 R bits), arrays of signed bytes, one per row.
    top : In(8 C bits), array of signed bytes, one per column.
    shift, boundary : In(1)  see above.
    control_in, control_out : the control word beside the inputs and beside column 0.
    column : Out(32 C bits)  array of signed sums; column j is j cycles late.
    empty : Out(1)  neither shift, boundary nor a valid control word was presented during the last
        ``settle - 1`` cycles: what is left is results on their way out. Also low that long after reset.
    """

    def __init__(self, config: CoreConfig, control: data.StructLayout):
        if not isinstance(control, data.StructLayout) or "valid" not in control.members \
                or control["valid"].width != 1:
            raise ValueError("the array's control word must be a StructLayout with a one-bit member 'valid', "
                             f"not {control!r}")
        self.rows, self.columns, self.control = config.rows, config.columns, control
        row_bytes, column_bytes = (data.ArrayLayout(signed(8), n) for n in (config.rows, config.columns))
        super().__init__({
            "mode": In(Mode),
            "left": In(row_bytes), "left_weight": In(row_bytes), "top": In(column_bytes),
            "shift": In(1), "boundary": In(1),
            "control_in": In(control), "control_out": Out(control),
            "column": Out(data.ArrayLayout(signed(SUM_BITS), config.columns)),
            "empty": Out(1),
        })

    @property
    def tree_stages(self) -> int:
        """Registers of a column's output tree."""
        return 1 if self.rows <= TREE_RADIX else 2

    @property
    def settle(self) -> int:
        """Cycles from the last input to the first one in which the mode may change."""
        return self.rows + self.columns + 3

    def latency(self, mode: Mode) -> int:
        """Cycles from an input vector (GRADIENT: a boundary) to its first result on column 0."""
        # operand delay, operand, product, addend or restart, sum or shown; in weight-stationary modes one per row too.
        return 5 + self.tree_stages + (0 if Mode(mode) is Mode.GRADIENT else self.rows)

    def elaborate(self, platform):
        m = Module()
        rows, columns = self.rows, self.columns
        gradient, forward, error = (Signal(name=mode.name.lower()) for mode in
                                    (Mode.GRADIENT, Mode.FORWARD, Mode.ERROR))
        m.d.comb += [gradient.eq(self.mode == Mode.GRADIENT), forward.eq(self.mode == Mode.FORWARD),
                     error.eq(self.mode == Mode.ERROR)]

        def skew(lanes, bits, name):
            """Lane k delayed by k cycles. One register per delay holds all lanes that need it still."""
            result = [lanes[:bits]]
            for k in range(1, len(lanes) // bits):
                late = Signal(len(lanes) - bits, name=f"{name}{k}", reset_less=True)
                m.d.sync += late.eq(lanes[bits:])
                result.append(late[:bits])
                lanes = late
            return result

        def delay(bit, stages, name):
            """The bit delayed by 1, 2, ... `stages` cycles."""
            line = Signal(stages, name=name, reset_less=True)
            m.d.sync += line.eq(Cat(bit, line))
            return line

        # In GRADIENT mode a weight follows its shadow one cycle later, so the left operand waits as well.
        left_late = Signal(8 * rows, reset_less=True)
        m.d.sync += left_late.eq(self.left.as_value())
        left = skew(left_late, 8, "left_skew")
        weight = skew(self.left_weight.as_value(), 8, "weight_skew")
        top = skew(self.top.as_value(), 8, "top_skew")
        shift_right = Cat(self.shift & forward, delay(self.shift & forward, rows - 1, "shift_right"))
        # When GRADIENT ends, a column still shifts down until its first weight could come.
        down = (self.shift & error) | gradient
        shift_down = Cat(down, delay(down, columns - 1, "shift_down"))
        load = delay(self.boundary | gradient, rows, "load")
        restart = delay(self.boundary & gradient, rows + 2, "restart")
        chain = delay(~gradient, rows + 2, "chain")

        shadow, total, shown = Cat(top), [0] * columns, []
        for i in range(rows):
            row = ArrayRow(columns)
            m.submodules[f"row{i}"] = row
            # The bottom row's sums are results: it shows them throughout in weight-stationary modes.
            show_always = chain[i + 2] if i == rows - 1 else 0
            m.d.comb += [row.left.eq(left[i]), row.weight.eq(weight[i]), row.shift.eq(shift_right[i]),
                         row.shift_down.eq(shift_down), row.load.eq(load[i]),
                         row.restart.eq(restart[i + 2] | show_always), row.chain.eq(chain[i + 2])]
            m.d.comb += row.shadow_above.eq(shadow)
            m.d.comb += [row.sum_above[j].eq(total[j]) for j in range(columns)]
            shadow, total = row.shadow, row.sum
            shown.append(row.shown)

        # At most one row of a column shows its sum in a cycle, so an OR does for a multiplexer.
        def or_tree(values):
            while len(values) > 1:
                values = [a | b for a, b in zip(values[::2], values[1::2], strict=True)]
            return values[0]

        for j in range(columns):
            terms = [shown[i][j] for i in range(rows)]
            for stage in range(self.tree_stages):
                registers = []
                for k in range(0, len(terms), TREE_RADIX):
                    node = Signal(signed(SUM_BITS), name=f"column{j}_{stage}_{k}", reset_less=True)
                    m.d.sync += node.eq(or_tree(terms[k:k + TREE_RADIX]))
                    registers.append(node)
                terms = registers
            m.d.comb += self.column[j].eq(terms[0])

        word = self.control_in
        for k in range(rows):
            late = Signal(self.control, name=f"control_row{k}")
            m.d.sync += late.eq(word)
            if k == 0:
                m.d.sync += late.valid.eq(word.valid & ~gradient)
            word = late
        selected = Signal(self.control)
        m.d.comb += selected.eq(Mux(gradient, self.control_in.as_value(), word.as_value()))
        word = selected
        for k in range(self.latency(Mode.GRADIENT)):
            late = Signal(self.control, name=f"control{k}")
            m.d.sync += late.eq(word)
            word = late
        m.d.comb += self.control_out.eq(word)

        countdown = Signal(range(self.settle), init=self.settle - 1)
        with m.If(self.shift | self.boundary | self.control_in.valid):
            m.d.sync += countdown.eq(self.settle - 1)
        with m.Elif(countdown != 0):
            m.d.sync += countdown.eq(countdown - 1)
        m.d.comb += self.empty.eq(countdown == 0)
        return m
