"""`python -m tests.formal`: run the proofs, or show that each seeded fault makes its proof fail.

    python -m tests.formal [NAME ...] [--faults] [--list] [--quick] [--jobs N] [--out FOLDER]

NAME selects proofs whose name contains it. Exit status 0 only if every proof holds (and, with --faults, every seeded
fault was found).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .catalogue import PROOFS
from .harness import FormalError, Proof, export, mutated, solve


def run(proof: Proof, fault_number: int | None, text: str, folder: Path) -> dict:
    fault = None if fault_number is None else proof.faults[fault_number]
    label = proof.name if fault is None else f"{proof.name} + fault {fault_number + 1}"
    work = folder / label.replace("/", "-").replace(" ", "")
    record = {"proof": proof.name, "depth": proof.depth, "induction": proof.induction,
              "fault": None if fault is None else f"{fault.file}: {fault.old!r} -> {fault.new!r}"}
    try:
        verdict = solve(proof, text, work)
        good = verdict.holds if fault is None else not verdict.holds
        word = ("holds" if verdict.holds else "FAILS") if fault is None else ("MISSED" if verdict.holds else "found")
        record |= {"good": good, "verdict": word, "seconds": round(verdict.seconds, 1), "detail": verdict.detail}
    except FormalError as error:
        record |= {"good": False, "verdict": "ERROR", "seconds": 0.0, "detail": str(error)}
    print(f"{label:44} {record['verdict']:6} {record['seconds']:6.1f} s  {record['detail']}", flush=True)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.formal", description="Proofs of the units.")
    parser.add_argument("names", nargs="*", help="only proofs whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="name the proofs and their seeded faults, run nothing")
    parser.add_argument("--faults", action="store_true", help="also run each proof with each of its seeded faults")
    parser.add_argument("--quick", action="store_true", help="only the subset that runs with the tests")
    parser.add_argument("--jobs", type=int, default=2, help="proofs at a time (default 2)")
    parser.add_argument("--out", type=Path, default=Path("build/formal"), help="folder for logs, models and traces")
    arguments = parser.parse_args()
    chosen = [proof for proof in PROOFS.values() if (not arguments.quick or proof.quick)
              and (not arguments.names or any(name in proof.name for name in arguments.names))]
    if not chosen:
        print(f"no proof matches {' '.join(arguments.names)}; see --list", file=sys.stderr)
        return 2
    if arguments.list:
        for proof in chosen:
            kind = "for ever, by induction" if proof.induction else "all runs of"
            print(f"{proof.name:32} {kind} {proof.depth} cycles; {len(proof.faults)} seeded faults"
                  + ("; quick" if proof.quick else ""))
        return 0
    start = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = []
        for proof in chosen:      # designs are made here, one after the other: a fault replaces a module meanwhile
            futures.append(pool.submit(run, proof, None, export(proof), arguments.out))
            for number, fault in enumerate(proof.faults if arguments.faults else ()):
                with mutated(fault):
                    text = export(proof)
                futures.append(pool.submit(run, proof, number, text, arguments.out))
        records = [future.result() for future in futures]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "formal.json").write_text(json.dumps(records, indent=1) + "\n")
    bad = [record for record in records if not record["good"]]
    print(f"{len(records) - len(bad)} of {len(records)} as expected in {time.monotonic() - start:.0f} s"
          f" ({arguments.out / 'formal.json'})")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FormalError as error:
        print(f"formal: {error}", file=sys.stderr)
        sys.exit(1)
