"""Registers of ECP5 multipliers, used where the circuit has them: synth_ecp5 does not do that.

A MULT18X18D has registers at its operands and at its product. yosys leaves them unused and puts flip-flops of the
fabric beside the multiplier, so a clock cycle holds its 3.93 ns (nextpnr's figure for speed grade 6) and two routes
across the fabric. `absorb_registers` moves such flip-flops into the block, in yosys's JSON netlist on its way to
nextpnr; the Verilog stays plain for every tool.

nextpnr times what enters and leaves a block with registers, not what happens inside: at most those 3.93 ns and a
flip-flop's 0.52 ns, so no limit up to 220 MHz.
"""

from __future__ import annotations

__all__ = ["absorb_registers"]

BITS = 18
PLAIN = {"CLKMUX": "CLK", "LSRMUX": "LSR", "REGSET": "RESET"}    # no inverters; starts and resets to 0


def absorb_registers(netlist: dict) -> int:
    """Move flip-flops into the MULT18X18D between them, wherever the circuit stays the same bit for bit.

    A multiplier is changed if each bit of its operands comes from a flip-flop or is a constant 0 and each bit of its
    product goes to one flip-flop and nowhere else, all of one clock, the bits of an operand or of the product with one
    enable or one synchronous reset. Operand flip-flops with other readers stay besides, with the same value in every
    cycle: all start at 0.

    netlist : what yosys's ``write_json`` writes after synth_ecp5, flattened; changed in place.
    Returns the number of flip-flops saved.
    """
    return sum(_absorb(module) for module in netlist["modules"].values())


def _absorb(module: dict) -> int:
    cells = module.get("cells", {})
    before_count = len(cells)
    driver: dict[int, str] = {}                      # net -> flip-flop that drives it
    readers: dict[int, set[tuple[str, str]]] = {}    # net -> (cell, port); ports of the module are ("", port)
    for name, cell in cells.items():
        for port, bits in cell["connections"].items():
            for bit in bits:
                if cell["port_directions"][port] == "input":
                    readers.setdefault(bit, set()).add((name, port))
                elif cell["type"] == "TRELLIS_FF":
                    driver[bit] = name
    for name, port in module.get("ports", {}).items():
        for bit in port["bits"]:
            readers.setdefault(bit, set()).add(("", name))

    def is_data_input(reader):
        return reader[1] == "DI" and cells[reader[0]]["type"] == "TRELLIS_FF"

    def control(flip_flop: str):
        """Clock, enable and reset nets; None if a register of the block cannot do the same."""
        parameters, wires = cells[flip_flop]["parameters"], cells[flip_flop]["connections"]
        enable, reset = parameters.get("CEMUX", "CE").strip(), wires.get("LSR", ["0"])[0]
        plain = all(parameters.get(key) == value for key, value in PLAIN.items()) and enable in ("CE", "1")
        if not plain or reset != "0" and not (parameters.get("SRMODE") == "LSR_OVER_CE" and enable == "1"):
            return None
        return wires["CLK"][0], wires["CE"][0] if enable == "CE" else "1", reset

    def common(flip_flops):
        controls = {control(name) if name else None for name in flip_flops}
        return controls.pop() if len(controls) == 1 else None

    for name, cell in [item for item in cells.items() if item[1]["type"] == "MULT18X18D"]:
        wires = cell["connections"]
        product = {}                                 # port -> flip-flop behind it
        for port in (f"P{k}" for k in range(2 * BITS)):
            behind = readers.get(wires[port][0], set()) if wires.get(port) else set()
            if behind:
                reader = next(iter(behind))
                product[port] = reader[0] if len(behind) == 1 and is_data_input(reader) else None
        operands = {side: {f"{side}{k}": driver.get(wires[f"{side}{k}"][0]) for k in range(BITS)
                           if wires[f"{side}{k}"][0] != "0"} for side in "AB"}
        groups = {"OUTPUT": common(product.values()), "INPUTA": common(operands["A"].values()),
                  "INPUTB": common(operands["B"].values())}
        if None in groups.values() or len({clock for clock, *_ in groups.values()}) > 1:
            continue

        slots = list(dict.fromkeys(group[1:] for group in groups.values()))     # (enable, reset) of CE0, RST0, ..
        clock = groups["OUTPUT"][0]
        new = {"CLK0": clock} | {f"CE{k}": enable for k, (enable, _) in enumerate(slots)} \
            | {f"RST{k}": reset for k, (_, reset) in enumerate(slots)}
        for port, net in new.items():
            wires[port], cell["port_directions"][port] = [net], "input"
            readers.setdefault(net, set()).add((name, port))
        cell["parameters"] |= {"RESETMODE": "SYNC", "GSR": "DISABLED"}
        for register, group in groups.items():
            k = slots.index(group[1:])
            cell["parameters"] |= {f"REG_{register}_CLK": "CLK0", f"REG_{register}_CE": f"CE{k}",
                                   f"REG_{register}_RST": f"RST{k}"}
        for port, flip_flop in product.items():
            wires[port] = cells[flip_flop]["connections"]["Q"]
            del driver[wires[port][0]], cells[flip_flop]
        for port, flip_flop in (operands["A"] | operands["B"]).items():
            before, after = wires[port][0], cells[flip_flop]["connections"]["DI"]
            readers[before].discard((name, port))
            wires[port] = after
            readers.setdefault(after[0], set()).add((name, port))
        for flip_flop in {*operands["A"].values(), *operands["B"].values()}:
            bit = cells[flip_flop]["connections"]["Q"][0]
            if not readers[bit]:
                for bits in cells[flip_flop]["connections"].values():
                    readers.get(bits[0], set()).difference_update({(flip_flop, p) for p in ("DI", "CE", "LSR")})
                del driver[bit], cells[flip_flop]
    return before_count - len(cells)
