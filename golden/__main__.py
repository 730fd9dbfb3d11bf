"""`python -m golden train`: train a network in the golden model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from golden.data import DATA_SETS, data_set, load
from golden.errors import InputError
from golden.networks import MODELS
from golden.train import METHODS, build, train


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `python -m golden|sim|gpu train` share."""
    parser.add_argument("--method", default="niti", help=f"arithmetic: {', '.join(METHODS)} (default niti)")
    parser.add_argument("--model", default="mlp", help=f"network: {', '.join(MODELS)} (default mlp)")
    parser.add_argument("--data", default="digits", help=f"data set: {', '.join(DATA_SETS)} (default digits)")
    parser.add_argument("--data-dir", help="folder that holds one folder per data set (default: INTRAIN_DATA)")
    parser.add_argument("--batch", type=int, help="images per step (default: the data set's own)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="stop at this absolute training step")
    length.add_argument("--epochs", type=int, help="stop after this many epochs (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="seed of every random word (default 1)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/golden"), help="folder for the results (default %(default)s)"
    )


def training_length(arguments: argparse.Namespace, steps_per_epoch: int) -> int:
    """The absolute step at which training ends."""
    for name in ("steps", "epochs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if arguments.steps is not None:
        return arguments.steps
    return (arguments.epochs or 10) * steps_per_epoch


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m golden", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a network and write summary.json and digests.jsonl")
    add_training_arguments(command)
    command.add_argument("--weight-bits", type=int, default=8, help="niti: 8, or 16 for wide masters (default 8)")
    arguments = parser.parse_args(argv)
    try:
        info = data_set(arguments.data)
        options = {"weight_bits": arguments.weight_bits} if arguments.weight_bits != 8 else {}
        batch = info.batch if arguments.batch is None else arguments.batch
        network = build(arguments.method, arguments.model, arguments.seed, data=arguments.data, batch=batch, **options)
        dataset = load(arguments.data, arguments.data_dir)
        summary = train(network, dataset, training_length(arguments, network.steps_per_epoch), arguments.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
