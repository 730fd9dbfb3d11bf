"""`python -m gpu`: train with int8 products on a GPU or a CPU, or measure their speed."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from golden.__main__ import add_run_arguments, add_training_arguments, chosen_network, run_training
from golden.errors import InputError
from golden.train import Interrupted

OUT = Path("build/gpu")


def _train(arguments: argparse.Namespace) -> None:
    from gpu import devices, parallel
    from gpu.execution import build, load_checkpoint
    from gpu.group import ALONE
    from gpu.train import train

    device = devices.choose(arguments.device)
    workers = parallel.Workers(device) if parallel.requested() else ALONE
    if workers is ALONE:
        ops = devices.operations(device)
        network, augment = chosen_network(
            arguments, functools.partial(build, ops=ops), functools.partial(load_checkpoint, ops=ops)
        )
        run_training(arguments, network, augment, OUT, train)
        return
    try:
        ops = devices.operations(device, workers)
        network, augment = chosen_network(
            arguments, functools.partial(build, ops=ops), functools.partial(load_checkpoint, ops=ops)
        )
        if workers.rank:
            parallel.follow(network, workers)
            return
        parallel.drive(network, workers)
        try:
            run_training(arguments, network, augment, OUT, train)
        finally:
            try:
                workers.send(parallel.STOP)
            except parallel.WorkerLost:
                pass
    except InputError:
        if workers.rank:  # worker 0 says what is wrong
            raise SystemExit(1) from None
        raise
    finally:
        workers.close()


def _bench(arguments: argparse.Namespace) -> None:
    from gpu.benchmark import run

    run(arguments.out, arguments.device, arguments.size, arguments.minutes, arguments.seconds)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a network; writes summary.json, digests.jsonl, history.jsonl")
    add_training_arguments(command, out=str(OUT))
    add_run_arguments(command)
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto: a GPU if there is one)")
    command.set_defaults(run=_train)
    command = commands.add_parser("bench", help="kernels and steps beside torch's float ones; resumes where it stopped")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    command.add_argument("--size", help="small or full shapes (default full on a GPU, small on a CPU)")
    command.add_argument("--minutes", type=float, default=9, help="start no piece after this time (default 9)")
    command.add_argument("--seconds", type=float, default=2, help="time per candidate of a piece (default 2)")
    command.add_argument("--out", type=Path, default=Path("build/bench"), help="default build/bench")
    command.set_defaults(run=_bench)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except ImportError as error:
        if error.name not in ("torch", "triton"):
            raise
        print(f"error: python -m gpu needs {error.name}: pip install {error.name}", file=sys.stderr)
        return 1
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
