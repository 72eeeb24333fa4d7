"""Running a TensorRT engine on the GPU, on tensors of torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxprune.backends.base import Parity, Runner
from fxprune.backends.by_name import ByName
from fxprune.backends.engines import Engine, Port
from fxprune.backends.named_inputs import NamedInputs
from fxprune.errors import BackendError


class EngineRunner(Runner):
    """An open engine; `run` takes tensors of any device and returns tensors on the CPU.

    One runner has one execution context: call it from one thread at a time.
    """

    def __init__(
        self,
        backend: str,
        opened: Any,
        engine: Engine,
        threads: int,
        signature: inspect.Signature | None = None,
        example: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {}),
        *,
        keep: Any = None,
        device: str = "cuda",
    ) -> None:
        """`signature` and `example` are those of the module, where there is one; `keep` must outlive the engine."""
        self.path = engine.path
        self.parity: Parity | None = None
        self._backend = backend
        self._opened = opened
        self._engine = engine
        self._threads = threads
        self._device = torch.device(device)
        #: Of the inputs, in the order in which `run` takes them.
        self.names = [port.name for port in engine.inputs]
        self._inputs = NamedInputs(signature, *example) if signature is not None else ByName(self.names, "the engine")
        self._keep = keep
        self._context = opened.create_execution_context()
        if self._context is None:
            raise BackendError(f"there is too little GPU memory for '{engine.path}': build it for smaller batches")
        # An engine has no place for an input that nothing depends on.
        there = {opened.get_tensor_name(index) for index in range(opened.num_io_tensors)}
        self._used = [port for port in engine.inputs if port.name in there]
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the output tensors on the CPU.

        Raises BackendError where the engine was not built for such arguments.
        """
        held, outputs = self._prepare(args, kwargs)
        self._enqueue()
        self._stream.synchronize()
        del held  # until here: TensorRT knows nothing but addresses
        return [output.cpu() for output in outputs]

    def bind(self, *args: Any, **kwargs: Any) -> Callable[[], object]:
        """Return a call that runs on these arguments, which lie on the GPU by then, and waits for the outputs."""
        held = self._prepare(args, kwargs)

        def call(_held: object = held) -> None:
            self._enqueue()
            self._stream.synchronize()

        call()  # TensorRT-RTX compiles kernels for new shapes when they come first
        return call

    def milliseconds(self, calls: int, *args: Any, **kwargs: Any) -> list[float]:
        """Return the time of each of some calls on the GPU alone, between two CUDA events, in milliseconds."""
        call = self.bind(*args, **kwargs)
        call()
        pairs = [(_event(), _event()) for _ in range(calls)]
        for start, end in pairs:
            start.record(self._stream)
            self._enqueue()
            end.record(self._stream)
        self._stream.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def describe(self) -> dict[str, Any]:
        """Return device, types, versions, what the engine was built for, and the parity with torch."""
        engine = self._engine
        return {
            "backend": self._backend,
            "provider": torch.cuda.get_device_name(self._device),
            "threads": self._threads,
            "dtype": engine.dtype,
            "sparsity": engine.sparsity.line(),
            "layers": len(engine.layers),
            "compute_capability": list(engine.compute_capability),
            "engine_sha256": engine.sha256,
            "versions": {engine.library: engine.version, "torch": torch.__version__},
            "parity": self.parity.to_json() if self.parity else None,
        }

    def _prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Lay inputs and outputs out on the GPU and tell the context where they are."""
        given = self._inputs.of(args, kwargs)
        held = []
        for port in self._used:
            tensor = self._fitting(port, given[port.name])
            if not self._context.set_input_shape(port.name, tuple(tensor.shape)):
                raise BackendError(self._misfit(port, tensor))
            self._context.set_tensor_address(port.name, tensor.data_ptr())
            held.append(tensor)
        outputs = []
        for port in self._engine.outputs:
            shape = tuple(self._context.get_tensor_shape(port.name))
            if min(shape, default=0) < 0:
                raise BackendError(
                    f"the shape of output '{port.name}', {shape}, depends on the numbers in the inputs, which "
                    "this backend cannot run; use onnxruntime"
                )
            output = torch.empty(shape, dtype=getattr(torch, port.dtype), device=self._device)
            self._context.set_tensor_address(port.name, output.data_ptr())
            outputs.append(output)
        # The copies were made on torch's own stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return held, outputs

    def _fitting(self, port: Port, tensor: Tensor) -> Tensor:
        """The tensor on the GPU, contiguous; an empty one has no address and no engine takes it."""
        expected = getattr(torch, port.dtype)
        if not isinstance(tensor, Tensor) or tensor.dtype != expected or not tensor.numel():
            raise BackendError(self._misfit(port, tensor))
        return tensor.detach().to(self._device).contiguous()

    def _misfit(self, port: Port, tensor: Any) -> str:
        what = f"{tuple(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        profile = self._engine.profiles.get(port.name)
        shapes = f"{port.shape}" if profile is None else f"{profile.smallest} to {profile.largest}"
        return f"input '{port.name}' of the engine is {shapes} of {port.dtype}, but was given {what}"

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise BackendError(f"TensorRT failed to run '{self._engine.path}'; see what it printed on standard error")


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
