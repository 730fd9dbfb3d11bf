"""Start cocotb's runner on the simulation that the run folder asks for: `python -m sim.launch` (see
`session`)."""

import json
import os
import sys
from pathlib import Path

from cocotb_tools.runner import get_runner


def main():
    folder = Path(os.environ["INTRAIN_RUN_DIR"])
    request = json.loads((folder / "request.json").read_text())
    get_runner("verilator").test(
        test_module="sim.entry",
        hdl_toplevel=request["top"],
        hdl_toplevel_lang="verilog",
        build_dir=request["build"],
        test_dir=folder,
        results_xml=str(folder / "results.xml"),
        seed=request["seed"],
        plusargs=["+verilator+rand+reset+2", f"+verilator+seed+{request['seed']}"],
    )


if __name__ == "__main__":
    sys.exit(main())
