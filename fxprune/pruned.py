"""What `compile` returns: the smaller module with its plan and report, and what can be done with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.admit import admit
from fxprune.analyse import analyse
from fxprune.capture import capture
from fxprune.errors import InputError
from fxprune.measure import measure
from fxprune.plan import Plan
from fxprune.quantization import Quantized
from fxprune.report import Latency, Report
from fxprune.writeback import Written, copy_weights, module_like
from fxprune.writeback.config import configured, express


@dataclass(slots=True)
class Pruned:
    """A pruned model.

    Attributes:
        module: an fx.GraphModule of ordinary torch.nn layers under the original names, in the model's mode; with the
            recipe's `keep_class` a module of the original class.
        plan: what was kept.
        report: parameters, MACs, proof and, after `measure`, latency: dense and pruned.
        args, kwargs: the example inputs.
        dense: the model that was compiled.
        quantized: the ONNX file in 8 bits, where the recipe asked for one and it was taken; `export` writes it.
    """

    module: nn.Module
    plan: Plan
    report: Report
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dense: nn.Module | None = field(default=None, repr=False)
    written: Written | None = field(default=None, repr=False)
    quantized: Quantized | None = field(default=None, repr=False)
    _graph: fx.GraphModule | None = field(default=None, repr=False)

    def graph_module(self) -> fx.GraphModule:
        """Return the graph module with the weights as they are now.

        It is `module` itself, unless the class was kept or weights are locked.
        """
        from fxprune.passes.patterns.lock import unlocked

        module = unlocked(self.module)
        if self._graph is None:
            assert isinstance(module, fx.GraphModule)
            return module
        assert self.written is not None
        copy_weights(module, self._graph, self.written.scales)
        return self._graph

    def lock(self) -> nn.Module:
        """Keep the zeros of the plan's masks zero while the module is trained, and return the module.

        The masks become parametrisations, whatever the optimiser does; `save`, `export` and `measure` go on working.

        Raises:
            InputError: the plan has no masks (the recipe has no `sparsity`).

        >>> import fxprune
        >>> net = nn.Sequential(nn.Linear(8, 8))
        >>> pruned = fxprune.compile(net, torch.randn(2, 8), sparsity="2:4")
        >>> module = pruned.lock()
        >>> module(torch.randn(4, 8)).sum().backward()
        >>> torch.optim.AdamW(module.parameters(), 0.1).step()
        >>> pruned.unlock().get_parameter("0.weight").count_nonzero().item()
        32
        """
        from fxprune.passes.patterns.lock import lock

        if not self.plan.masks:
            raise InputError("the plan has no masks to lock: compile with a `sparsity`, '2:4' for example")
        lock(self.module, self.plan.masks)
        return self.module

    def unlock(self) -> nn.Module:
        """Turn locked weights into ordinary parameters again, with their zeros, and return the module."""
        from fxprune.passes.patterns.lock import unlock

        unlock(self.module)
        return self.module

    def module_like(self, model: nn.Module | None = None) -> nn.Module:
        """Return the module's weights, as they are now, in a copy of the original class.

        Attributes that the class's code reads (`num_heads`, `normalized_shape`, a configuration's sizes) are found by
        following them into the operators that they reach, and set on each module by itself. The result is accepted
        only if its outputs equal the graph module's on fresh inputs of other batch sizes.

        Args:
            model: the dense model, or a new one of the same class and sizes; by default the one that was compiled.

        Raises:
            InputError: there is no dense model to be like.
            WriteBackError: the class writes down a number that would have to change; the text names the line. With
                `compile(..., keep_class=True)` only such plans are made as the class can express.
            SavedModelError: the plan does not fit the model.

        >>> import fxprune
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 4))
        >>> small = fxprune.compile(net, torch.randn(2, 8), target={"macs": 0.5}).module_like()
        >>> type(small).__name__, small[1].normalized_shape
        ('Sequential', (32,))
        """
        dense = model if model is not None else self.dense
        if dense is None:
            raise InputError("there is no dense model whose class to take; pass one as `model`")
        return self._written(dense).module

    def _written(self, dense: nn.Module) -> Written:
        dense = admit(dense).model
        analysis = analyse(capture(dense, self.args, self.kwargs, self.plan.dynamic or False))
        return module_like(dense, analysis, self.plan.selection(analysis), self.graph_module())

    def save_pretrained(self, directory: str | os.PathLike[str]) -> bool:
        """Write a model of Hugging Face's libraries so that `from_pretrained` reads it, if a configuration can say it.

        Else (every layer of another width, for example) its dense configuration is written there and, beside it in
        `fxprune/`, the saved model: `load_pruned(directory / "fxprune").module_like(Class(config))` makes it again.

        Returns:
            Whether `from_pretrained(directory)` will do.

        Raises:
            InputError: nothing in the model has a configuration and `save_pretrained`; use `save`.
            WriteBackError: see `module_like`.
            SavedModelError: see `save`.
        """
        if self.dense is None or configured(self.dense) is None:
            raise InputError("no module of the model has a `config` and `save_pretrained`; use `save`")
        written = self._written(self.dense)
        found = configured(written.module)
        assert found is not None
        path, model = found
        config = express(written.module, path, self.dense, written.numbers)
        target: Any = model
        if config is not None:
            for module in model.modules():
                if hasattr(module, "config") and type(module.config) is type(config):
                    module.config = config
            target.save_pretrained(directory)
            return True
        target.config.save_pretrained(directory)
        self.save(Path(directory) / "fxprune", overwrite=True)
        return False

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write weights.safetensors, graph.json, plan.json and recipe.yaml into a directory, all or nothing.

        Raises:
            SavedModelError: the directory exists and holds something else (or a saved model, without `overwrite`), or
                the files cannot be written; then nothing is left under the name.
        """
        from fxprune.saved import save

        return save(self, Path(directory), overwrite)

    def export(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the module for another runtime, by the ending of the path, and check it against torch.

        `.onnx` for onnxruntime and others, `.engine` for TensorRT, `.pt2` compiled by torch. What was dynamic when the
        model was captured (`plan.dynamic`: the batch, the sequence where asked) stays so.

        Args:
            options: those of the backend, `dtype="float16"`; by default what the recipe gives that backend. For an
                engine also `backend` (tensorrt-rtx, which needs no GPU here, or tensorrt), and what
                `TensorRTBackend.compile_engine` takes: `compute_capability`, `batch`, `shapes`, `timing_cache`, `onnx`.

        Raises:
            BackendError: the ending, an option or its value is unknown, the backend is missing, or the export failed.
        """
        from fxprune.export import export

        return export(self, Path(path), options)

    def measure(
        self,
        against: nn.Module | None = None,
        *,
        backend: str | Mapping[str, Any] | None = None,
        threads: int | None = None,
        batch: int | None = None,
        rounds: int = 30,
    ) -> Latency:
        """Time dense and pruned alternately in one run and add the result to the report.

        Args:
            against: the dense model; by default the one that was compiled.
            backend: a name, or {"name": ..., option: value}; by default the recipe's.
            threads: by default torch's number of threads.
            batch: by default that of the example inputs.
        """
        dense = against if against is not None else self.dense
        if dense is None:
            raise InputError("there is no dense model to measure against; pass it as `against`")
        args, kwargs = rebatch(self.args, self.kwargs, batch)
        name = backend or self.report.recipe.get("backend", "onnxruntime")
        latency = measure(dense, self.graph_module(), args, kwargs, name, threads, rounds, self.plan.dynamic)
        self.report.latency.append(latency)
        return latency


def rebatch(args: tuple[Any, ...], kwargs: dict[str, Any], batch: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs with dimension 0 of the tensors repeated or cut to `batch` rows."""
    if batch is None:
        return args, kwargs
    first = next((v for v in [*args, *kwargs.values()] if isinstance(v, Tensor) and v.dim()), None)

    def fit(value: Any) -> Any:
        if first is None or not isinstance(value, Tensor) or not value.dim() or value.shape[0] != first.shape[0]:
            return value
        rows = torch.arange(batch, device=value.device) % value.shape[0]
        return value[rows]

    return tuple(map(fit, args)), {k: fit(v) for k, v in kwargs.items()}
