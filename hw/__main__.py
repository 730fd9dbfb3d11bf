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
    options = parser.parse_args(arguments)
    try:
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
