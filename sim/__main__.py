"""``python -m sim``: train on the simulated core, measure single products, estimate cycles."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from golden import data as data_module
from golden.__main__ import add_training_arguments, training_length
from golden.errors import InputError
from golden.train import build
from hw import config as core_config
from hw.descriptor import ProgramError

from . import estimate, products
from .program import CompileError
from .shared import SimulationError
from .verilator import BuildError


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sim", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train on the simulated core, checking every tensor against golden")
    add_training_arguments(train)
    train.set_defaults(method="niti", model="mlp", data="digits", seed=1, out=Path("build/sim"))
    train.add_argument("--core", default="small",
                       help=f"one of {', '.join(core_config.PRESETS)}, or a .toml file (default %(default)s)")
    train.add_argument("--weight-bits", type=int, default=8, help="niti: 8, or 16 for wide masters (default 8)")
    train.add_argument("--widths", help="wage: bits of W, A, G, E; the core runs 2888 (the default) only")
    train.add_argument("--master-limit", type=int, help="wage: clip of the masters (default 64)")
    train.add_argument("--test-images", type=int, metavar="N",
                       help="classify only the first N test images on the core (default: all; 0: none)")
    train.add_argument("--intermediates", action="store_true", help="also compare what need not be materialised")
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
        config = core_config.load(options.core)
        if options.command == "estimate":
            return estimate.main(options, config)
        return products.main(options, config, lambda line: print(line, file=sys.stderr))
    except (InputError, core_config.ConfigError, CompileError, ProgramError, SimulationError, BuildError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
    return 1


def _train(options) -> int:
    from .train import train

    if options.test_images is not None and options.test_images < 0:
        raise InputError(f"--test-images must be 0 or more, got {options.test_images}")
    config = core_config.load(options.core)
    info = data_module.data_set(options.data)
    batch = info.batch if options.batch is None else options.batch
    more = {name: value for name, value in (("widths", options.widths), ("master_limit", options.master_limit))
            if value is not None}
    if options.weight_bits != 8:
        more["weight_bits"] = options.weight_bits
    network = build(options.method, options.model, options.seed, data=options.data, batch=batch, **more)
    dataset = data_module.load(options.data, options.data_dir)
    summary = train(config, network, dataset, training_length(options, network.steps_per_epoch), options.out,
                    intermediates=options.intermediates, test_images=options.test_images,
                    log=lambda line: print(line, file=sys.stderr))
    for key in ("bit_exact", "tensors_compared", "test_accuracy", "golden_accuracy", "float_accuracy",
                "cycles_per_step", "mac_utilization", "cycles_per_second", "seconds"):
        if key not in summary:
            continue
        value = summary[key]
        print(f"{key:20} {value:.4g}" if isinstance(value, float) else f"{key:20} {value}")
    print(f"report: {options.out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
