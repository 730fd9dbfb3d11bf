"""A netlist's ports behind registers and few pins, so that a unit or a core of any width can be placed and routed.

The core has more ports than an FPGA has pins: on a chip they meet other logic. `few_pins` gives every port bit but
clock and reset a flip-flop and brings those to pins: inputs shift in along a chain of others, outputs leave as
parities. With pins the placer has something to hold on to, the clock is a global net, and every path into and out of
the design lies between two flip-flops and is timed. (nextpnr's ``--out-of-context`` has neither pins nor global nets: a
core's placement then begins as one heap.)
"""

from __future__ import annotations

from .dsp_registers import PLAIN

__all__ = ["few_pins", "top_module"]

BITS_PER_PIN = 4        # as many as a LUT has inputs
PARITY = 0x6996
STAY = ("clk", "rst")


def top_module(netlist: dict) -> dict:
    """The top module of a JSON netlist, of yosys or nextpnr."""
    module, = (m for m in netlist["modules"].values() if int(m.get("attributes", {}).get("top", "0"), 2))
    return module


def few_pins(netlist: dict) -> int:
    """Replace the ports of the top module but ``clk`` and ``rst`` by ``scan_in`` and ``scan_out``.

    netlist : what yosys's ``write_json`` writes after synth_ecp5, flattened; changed in place.
    Returns the number of cells added: they are not the design's.
    """
    module = top_module(netlist)
    ports, cells = module["ports"], module["cells"]
    clock = ports["clk"]["bits"]
    before = len(cells)
    wires = [bit for cell in cells.values() for bits in cell["connections"].values() for bit in bits]
    free = 1 + max(bit for bit in [*wires, *(b for p in ports.values() for b in p["bits"])] if isinstance(bit, int))

    def new_net():
        nonlocal free
        free += 1
        return free - 1

    def add(kind, parameters, inputs, output):
        cells[f"pins${len(cells)}"] = {
            "hide_name": 0, "type": kind, "parameters": parameters, "attributes": {},
            "port_directions": dict.fromkeys(inputs, "input") | dict.fromkeys(output, "output"),
            "connections": {name: [bit] for name, bit in (inputs | output).items()}}

    def register(bit, q=None):
        q = new_net() if q is None else q
        add("TRELLIS_FF", {**PLAIN, "CEMUX": "1 ", "GSR": "DISABLED", "SRMODE": "LSR_OVER_CE"},
            {"DI": bit, "CLK": clock[0]}, {"Q": q})
        return q

    def of_direction(direction):
        bits = [b for name, p in ports.items() if name not in STAY and p["direction"] == direction for b in p["bits"]]
        return [bits[i:i + BITS_PER_PIN] for i in range(0, len(bits), BITS_PER_PIN)]

    pins_in, pins_out = [], []
    for chain in of_direction("input"):
        pins_in.append(new_net())
        before_bit = pins_in[-1]
        for bit in chain:
            before_bit = register(before_bit)
            register(before_bit, bit)       # of its own, so that it stands where the design reads it
    for group in of_direction("output"):
        held, parity = [register(bit) for bit in group], new_net()
        add("LUT4", {"INIT": f"{PARITY:016b}"}, dict(zip("ABCD", [*held, *"000"][:4], strict=True)),
            {"Z": parity})
        pins_out.append(register(parity))
    module["ports"] = {name: ports[name] for name in STAY if name in ports}
    for name, direction, bits in (("scan_in", "input", pins_in), ("scan_out", "output", pins_out)):
        module["ports"][name] = {"direction": direction, "bits": bits}
        module["netnames"][name] = {"hide_name": 0, "bits": bits, "attributes": {}}
    return len(cells) - before
