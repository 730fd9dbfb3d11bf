"""The systolic array: weight-stationary (FORWARD, ERROR) and output-stationary (GRADIENT) products."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .descriptor import Mode

__all__ = ["ArrayRow", "SystolicArray"]

SUM_BITS = 32
# Sums gated and ORed between two registers of a column's output tree: two levels of LUT4.
TREE_RADIX = 8


class ArrayRow(wiring.Component):
    """One row of elements. Everything that comes in at the left moves one element to the right per cycle.

    Element j: shadow -> weight -> product -> sum, a register each. One component per row, because one per
    element multiplies the simulation's build time.

    Parameters
    ----------
    columns : elements in the row.

    Attributes
    ----------
    left : In(signed(8))  left operand of element 0.
    load : In(1)  arrives with ``left``: the element takes its shadow as its weight.
    restart, chain : In(1)  arrive one cycle after ``left``. chain: add to the sum of the row above; otherwise
        restart: add to zero and show the old sum; otherwise add to the own sum.
    shift, weight : In(1), In(signed(8))  moves the shadows one element to the right; ``weight`` enters.
    shift_down : In(columns)  moves the shadow of the row above into this row (``shift`` wins).
    shadow_above, sum_above : In().array(columns)  from the row above.
    shadow, sum : Out().array(columns)  to the row below.
    show : Out(columns)  element j's ``restart``: its sum belongs on the column output in this cycle.
    """

    def __init__(self, columns: int):
        self.columns = columns
        super().__init__({
            "left": In(signed(8)), "load": In(1), "restart": In(1), "chain": In(1),
            "shift": In(1), "weight": In(signed(8)), "shift_down": In(columns),
            "shadow_above": In(signed(8)).array(columns), "sum_above": In(signed(SUM_BITS)).array(columns),
            "shadow": Out(signed(8)).array(columns), "sum": Out(signed(SUM_BITS)).array(columns),
            "show": Out(columns),
        })

    def elaborate(self, platform):
        m = Module()
        left, load, restart, chain, weight_in = self.left, self.load, self.restart, self.chain, self.weight
        shows = []
        for j in range(self.columns):
            def register(name, shape=1, j=j):
                return Signal(shape, name=f"{name}{j}", reset_less=True)

            operand, weight, shadow = (register(name, signed(8)) for name in ("operand", "weight", "shadow"))
            product, total = register("product", signed(16)), register("sum", signed(SUM_BITS))
            restart_here, chain_here = register("restart"), register("chain")
            with m.If(self.shift):
                m.d.sync += shadow.eq(weight_in)
            with m.Elif(self.shift_down[j]):
                m.d.sync += shadow.eq(self.shadow_above[j])
            with m.If(load):
                m.d.sync += weight.eq(shadow)
            m.d.sync += [
                operand.eq(left), restart_here.eq(restart), chain_here.eq(chain),
                product.eq(operand * weight),
                total.eq(Mux(chain_here, self.sum_above[j], Mux(restart_here, 0, total)) + product),
            ]
            m.d.comb += [self.shadow[j].eq(shadow), self.sum[j].eq(total)]
            shows.append(restart_here)
            if j + 1 < self.columns:
                load_here = register("load")
                m.d.sync += load_here.eq(load)
                left, load, restart, chain, weight_in = operand, load_here, restart_here, chain_here, shadow
        m.d.comb += self.show.eq(Cat(shows))
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
        return self.rows + self.columns + 2

    def latency(self, mode: Mode) -> int:
        """Cycles from an input vector (GRADIENT: a boundary) to its first result on column 0."""
        # operand delay, operand or restart, product or sum; in weight-stationary modes one per row as well.
        return 3 + self.tree_stages + (0 if Mode(mode) is Mode.GRADIENT else self.rows)

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
        shift_down = Cat(self.shift & error, delay(self.shift & error, columns - 1, "shift_down")) \
            | gradient.replicate(columns)
        load = delay(self.boundary | gradient, rows, "load")
        restart = delay(self.boundary & gradient, rows + 1, "restart")
        chain = delay(~gradient, rows + 1, "chain")

        shadow, total, sums, shows = top, [0] * columns, [], []
        for i in range(rows):
            row = ArrayRow(columns)
            m.submodules[f"row{i}"] = row
            # The bottom row's sums are results: it shows them throughout in weight-stationary modes.
            show_always = chain[i + 1] if i == rows - 1 else 0
            m.d.comb += [row.left.eq(left[i]), row.weight.eq(weight[i]), row.shift.eq(shift_right[i]),
                         row.shift_down.eq(shift_down), row.load.eq(load[i]),
                         row.restart.eq(restart[i + 1] | show_always), row.chain.eq(chain[i + 1])]
            for j in range(columns):
                m.d.comb += [row.shadow_above[j].eq(shadow[j]), row.sum_above[j].eq(total[j])]
            shadow, total = row.shadow, row.sum
            sums.append(row.sum)
            shows.append(row.show)

        # At most one row of a column shows its sum in a cycle, so an OR does for a multiplexer.
        def or_tree(values):
            while len(values) > 1:
                values = [a | b for a, b in zip(values[::2], values[1::2], strict=True)]
            return values[0]

        for j in range(columns):
            terms = [Mux(shows[i][j], sums[i][j], 0) for i in range(rows)]
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
