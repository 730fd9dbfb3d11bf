"""A training step recorded once and repeated as a CUDA graph, so that launching its kernels costs nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from golden.execution import Record, Trace

WARM_UP = 2  # ordinary steps before a capture: they compile kernels and measure tile sizes


class CudaGraph:
    """`body` recorded without running it; `replay` runs it and returns its result, whose tensors are overwritten."""

    def __init__(self, body: Callable[[], Record]):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = body()

    def replay(self) -> Record:
        self.graph.replay()
        return self.result


class CapturedStep:
    """The step of a network at fixed addresses: inputs are copied in, state is updated in place.

    `exponent` is a tensor where it varies from batch to batch, else the host integer of every batch. The step may
    depend on the host only through these, the learning rate and the keys of random words.
    """

    def __init__(self, network, step: Callable, graph: type, x, exponent, labels):
        self.x, self.labels = torch.empty_like(x), torch.empty_like(labels)
        self.exponent = torch.empty_like(exponent) if isinstance(exponent, torch.Tensor) else exponent
        self.network = network
        state = network.state

        def body() -> Record:
            trace = Trace(False)
            step(self.x, self.exponent, self.labels, trace)
            for name, (tensor, _) in state.items():
                trace.record[name] = tensor.copy_(network.state[name][0])
            network.state = state
            return trace.record

        network.ops.set_keys(network.seed, network.step_index)
        self.graph = graph(body)

    def run(self, x, exponent, labels) -> Record:
        """One step; the record's tensors hold until the next one."""
        self.x.copy_(x)
        self.labels.copy_(labels)
        if isinstance(self.exponent, torch.Tensor):
            self.exponent.copy_(exponent)
        self.network.ops.set_keys(self.network.seed, self.network.step_index)
        return self.graph.replay()
