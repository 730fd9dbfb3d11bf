"""`python -m golden`: train a network in the golden model, compare methods, measure speed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from golden.data import DATA_SETS, data_set, load
from golden.errors import InputError
from golden.networks import MODELS
from golden.train import METHODS, Interrupted, build, load_checkpoint, train

DEFAULTS = {"method": "niti", "model": "mlp", "data": "digits", "seed": 1}


def add_training_arguments(parser: argparse.ArgumentParser, out: str = "build/golden") -> None:
    """The flags that `python -m golden|sim|gpu train` share; absent ones are None (see `DEFAULTS`)."""
    parser.add_argument("--method", help=f"arithmetic: {', '.join(METHODS)} (default niti)")
    parser.add_argument("--model", help=f"network: {', '.join(MODELS)} (default mlp)")
    parser.add_argument("--data", help=f"data set: {', '.join(DATA_SETS)} (default digits)")
    parser.add_argument("--data-dir", help="folder that holds a folder per data set (default: INTRAIN_DATA)")
    parser.add_argument("--batch", type=int, help="images per step (default: the data set's own)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="stop at this absolute training step")
    length.add_argument("--epochs", type=int, help="stop after this many epochs (default 10)")
    parser.add_argument("--seed", type=int, help="seed of every random word (default 1)")
    parser.add_argument("--out", type=Path, help=f"folder for the results (default {out})")


def training_length(arguments: argparse.Namespace, steps_per_epoch: int) -> int:
    """The absolute step at which training ends."""
    for name in ("steps", "epochs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if arguments.steps is not None:
        return arguments.steps
    return (arguments.epochs or 10) * steps_per_epoch


METHOD_OPTIONS = ("weight_bits", "rounding", "widths", "master_limit", "rates")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `python -m golden|gpu train` have beyond the shared ones."""
    parser.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in DIR with identical digests")
    parser.add_argument("--augment", nargs="?", type=int, const=True, metavar="EPOCHS",
                        help="shift training images by up to 4 pixels and mirror them (digits not); "
                             "with a number only for the first EPOCHS epochs")
    parser.add_argument("--weight-bits", type=int, help="niti: 8, or 16 for wide masters (default 8)")
    parser.add_argument("--rounding", help="dfp: stochastic or nearest activations and weights")
    parser.add_argument("--widths", help="wage: bits of W, A, G, E as hexadecimal digits (default 2888)")
    parser.add_argument("--master-limit", type=int, help="wage: clip of the masters (default 64)")
    parser.add_argument("--rates", metavar="EPOCH:RATE,...", help="learning rates instead of the schedule of method "
                        "and network: largest update's bits (niti), log2 of the rate (wage), MpE for M * 2**E")


def chosen_network(arguments: argparse.Namespace, build=build, load_checkpoint=load_checkpoint):
    """(network, its run's augmentation) of the command line: a new one, or the one in the folder to resume."""
    if arguments.resume:
        for name in ("method", "model", "data", "batch", "seed", "out", "augment", *METHOD_OPTIONS):
            if getattr(arguments, name) is not None:
                raise InputError(
                    f"--{name.replace('_', '-')} is fixed by the run that --resume continues: leave it out"
                )
        return load_checkpoint(arguments.resume)
    chosen = {name: getattr(arguments, name) for name in DEFAULTS}
    chosen = {name: DEFAULTS[name] if value is None else value for name, value in chosen.items()}
    info = data_set(chosen["data"])
    options = {name: getattr(arguments, name) for name in METHOD_OPTIONS}
    options = {name: value for name, value in options.items() if value is not None}
    batch = info.batch if arguments.batch is None else arguments.batch
    if arguments.augment is not None and arguments.augment < 1:
        raise InputError(f"--augment takes a number of epochs, at least 1, not {arguments.augment}")
    return build(**chosen, batch=batch, **options), arguments.augment or False


def run_training(arguments: argparse.Namespace, network, augment: bool | int, out: Path, train=train) -> None:
    """Train as the command line says, plot, and print the summary."""
    out = arguments.resume or arguments.out or out
    length = training_length(arguments, network.steps_per_epoch)
    dataset = load(network.data.name, arguments.data_dir)
    summary = train(network, dataset, length, out, augment=augment)
    try:
        from golden.plots import plot_training
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    else:
        plot_training(out)
    print(json.dumps(summary, indent=2))


def _train(arguments: argparse.Namespace) -> None:
    run_training(arguments, *chosen_network(arguments), Path("build/golden"))


def _accuracy(arguments: argparse.Namespace) -> None:
    from golden.accuracy import compare

    compare(arguments.out, full=arguments.full, data_dir=arguments.data_dir, seeds=arguments.seeds)


def _bench(arguments: argparse.Namespace) -> None:
    from golden.benchmark import run

    run(arguments.out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m golden", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a network; writes summary.json, digests.jsonl, history.jsonl")
    add_training_arguments(command)
    add_run_arguments(command)
    command.set_defaults(run=_train)
    command = commands.add_parser("accuracy", help="test accuracy of the integer methods beside float")
    command.add_argument(
        "--full", action="store_true", default=os.environ.get("FULL") == "1", help="MNIST too (FULL=1)"
    )
    command.add_argument("--seeds", type=int, default=3, help="seeds per row (default 3)")
    command.add_argument("--data-dir", help="folder that holds a folder per data set (default: INTRAIN_DATA)")
    command.add_argument("--out", type=Path, default=Path("build/accuracy"), help="default build/accuracy")
    command.set_defaults(run=_accuracy)
    command = commands.add_parser("bench", help="training images per second beside float32 torch")
    command.add_argument("--out", type=Path, default=Path("build/bench"), help="default build/bench")
    command.set_defaults(run=_bench)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
