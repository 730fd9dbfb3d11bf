"""Run a built simulation under cocotb.

Outside, `simulate` starts cocotb's runner in a process of its own, shows progress, hands step snapshots to a
consumer while the clock runs on, and returns what the scenario returned. Inside, the scenario is an
`async def scenario(session, **parameters)` that gets a `Session`: registers, memory, and
`run_until_interrupt`, during which Python sleeps and the model runs at native speed.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .shared import MemorySettings, RunFolder, SimulationError

ROOT = Path(__file__).resolve().parent.parent
PERIOD = 2
"""Time units (ns) of a clock cycle; see main.cpp."""
FOLDER = "INTRAIN_RUN_DIR"
POLL_SECONDS = 0.05
GRACE_SECONDS = 10


class Session:
    """A scenario's view of the running core. `dut` is cocotb's handle of the top level."""

    def __init__(self, dut, folder):
        self.dut = dut
        self.folder = folder
        self.control = folder.control
        self.memory = folder.memory

    @property
    def cycle(self):
        """Rising clock edges so far."""
        return self.control.cycle

    @property
    def stopping(self):
        """True once the user asked to end; scenarios look at it between doorbells."""
        return self.control.stop > 0

    async def cycles(self, count=1):
        """Let `count` clock cycles pass with Python awake."""
        from cocotb.triggers import RisingEdge

        for _ in range(count):
            await RisingEdge(self.dut.clk)

    async def reset(self, cycles=4):
        """Hold reset for `cycles` with an idle register port."""
        dut = self.dut
        for name in (
            "awaddr",
            "awprot",
            "awvalid",
            "wdata",
            "wstrb",
            "wvalid",
            "bready",
            "araddr",
            "arprot",
            "arvalid",
            "rready",
        ):
            getattr(dut, f"s_axi_{name}").value = 0
        dut.rst.value = 1
        await self.cycles(cycles)
        dut.rst.value = 0
        await self.cycles(2)

    async def _handshake(self, valids, response):
        """Hold each valid of `valids` ({valid: ready}) until taken; returns once `response` (valid) was
        there too."""
        from cocotb.triggers import RisingEdge

        for valid in valids:
            valid.value = 1
        waiting = dict(valids)
        for _ in range(1000):
            await RisingEdge(self.dut.clk)
            answered = int(response.value)
            for valid, ready in list(waiting.items()):
                if int(ready.value) and int(valid.value):
                    valid.value = 0
                    del waiting[valid]
            if answered:
                return
        raise SimulationError(f"the core did not answer a register access within 1000 cycles (cycle {self.cycle})")

    async def write_register(self, address, value):
        """Write a 32-bit register; raises on an error response."""
        dut = self.dut
        dut.s_axi_awaddr.value = address
        dut.s_axi_wdata.value = value
        dut.s_axi_wstrb.value = 15
        dut.s_axi_bready.value = 1
        await self._handshake(
            {dut.s_axi_awvalid: dut.s_axi_awready, dut.s_axi_wvalid: dut.s_axi_wready}, dut.s_axi_bvalid
        )
        dut.s_axi_bready.value = 0
        if int(dut.s_axi_bresp.value):
            raise SimulationError(
                f"the core refused to write register {address:#05x} (response {int(dut.s_axi_bresp.value)})"
            )

    async def read_register(self, address):
        """Value of a 32-bit register; raises on an error response."""
        dut = self.dut
        dut.s_axi_araddr.value = address
        dut.s_axi_rready.value = 1
        await self._handshake({dut.s_axi_arvalid: dut.s_axi_arready}, dut.s_axi_rvalid)
        dut.s_axi_rready.value = 0
        if int(dut.s_axi_rresp.value):
            raise SimulationError(
                f"the core refused to read register {address:#05x} (response {int(dut.s_axi_rresp.value)})"
            )
        return int(dut.s_axi_rdata.value)

    async def ring(self, address, value=1):
        """Write the doorbell register; later host writes are logged as after this doorbell."""
        self.memory.doorbells += 1
        await self.write_register(address, value)

    async def run_until_interrupt(self, limit):
        """Sleep until the interrupt pin is high, at most `limit` cycles; returns the cycles that passed.

        Python and VPI do nothing meanwhile: only the C++ loop runs.
        """
        from cocotb.triggers import First, RisingEdge, Timer

        start = self.cycle
        if not int(self.dut.irq.value):
            self.control.sleep = 1
            await First(RisingEdge(self.dut.irq), Timer(PERIOD * limit, "ns"))
            self.control.sleep = 0
        self.check_bus()
        if not int(self.dut.irq.value):
            raise SimulationError(
                f"no interrupt after {limit} cycles (cycle {self.cycle}, last data beat at cycle "
                f"{self.control.last_beat}, {self.control.steps} steps done)"
            )
        return self.cycle - start

    def check_bus(self):
        """Raise if the core broke the AXI protocol."""
        if self.control.violations:
            raise SimulationError(
                f"the core broke the AXI protocol {self.control.violations} times, first: {self.control.message}"
            )


@dataclass(frozen=True)
class Result:
    """What a simulation gave: the scenario's value, whether the user stopped it early, cycles, wall
    seconds, seconds and cycles with Python asleep, wall and processor seconds since the first clock edge, bus
    counters, the host's writes in order, cycles by [product, vector engine][tag][activity], and when the
    engines changed what they work on (see `RunFolder.events`)."""

    value: object
    stopped: bool
    cycles: int
    seconds: float
    loop_seconds: float
    loop_cycles: int
    clocked_seconds: float
    cpu_seconds: float
    read_beats: int
    write_beats: int
    hazards: int
    steps: int
    host_writes: tuple
    activity: np.ndarray
    events: np.ndarray

    @property
    def cycles_per_second(self):
        return self.loop_cycles / self.loop_seconds if self.loop_seconds else 0.0


def simulate(
    build,
    scenario,
    parameters=None,
    *,
    out,
    settings=None,
    plan=None,
    consumer=None,
    prepare=None,
    keep=None,
    seed=1,
    waves=None,
    cycle_limit=0,
    progress=None,
):
    """Run `scenario` ("package.module:function") on a build; returns a `Result` or raises `SimulationError`.

    `out` is a folder for logs (and waves.fst), `settings` the `MemorySettings`. `prepare(memory)` fills the
    memory first, `keep(memory)` sees it at the end. `consumer(snapshot)` gets every step snapshot in this
    process while the simulation goes on; what it raises ends the run. `waves` = (first, last) cycle needs the
    debug flavour. `progress(control)` is called a few times a second. Ctrl-C ends after the current doorbell,
    a second one at once.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with RunFolder.create(settings or MemorySettings(), plan) as folder:
        block = folder.control
        block.cycle_limit = cycle_limit
        if waves:
            block.trace_first, block.trace_last = waves
        if prepare:
            prepare(folder.memory)
        before = [asdict(entry) for entry in folder.memory.log]
        request = {
            "top": build.top,
            "build": str(build.folder),
            "scenario": scenario,
            "parameters": parameters or {},
            "seed": seed,
        }
        (folder.path / "request.json").write_text(json.dumps(request))
        start = time.monotonic()
        try:
            code = _run(folder, out / "simulation.log", consumer, progress)
        finally:
            if (folder.path / "waves.fst").exists():
                shutil.move(folder.path / "waves.fst", out / "waves.fst")
        seconds = time.monotonic() - start
        answer = _answer(folder, out / "simulation.log", code)
        if keep:
            keep(folder.memory)
        writes = before + answer["host_writes"]
        with open(out / "host_writes.jsonl", "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in writes)
        return Result(
            answer["value"],
            block.stop > 0,
            block.cycle,
            seconds,
            block.loop_nanoseconds / 1e9,
            block.loop_cycles,
            block.wall_nanoseconds / 1e9,
            block.cpu_nanoseconds / 1e9,
            block.read_beats,
            block.write_beats,
            block.hazards,
            block.steps,
            tuple(writes),
            np.array(folder.activity),
            folder.events(),
        )


def _clean_environment(folder):
    """The environment of the simulation: what pytest, make or a user's cocotb settings left must not change
    it."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("COCOTB_", "PYTEST_", "MAKE", "MFLAGS", "GPI_")) and key not in ("WAVES", "GUI")
    }
    paths = [str(ROOT), *(path for path in sys.path if path)]
    environment |= {
        FOLDER: str(folder.path),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "COCOTB_ANSI_OUTPUT": "0",
        "NO_COLOR": "1",
    }
    return environment


def _run(folder, log_path, consumer, progress):
    """Start the launcher and stay beside it until it ends; returns its exit code."""
    block = folder.control
    with open(log_path, "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sim.launch"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_clean_environment(folder),
            cwd=folder.path,
            start_new_session=True,
        )
        try:
            with _StopRequests(block):
                while True:
                    ended = process.poll() is not None
                    if consumer:
                        for snapshot in folder.snapshots():
                            consumer(snapshot)
                    if progress:
                        progress(block)
                    if ended:
                        return process.returncode
                    if block.ring_tail == block.ring_head:
                        time.sleep(POLL_SECONDS)
        except BaseException:
            block.stop = 2
            _end(process)
            raise


class _StopRequests:
    """Ctrl-C and SIGTERM end the run after the current doorbell, without tearing a consumer's work apart; the
    second one raises `KeyboardInterrupt` at once."""

    def __init__(self, block):
        self._block = block
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)

    def _request(self, number, frame):
        self._block.stop += 1
        if self._block.stop > 1:
            raise KeyboardInterrupt
        print("\nstopping after the current doorbell (Ctrl-C again: now)", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _end(process):
    """End the launcher and the simulation: politely first, then by force."""
    for action in (lambda: None, process.terminate, lambda: os.killpg(process.pid, signal.SIGKILL)):
        action()
        try:
            process.wait(GRACE_SECONDS)
            break
        except subprocess.TimeoutExpired:
            continue
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _answer(folder, log_path, code):
    path = folder.path / "result.json"
    if path.exists():
        answer = json.loads(path.read_text())
        if "error" in answer:
            raise SimulationError(answer["error"])
        return answer
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("simulation:")]
    # cocotb's last lines only sum up; what matters is the first that names an error.
    named = [line for line in lines if "rror" in line]
    reason = (told or named or lines[-1:] or ["no output"])[0]
    raise SimulationError(f"the simulation ended without a result (exit code {code}): {reason} (log: {log_path})")


async def serve(dut):
    """cocotb's side: run the requested scenario and leave its result as JSON."""
    folder = RunFolder(os.environ[FOLDER])
    request = json.loads((folder.path / "request.json").read_text())
    session = Session(dut, folder)
    try:
        module, _, name = request["scenario"].partition(":")
        value = await getattr(importlib.import_module(module), name)(session, **request["parameters"])
        answer = {"value": value, "host_writes": [asdict(entry) for entry in folder.memory.log]}
        text = json.dumps(answer)
    except Exception as error:
        traceback.print_exc()
        what = str(error) if isinstance(error, SimulationError) else f"{type(error).__name__}: {error}"
        text = json.dumps({"error": what or type(error).__name__})
    partial = folder.path / "result.part"
    partial.write_text(text)
    partial.rename(folder.path / "result.json")
