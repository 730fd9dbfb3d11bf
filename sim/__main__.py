"""``python -m sim``: train on the simulated core, look into its programs and steps, measure and estimate cycles."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from golden import data as data_module
from golden.__main__ import DEFAULTS, add_training_arguments, training_length
from golden.errors import InputError
from golden.train import Interrupted, build
from hw import config as core_config
from hw.descriptor import ProgramError

from . import estimate, products, replay
from .checker import COMPARISONS, Mismatch
from .disassembler import disassemble_path
from .program import CompileError
from .shared import SimulationError
from .train import load, memory_settings, train
from .verilator import BuildError

METHOD_OPTIONS = {"weight_bits": 8, "widths": "2888", "master_limit": 64}
"""Options of the methods that the core runs, and what they are by default."""


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sim", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train on the simulated core, checking every tensor against golden")
    add_training_arguments(train, out="build/sim")
    train.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in DIR with identical digests")
    train.add_argument("--core", help=f"one of {', '.join(core_config.PRESETS)}, or a .toml file (default small)")
    train.add_argument("--weight-bits", type=int, help="niti: 8, or 16 for wide masters (default 8)")
    train.add_argument("--widths", help="wage: bits of W, A, G, E; the core runs 2888 (the default) only")
    train.add_argument("--master-limit", type=int, help="wage: clip of the masters (default 64)")
    train.add_argument("--test-images", type=int, metavar="N",
                       help="classify only the first N test images on the core (default: all; 0: none)")
    train.add_argument("--compare", choices=COMPARISONS,
                       help="every required tensor, or only the trained state by its digest (default full)")
    train.add_argument("--intermediates", action="store_true", help="also compare what need not be materialised")
    train.add_argument("--no-float", action="store_true", help="do not train float32 beside it for the report")
    listing = commands.add_parser("disassemble", help="the descriptors of a program file or of a run, with comments")
    listing.add_argument("program", type=Path, metavar="PROGRAM", help="program image, or the folder of a run")
    listing.add_argument("--address", type=lambda text: int(text, 0), help="where the image lies in memory (default 0)")
    again = commands.add_parser("replay", help="simulate one step of a run again, with waves and every tensor compared")
    again.add_argument("folder", type=Path, metavar="DIR", help="folder of the run")
    again.add_argument("--step", type=int, required=True, help="number of the step, from 0")
    again.add_argument("--data-dir", help="folder that holds a folder per data set (default: as in the run)")
    single = commands.add_parser("products", help="run single product passes; report their share of peak")
    products.add_arguments(single)
    guess = commands.add_parser("estimate", help="cycles of a training step by layer and pass, without simulating")
    estimate.add_arguments(guess)
    for command in (single, guess):
        command.add_argument("--core", default="base", help="as for train (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "train":
            return _train(options)
        if options.command == "disassemble":
            print("\n".join(disassemble_path(options.program, options.address)))
            return 0
        if options.command == "replay":
            replay.replay(options.folder, options.step, data_dir=options.data_dir)
            return 0
        config = core_config.load(options.core)
        if options.command == "estimate":
            return estimate.main(options, config)
        return products.main(options, config, _log)
    except (InputError, core_config.ConfigError, CompileError, ProgramError, SimulationError, BuildError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
    return 1


def _log(line):
    print(line, file=sys.stderr, flush=True)


def _train(options) -> int:
    if options.test_images is not None and options.test_images < 0:
        raise InputError(f"--test-images must be 0 or more, got {options.test_images}")
    out = options.resume or options.out or Path("build/sim")
    try:
        summary = _resume(options) if options.resume else _start(options, out)
    except Mismatch as mismatch:
        _explain(mismatch, out)
        return 1
    for key in ("bit_exact", "tensors_compared", "test_accuracy", "golden_accuracy", "float_accuracy",
                "cycles_per_step", "mac_utilization", "cycles_per_second", "seconds"):
        if key not in summary:
            continue
        value = summary[key]
        print(f"{key:20} {value:.4g}" if isinstance(value, float) else f"{key:20} {value}")
    print(f"report: {out / 'report.html'}")
    return 0


def _explain(mismatch: Mismatch, out: Path):
    """The first difference, the descriptor that made it, and the step again with waves."""
    _log(f"error: {mismatch}")
    if not mismatch.name:
        return
    try:
        replay.replay(out, mismatch.step, known=mismatch, log=_log)
    except (InputError, SimulationError, BuildError, OSError) as error:
        _log(f"error: cannot replay the step: {error}")


def _start(options, out: Path) -> dict:
    chosen = {name: default if getattr(options, name) is None else getattr(options, name)
              for name, default in DEFAULTS.items()}
    config = core_config.load(options.core or "small")
    batch = data_module.data_set(chosen["data"]).batch if options.batch is None else options.batch
    more = {name: value for name in METHOD_OPTIONS if (value := getattr(options, name)) is not None}
    if more.get("weight_bits") == 8:
        del more["weight_bits"]
    network = build(**chosen, batch=batch, **more)
    dataset = data_module.load(chosen["data"], options.data_dir)
    return train(config, network, dataset, training_length(options, network.steps_per_epoch), out,
                 intermediates=options.intermediates, compare=options.compare or "full", floating=not options.no_float,
                 test_images=options.test_images, data_dir=options.data_dir, log=_log)


def _resume(options) -> dict:
    """Continue a run; what fixes its bits may be repeated on the command line, but not changed."""
    if options.out:
        raise InputError("--out is fixed by the run that --resume continues: leave it out")
    resumed = load(options.resume)
    run = resumed.run
    fixed = {**{name: run[name] for name in ("method", "model", "data", "batch", "seed")},
             "core": resumed.config,
             **{name: run["options"].get(name, value) for name, value in METHOD_OPTIONS.items()}}
    for name, value in fixed.items():
        given = getattr(options, name)
        if given is not None and (core_config.load(given) if name == "core" else given) != value:
            value = resumed.config.name if name == "core" else value
            raise InputError(f"checkpoint {options.resume / 'checkpoint'} is of a run with --{name.replace('_', '-')} "
                             f"{value}, not {given}: leave it out, or resume the run that has it")
    network = resumed.network
    length = (resumed.steps if options.steps is None and options.epochs is None
              else training_length(options, network.steps_per_epoch))
    data_dir = options.data_dir or run["data_dir"]
    return train(resumed.config, network, data_module.load(run["data"], data_dir), length, options.resume,
                 settings=memory_settings(run), intermediates=run["intermediates"] or options.intermediates,
                 compare=options.compare or run["compare"], floating=run["floating"],
                 test_images=run["test_images"] if options.test_images is None else options.test_images,
                 data_dir=data_dir, resumed=resumed, log=_log)


if __name__ == "__main__":
    sys.exit(main())
