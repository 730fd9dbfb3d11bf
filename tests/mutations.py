"""`python -m tests.mutations`: break the hardware and its compiler on purpose and name the test that sees it.

    python -m tests.mutations [NAME ...] [--list] [--out FOLDER]

NAME selects mutations whose name contains it. Each edits one file of a copy of the tree, in which the named tests
then run until one fails; first, the copy without any edit must pass them all. Exit status 0 only if every mutation is
caught by a failing test: one that does not build, or brings the tests to a halt, counts as missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("golden", "gpu", "hw", "sim", "tests", "pyproject.toml")
TIMEOUT = 900

__all__ = ["Mutation", "MutationError", "MUTATIONS"]


class MutationError(RuntimeError):
    """The mutations cannot be tried."""


@dataclasses.dataclass(frozen=True)
class Mutation:
    """An edit of one source file, ``old`` to ``new`` at each of ``count`` places, and the tests that may see it, the
    cheapest first.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    count: int = 1

    def apply(self, root: Path) -> str:
        """Edits the file below ``root``; returns its text before. Raises MutationError where ``old`` is not there."""
        path = root / self.file
        text = path.read_text()
        found = text.count(self.old)
        if found != self.count:
            raise MutationError(f"mutation {self.name}: {self.file} has {self.old!r} {found} times, not {self.count}: "
                                "follow the source")
        path.write_text(text.replace(self.old, self.new))
        return text


def _hw(test: str) -> str:
    return f"tests/hw/test_{test}"


EDGES = _hw("scalar.py::test_each_operation_at_the_edges")
ROUND = _hw("round_shift.py::test_every_16_bit_input_and_shift")
WORDS = _hw("random_words.py::test_random_traversals_and_keys")
WIDE = _hw("wide.py::test_every_operation_on_edges[tiny]")
PASSES = _hw("vector.py::test_forward_requantize_relu_pool_and_back[tiny-none-Rounding.NEAREST]")
UPDATE = _hw("vector.py::test_wage_update_of_tiled_weights[tiny-3-64-5000]")
COMPUTES = "test_programs_compute_what_golden_computes"
PROGRAMS, DFP = f"tests/sim/test_programs.py::{COMPUTES}", f"tests/sim/test_dfp.py::{COMPUTES}"
NITI_MLP, NITI = f"{PROGRAMS}[niti-mlp-8-1-options2]", f"{PROGRAMS}[niti-tiny-cnn-5-1-options4]"
WAGE_MLP, WAGE = f"{PROGRAMS}[wage-mlp-8-1-options0]", f"{PROGRAMS}[wage-tiny-cnn-5-5-options1]"
DFP_MLP, DFP_NORM = f"{DFP}[tiny-mlp-32-3-options0]", f"{DFP}[tiny-tiny-cnn-bn-2-2-options4]"
MASTERS = "tests/sim/test_programs.py::test_wage_masters_at_the_edges"
POWER = "tests/sim/test_programs.py::test_a_maximum_that_is_a_power_of_two"
RESIDUAL = f"{DFP}[tiny-block-2-2-options5]"

# The arithmetic is in hw; what each method makes of it, and in which order, in sim.
MUTATIONS = (
    # Rounding and ranges.
    Mutation("half-up for half-even", "hw/round_shift.py", "rotated[0] & whole_mask[0]", "~negative[3]",
             (f"{ROUND}[half_even]",)),
    Mutation("half-even ties to odd", "hw/round_shift.py", "rotated[0] & whole_mask[0]", "~rotated[0]",
             (f"{ROUND}[half_even]",)),
    Mutation("stochastic rounding of magnitudes", "hw/round_shift.py",
             "threshold.eq((draw1 ^ (~negative[1]).replicate(32)) << (word - 32)),\n"
             "                                 low.eq(~negative[1])]",
             "threshold.eq((~draw1)[:32] << (word - 32)), low.eq(1)]", (f"{ROUND}[stochastic]",)),
    Mutation("pseudo-stochastic halves of odd shifts", "hw/round_shift.py", "(padded & low_half1) << odd1",
             "padded & low_half1", (f"{ROUND}[pseudo_stochastic]",)),
    Mutation("saturation to -128", "hw/round_shift.py", "Mux(minus, -bound, bound)",
             "Mux(minus, -bound - 1, bound)", (f"{ROUND}[nearest]",)),
    Mutation("zero counts as positive", "hw/round_shift.py", "positive = ~negative[3] & rotated.any()",
             "positive = ~negative[3]", (_hw("round_shift.py::test_flags_tell_what_left_the_range"),)),
    Mutation("ceil for the sqrt(2) rule", "hw/scalar.py", "below.eq(normal < SQRT2)", "below.eq(normal == 1 << 31)",
             (f"{EDGES}[8]",)),
    Mutation("bit length for ceil_log2", "hw/scalar.py", "bits.eq(length - exact)",
             "bits.eq(length)", (f"{EDGES}[6]",)),
    Mutation("exponents wrap", "hw/scalar.py", "over.eq(exponent & ~total[-1] & beyond.any())", "over.eq(0)",
             (f"{EDGES}[12]",)),
    Mutation("one's complement magnitudes", "hw/range_detector.py", "Mux(lane < 0, -lane, lane)",
             "Mux(lane < 0, ~lane, lane)", (_hw("range_detector.py::test_running_maximum[4]"),)),
    # Random words.
    Mutation("two lanes share a random word", "hw/random_words.py", "(j * INDEX_MULTIPLIER & MASK)",
             "(j // 2 * INDEX_MULTIPLIER & MASK)", (WORDS,)),
    Mutation("key without the step", "hw/random_words.py", "Mux(start, self.step,", "Mux(start, Const(0, 32),",
             (WORDS,)),
    Mutation("vectors reuse the first one's words", "hw/lanes.py", "payload.product.eq(random_nest.value_product)",
             "payload.product.eq(self.random_start)", (UPDATE,)),
    Mutation("low half of the word", "hw/lanes.py", "payload[i][16:]", "payload[i][:16]", (UPDATE,)),
    Mutation("the engine forgets the step", "hw/vector.py", "lanes.step.eq(self.step)", "lanes.step.eq(0)",
             (UPDATE,)),
    # The other shared units.
    Mutation("last tie of a pooling window", "hw/pool.py", "opens | lead[-1]", "opens | (lead <= 0)",
             (_hw("pool.py::test_first_maximum_of_each_window"),)),
    Mutation("ReLU passes errors of zeros", "hw/lanes.py", "(other < 0) | (other == 0)",
             "other < 0", (PASSES,)),
    Mutation("unpooling by columns", "hw/lanes.py", "Cat(~nest.at_first[4], ~nest.at_first[2])",
             "Cat(~nest.at_first[2], ~nest.at_first[4])", (PASSES,)),
    Mutation("alignment rounds down", "hw/wide_lane.py", "shifts & rounds & shifted[0]", "0", (WIDE,)),
    Mutation("gate opens at zero", "hw/wide_lane.py", "control.gate & ~right & b.any()",
             "control.gate & ~right", (WIDE,)),
    Mutation("vectors overtake the last results", "hw/wide.py", "with m.If(~(stages[0].valid & stages[0].writes)):",
             "with m.If(1):",
             (_hw("wide.py::test_random_programs_over_loops[tiny-25-none]"),)),
    Mutation("root of a square", "hw/isqrt.py", "fits = ~difference[-1]", "fits = ~difference[-1] & difference.any()",
             (_hw("divider.py::test_square_root_every_operand"),)),
    Mutation("softmax table entry", "hw/softmax.py", "round(2 ** (16 - f / OCTAVE)) for f",
             "round(2 ** (16 - f / OCTAVE)) + (f == 77) for f", (_hw("softmax.py::test_constants_are_goldens"),)),
    Mutation("niti loss rounds ties up", "hw/loss.py", "gradient[2:4] > gradient[:2]", "gradient[2:4] >= gradient[:2]",
             (_hw("loss.py::test_matches_golden[V4]"),)),
    Mutation("overflow below is missed", "hw/accumulator.py",
             "(entry[-1] == data1[-1]) & (entry[-1] != following[-1])",
             "~entry[-1] & ~data1[-1] & following[-1]", (_hw("accumulator.py::test_overflow"),)),
    Mutation("accumulator entries return at once", "hw/feeder.py", "too_early = ends_short & (fire | recent.any())",
             "too_early = ends_short & 0",
             ("tests/sim/test_products.py::test_tiles_of_few_pixels_wait_for_their_accumulator_entries",)),
    # Vectors in parts, lines of two vectors.
    Mutation("a reader does not compare the highest bits of lines", "hw/vector_reader.py",
             "range(0, len(this.line), 2)", "range(0, len(this.line) - 2, 2)",
             (_hw("vector_reader_writer.py::test_lines_that_differ_in_any_one_bit_are_both_read"),)),
    Mutation("a reader of single parts reads both", "hw/vector_reader.py", "Mux(self.single, 1, parts)", "parts",
             (_hw("vector_reader_writer.py::test_reader[0-none-small-True]"),)),
    Mutation("the second part over the first", "hw/vector_writer.py",
             "stride.eq(lanes << self.width)", "stride.eq(0)",
             (_hw("vector_reader_writer.py::test_writer[0-none-small]"),)),
    Mutation("parts share a maximum", "hw/pool.py", "best[0].eq(best[-1])", "best[0].eq(best[0])",
             (_hw("pool.py::test_first_maximum_of_each_window[2--1-2-none]"),)),
    Mutation("the first line of a result twice", "hw/store.py", "rest.eq(piece[config.line_bits:])",
             "rest.eq(piece)",
             (_hw("store.py::test_results_ranges_and_done[shape4-none-1]"),)),
    Mutation("four weight rows a line", "hw/weight_ring.py", "read.addr.eq(freed + row[row_bits:])",
             "read.addr.eq(freed + row[2:])", (_hw("weight_ring.py::test_tiles_and_timing[shape5-both-2]"),)),
    Mutation("four folded vectors a line", "hw/fold.py", "full.eq(slot == self.config.vectors_per_line - 1)",
             "full.eq(slot == 3)", (_hw("fold.py::test_windows_equal_numpy[1-8-2]"),)),
    Mutation("an error survives its reset", "hw/read_port.py", "outside[i] & ~halted & ~self.clear",
             "outside[i] & ~halted", (_hw("read_port.py::test_a_soft_reset_forgets_errors_up_to_its_cycle[1]"),)),
    Mutation("niti loss takes no padding", "hw/class_walk.py", "with self.m.If(self.last & ~self._odd):",
             "with self.m.If(0):",
             (_hw("loss.py::test_matches_golden[V8L4]"),)),
    Mutation("softmax takes no padding", "hw/class_walk.py", "with self.m.If(self.last & ~self._odd):",
             "with self.m.If(0):",
             (_hw("softmax.py::test_matches_the_formula_and_golden[V8L4]"),)),
    Mutation("parts share lane registers", "hw/wide.py", "part.eq(~opening & (part ^ turned))", "part.eq(0)",
             (_hw("wide.py::test_random_programs_over_loops[small-8-none]"),)),
    Mutation("parts share random words", "hw/lanes.py", "lanes_count * INDEX_MULTIPLIER & MASK", "0",
             (_hw("vector.py::test_wage_update_of_tiled_weights[small-3-64-5000]"),)),
    Mutation("a label for every part", "hw/lanes.py", "nest.at_last[4:].all()", "nest.at_last[4]",
             (_hw("vector.py::test_random_commands_equal_the_reference[none-small]"),)),
    Mutation("labels are read in parts", "hw/vector.py", "readers[1].single.eq(is_loss | squared)",
             "readers[1].single.eq(0)", (_hw("vector.py::test_niti_loss[small-10-8--3-both]"),)),
    # Passes of niti, and the order of a step.
    Mutation("weights before the error", "sim/compiler.py",
             "            if k:\n                self._error(k)\n            self._gradient(k, rate)\n",
             "            self._gradient(k, rate)\n            if k:\n                self._error(k)\n", (NITI_MLP,)),
    Mutation("niti keeps no choices", "sim/compiler.py",
             "self._to_activations(stage, stage.choice if training else None, shift_register",
             "self._to_activations(stage, None, shift_register", (NITI,)),
    Mutation("niti without the ReLU mask", "sim/compiler.py", "stage.x if below.relu else None", "None", (NITI_MLP,)),
    Mutation("niti shifts by the bit length", "sim/compiler.py", "(Op.CEIL_LOG2, shift, maximum)",
             "(Op.BIT_LENGTH, shift, maximum)", (f"{POWER}[niti-64]",)),
    # Passes of wage.
    Mutation("wage rounds half up", "sim/wage.py",
             "shift_register=self._constant(shift), rounding=Rounding.HALF_EVEN.code",
             "shift_register=self._constant(shift), rounding=Rounding.HALF_UP.code", (WAGE_MLP, WAGE)),
    Mutation("ReLU mask before the maximum", "sim/wage.py", "target_width=2, blocked=CLIPPED,",
             "target_width=2, blocked=CLIPPED | INACTIVE if below.relu else CLIPPED,", (WAGE,)),
    Mutation("clip mask after the maximum", "sim/wage.py", "target_width=2, blocked=CLIPPED,",
             "target_width=2, blocked=0,", (MASTERS,)),
    Mutation("no clip mask", "sim/wage.py", "blocked=CLIPPED | INACTIVE if below.relu else CLIPPED)",
             "blocked=INACTIVE if below.relu else 0)", (WAGE_MLP, WAGE)),
    Mutation("wage keeps no state", "sim/wage.py", "stage.choice if training else None, state=1", "None, state=1",
             (WAGE_MLP, WAGE)),
    Mutation("no ternary clip", "sim/wage.py", "Rounding.HALF_EVEN.code, limit=TERNARY_LIMIT)",
             "Rounding.HALF_EVEN.code)", (MASTERS,)),
    Mutation("ternary weights of the doorbell's start", "sim/wage.py",
             "(v * kh * kw * ci, ci, v, kh * kw * ci)))\n        self._ternarize(stage)",
             "(v * kh * kw * ci, ci, v, kh * kw * ci)))", (MASTERS,)),
    Mutation("masters beyond their limit", "sim/wage.py", "limit=self.network.master_limit", "limit=0",
             (WAGE_MLP, WAGE)),
    # Passes of dynamic fixed point.
    Mutation("dfp shifts by ceil_log2", "sim/dfp.py", "(Op.BIT_LENGTH, shift, r[maximum])",
             "(Op.CEIL_LOG2, shift, r[maximum])", (f"{POWER}[dfp-256]",)),
    Mutation("momentum off by a bit", "sim/dfp.py", '("range0", momentum_exponent, sgd.momentum[1], "distance0")',
             '("range0", momentum_exponent, sgd.momentum[1] + 1, "distance0")', (DFP_MLP,)),
    Mutation("no weight decay", "sim/dfp.py", "Sgd(rate), reads", "Sgd(rate, decay=None), reads", (DFP_MLP,)),
    Mutation("momentum reuses the weight's words", "sim/dfp.py",
             "self._weights_random(momentum, layer.index, Purpose.MOMENTUM)",
             "self._weights_random(momentum, layer.index, Purpose.WEIGHT)", (DFP_MLP,)),
    Mutation("state is truncated", "sim/microprograms.py", "(Op.ADD, A, A, Lane(DRAW)), ", "", (DFP_MLP,)),
    Mutation("loss without the batch's exponent", "sim/dfp.py", "[-PROBABILITY_BITS - self.log2_batch]",
             "[-PROBABILITY_BITS]", (DFP_MLP,)),
    Mutation("batch norm without N d beta", "sim/batch_norm.py", "(Wide.SUB, B, B, Lane(BETA_SUM)), ", "", (DFP_NORM,)),
    Mutation("batch norm variance without epsilon", "sim/batch_norm.py",
             "(Wide.ADD, VARIANCE, VARIANCE, Lane(B)), ", "", (DFP_NORM,)),
    Mutation("alignment the wrong way", "sim/dfp.py", "(Op.SUB, r[distance], r[distance], grid)",
             "(Op.SUB, r[distance], grid, r[distance])", (RESIDUAL,)),
    Mutation("average pool's exponent", "sim/dfp.py", "(exponent, 1 - (h * w).bit_length())",
             "(exponent, -(h * w).bit_length())", (RESIDUAL,)),
)


def _pytest(root: Path, tests, cache: Path | None = None, *options: str) -> tuple[int, str]:
    """Exit status and output of the tests in a copy; status -1: no end within TIMEOUT seconds."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "240"}
    if cache:
        environment["INTRAIN_CACHE"] = str(cache)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *options, *tests]
    try:
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return -1, f"no end within {TIMEOUT} s"
    return run.returncode, run.stdout + run.stderr


def _try(mutation: Mutation, root: Path, cache: Path) -> dict:
    """The record of one mutation; the copy is as before afterwards."""
    start, text = time.monotonic(), mutation.apply(root)
    try:
        status, output = _pytest(root, mutation.tests, cache, "-x", "--tb=line")
    finally:
        (root / mutation.file).write_text(text)
    failed = re.search(r"^FAILED (.+?)(?: - (.*))?$", output, re.MULTILINE)
    caught = status == 1 and failed is not None
    reason = (failed[2] or "") if caught else "survives" if status == 0 else (output.splitlines() or ["no output"])[-1]
    return {**dataclasses.asdict(mutation), "caught_by": failed[1] if caught else None, "reason": reason,
            "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description="Which test sees which mistake.")
    parser.add_argument("names", nargs="*", help="only mutations whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="name the mutations and their tests, run nothing")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder for mutations.json and builds")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS
              if not arguments.names or any(name in mutation.name for name in arguments.names)]
    if not chosen:
        raise MutationError(f"no mutation matches {' '.join(arguments.names)}; see --list")
    if arguments.list:
        for mutation in chosen:
            print(f"{mutation.name:40} {mutation.file:22} {' '.join(mutation.tests)}")
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    cache, records = (arguments.out / "mutations").resolve(), []
    with tempfile.TemporaryDirectory(prefix="intrain-mutations-") as folder:
        root = Path(folder)
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, root)
        tests = list(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
        print(f"{len(tests)} tests without a mutation:", end=" ", flush=True)
        status, output = _pytest(root, tests)
        print((output.splitlines() or ["no output"])[-1], flush=True)
        if status:
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
            raise MutationError(f"the tests must pass before anything is broken: {', '.join(failed) or output[-300:]}")
        for mutation in chosen:
            record = _try(mutation, root, cache)
            records.append(record)
            print(f"{record['name']:40} {record['seconds']:6.1f} s  "
                  f"{record['caught_by'] or 'MISSED: ' + record['reason']}", flush=True)
    report = arguments.out / "mutations.json"
    report.write_text(json.dumps(records, indent=1) + "\n")
    caught = sum(record["caught_by"] is not None for record in records)
    print(f"{caught} of {len(records)} caught ({report})")
    return 0 if caught == len(records) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MutationError as error:
        print(f"mutations: {error}", file=sys.stderr)
        sys.exit(1)
