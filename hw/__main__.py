"""``python -m hw``: generate Verilog and documentation of the core."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import config, register_map


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hw", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    rtl = commands.add_parser("rtl", help="write Verilog and its JSON sidecar")
    rtl.add_argument("--core", default="small", help=f"one of {', '.join(config.PRESETS)}, or a .toml file")
    rtl.add_argument("--out", type=Path, default=Path("build/rtl"), help="folder to write into")
    registers = commands.add_parser("registers", help="print the register map")
    registers.add_argument("--format", choices=("markdown", "c"), default="markdown")
    commands.add_parser("program", help="print the program format as markdown")
    synth = commands.add_parser("synth", help="area and clock rate with yosys and nextpnr")
    synth.add_argument("--core", default="small", help=f"one of {', '.join(config.PRESETS)}, or a .toml file")
    synth.add_argument("--design", action="append", help="array, array+lanes, core, an engine or a unit; may repeat "
                       "(default: the first three)")
    synth.add_argument("--device", action="append", help="ecp5, xc7 or xcup; may repeat (default ecp5)")
    synth.add_argument("--seeds", type=int, default=3, help="placements on ECP5 (default 3)")
    synth.add_argument("--placer", choices=("heap", "static"), help="nextpnr's (default: heap, for the core static)")
    synth.add_argument("--router", choices=("router1", "router2"), default="router1", help="nextpnr's")
    synth.add_argument("--refinements", type=int, default=0, help="refine a static placement so many times more; needs "
                       "a native nextpnr (default 0)")
    synth.add_argument("--floorplans", type=int, default=0, help="place so many times before the seeds, each time to "
                       "choose the sites of block RAMs and multipliers (default 0)")
    synth.add_argument("--sites", type=Path, help="a floorplan: hw/floorplans has one of the core, --floorplans leaves "
                       "sites.json beside the netlist")
    synth.add_argument("--jobs", type=int, default=1, help="placements at a time (default 1; one of a core takes about "
                       "3 GB)")
    synth.add_argument("--no-route", action="store_true", help="synthesis only")
    synth.add_argument("--keep", action="store_true", help="put the results into the committed baseline")
    synth.add_argument("--out", type=Path, default=Path("build/synth"))
    options = parser.parse_args(arguments)
    try:
        if options.command == "synth":
            from . import synthesis
            try:
                return synthesis.main(options, config.load(options.core))
            except synthesis.SynthesisError as error:
                print(f"python -m hw: {error}", file=sys.stderr)
                return 1
        if options.command == "rtl":
            from . import verilog
            for path in verilog.write(config.load(options.core), options.out):
                print(path)
        elif options.command == "registers":
            print(register_map.c_header() if options.format == "c" else register_map.markdown(), end="")
        else:
            from . import descriptor
            print(descriptor.markdown(), end="")
    except (config.ConfigError, OSError) as error:
        print(f"python -m hw: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
