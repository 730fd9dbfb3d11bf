"""Run by torchrun: trains small networks and writes the digests of worker 0 to the file named on the command line."""

import json
import sys

import torch

from golden import data
from gpu.execution import build
from gpu.ops import Ops
from gpu.parallel import Workers

RUNS = [
    ("niti", "tiny-cnn", 10),
    ("niti-2020", "mlp", 32),
    ("wage", "tiny-cnn", 11),
    ("dfp", "tiny-cnn-bn", 16),
    ("dfp", "tiny-resnet", 8),
]
STEPS = 4


def digests(ops) -> dict[str, list]:
    """Per run the weights' digest of every step, and the logits of the last batch after it."""
    loaded, result = data.load("digits"), {}
    for method, model, batch in RUNS:
        network = build(method, model, 3, batch=batch, ops=ops)
        lines = result[f"{method} {model}"] = []
        for _, (images, labels) in zip(range(STEPS), data.batches(loaded, 3, 0, batch), strict=False):
            record = network.step(images, labels)
            lines.append([network.digest(), int(record["logits"].sum())])
        lines.append(network.forward(images)[0].tolist())
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    workers = Workers(torch.device("cpu"))
    result = digests(Ops("cpu", workers))
    if workers.rank == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(result, file)
    workers.close()
