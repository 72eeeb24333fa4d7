"""Saved models: a directory with weights.safetensors, graph.json, plan.json and recipe.yaml. No pickles.

`plan.json` names the checksums of the weights and the graph, so that a truncated or altered file is noticed before it
is used. `recipe.yaml` is for people, and for doing the same again: loading does not read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from fxprune import graphfile
from fxprune.admit import admit
from fxprune.analyse import analyse
from fxprune.capture import capture
from fxprune.errors import CaptureError, InputError, SavedModelError
from fxprune.plan import Plan
from fxprune.recipe import as_yaml
from fxprune.rewrite import rewrite

if TYPE_CHECKING:
    from fxprune.pruned import Pruned
    from fxprune.report import Report

WEIGHTS, GRAPH, PLAN, RECIPE, INT8 = "weights.safetensors", "graph.json", "plan.json", "recipe.yaml", "int8.onnx"
FORMAT = 2


def save(pruned: Pruned, directory: Path, overwrite: bool = False) -> Path:
    """Write a pruned model; see `Pruned.save`."""
    if directory.exists() and not (overwrite and (directory / PLAN).is_file()):
        what = "a saved model; pass overwrite=True" if (directory / PLAN).is_file() else "no saved model of fxprune"
        raise SavedModelError(f"'{directory}' exists and is {what}, or choose another name")
    if directory.parent.exists() and not directory.parent.is_dir():
        raise SavedModelError(f"'{directory}' cannot be written: '{directory.parent}' is not a directory")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise SavedModelError(f"'{directory}' cannot be written: {error.strerror}") from error
    new, old = work / "new", work / "old"
    existed = directory.exists()
    try:
        new.mkdir()  # with the permissions of any new directory, which a temporary one does not have
        _write(pruned, new)
        if existed:
            directory.rename(old)
        new.rename(directory)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        what = "What was there before is unchanged" if existed else "Nothing is left under that name"
        raise SavedModelError(
            f"'{directory}' was not written: {reason}. {what}; free some space or choose another place"
        ) from error
    finally:
        if old.exists() and not directory.exists():
            old.rename(directory)
        shutil.rmtree(work, ignore_errors=True)
    return directory


def _write(pruned: Pruned, folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    module = pruned.graph_module()
    trainable = {n: p.requires_grad for n, p in module.named_parameters(remove_duplicate=False)}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
        else:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    save_file(tensors, folder / WEIGHTS)
    (folder / GRAPH).write_text(json.dumps(graphfile.write(module)))
    files = [WEIGHTS, GRAPH]
    kept = pruned.quantized
    if kept is not None and not kept.fresh(module):
        pruned.report.notes.append("the file in 8 bits was not saved: the weights have changed since it was made")
        kept = None
    if kept is not None:
        (folder / INT8).write_bytes(kept.file)
        files.append(INT8)
    leaves, spec = pytree.tree_flatten((pruned.args, pruned.kwargs))
    plan = {
        "format": FORMAT,
        "plan": json.loads(pruned.plan.to_json()),
        "report": pruned.report.to_json(),
        "aliases": aliases,
        "int8": {"symmetric": kept.symmetric, "weights": kept.weights} if kept is not None else None,
        "trainable": trainable,
        "inputs": {"spec": json.loads(pytree.treespec_dumps(spec)), "leaves": [_describe(leaf) for leaf in leaves]},
        "sha256": {name: _checksum(folder / name) for name in files},
    }
    (folder / PLAN).write_text(json.dumps(plan, indent=1))
    (folder / RECIPE).write_text(_recipe(pruned.report))


def _recipe(report: Report) -> str:
    """The exact recipe, and in comments what else the result depends on."""
    data = f", calibration data {report.made.data} ({report.samples} samples)" if report.made.data else ""
    about = [f"The recipe of this {report.model}, everything written out.", report.made.line() + data]
    if report.clocked is not None:
        about.append(
            "Its target is on the clock, which never says the same twice: --plan plan.json keeps exactly the same."
        )
    if report.made.command:
        about.append(f"Again: {report.made.command}")
    return "".join(f"# {line}\n" for line in about) + as_yaml(report.recipe)


def _describe(leaf: Any) -> Any:
    """An example input: the shape, dtype and range of a tensor, or a plain value."""
    if not isinstance(leaf, Tensor):
        return {"value": graphfile.encode(leaf)}
    described: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
    if not leaf.is_floating_point() and not leaf.is_complex() and leaf.numel() and not leaf.is_meta:
        described |= {"low": int(leaf.min()), "high": int(leaf.max())}
    return described


def _example(described: Any) -> Any:
    """A seeded stand-in for an example input."""
    if "value" in described:
        return graphfile.decode(described["value"], {})
    dtype, shape = getattr(torch, described["dtype"]), described["shape"]
    generator = torch.Generator().manual_seed(0)
    if "low" in described:
        return torch.randint(described["low"], described["high"] + 1, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def load(directory: str | os.PathLike[str], model: nn.Module | None = None) -> fx.GraphModule:
    """Return a saved module, in the mode it was saved in.

    Args:
        model: a dense model of the original architecture, freshly made; the plan is then replayed on it and the saved
            weights are put into the result. Without it the saved graph is read, and the original class is not needed.

    Raises:
        SavedModelError: a file is missing, truncated or altered, or the plan does not fit the model.
    """
    return load_pruned(directory, model).graph_module()


def load_pruned(directory: str | os.PathLike[str], model: nn.Module | None = None) -> Pruned:
    """Return a saved model with its plan and report; see `load`."""
    from fxprune.pruned import Pruned
    from fxprune.quantization import Quantized

    folder = Path(directory)
    data = _read_plan(folder)
    try:
        for name, checksum in data["sha256"].items():
            if _checksum(_file(folder, name)) != checksum:
                raise SavedModelError(
                    f"'{folder / name}' is truncated or altered: its checksum is not the one in {PLAN}. Save the "
                    "model again"
                )
        weights = load_file(folder / WEIGHTS)
        tensors = {**weights, **{alias: weights[name] for alias, name in data["aliases"].items()}}
        args, kwargs = pytree.tree_unflatten(
            [_example(leaf) for leaf in data["inputs"]["leaves"]], graphfile._spec(data["inputs"]["spec"])
        )
        try:
            plan = Plan.from_json(data["plan"])
        except SavedModelError as error:
            raise SavedModelError(f"'{folder / PLAN}' is altered: {error}. Save the model again") from error
        graph = _read_json(folder, GRAPH)
        if model is None:
            module = graphfile.read(graph, tensors, data["trainable"])
        else:
            module = _replay(model, plan, args, kwargs, tensors)
            graphfile.set_modes(module, graph)
        report = read_report(data["report"])
    except (KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise SavedModelError(f"'{folder}' cannot be read: {type(error).__name__}: {error}") from error
    quantized = Quantized(file=(folder / INT8).read_bytes(), **data["int8"]) if data.get("int8") else None
    return Pruned(module, plan, report, args, kwargs, model, quantized=quantized)


def _replay(
    model: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: dict[str, Tensor]
) -> fx.GraphModule:
    try:
        model = admit(model).model
        analysis = analyse(capture(model, args, kwargs, plan.dynamic or False))
    except (CaptureError, InputError) as error:
        raise SavedModelError(f"the model does not run on the inputs that the plan was made for: {error}") from error
    biases = {name: torch.zeros_like(tensors[name]) for name in plan.biases}
    module = rewrite(analysis, plan.selection(analysis), model, biases).module
    own = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in own.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise SavedModelError(f"the model gives '{name}' the shape {tuple(tensor.shape)}, but {found} was saved")
        with torch.no_grad():
            tensor.copy_(tensors[name])
    return module


def read_report(data: dict[str, Any]) -> Any:
    """Return a report from its JSON."""
    from fxprune.plan import GroupPlan
    from fxprune.prove import Proof
    from fxprune.provenance import Provenance
    from fxprune.report import Clocked, EngineSummary, Latency, Pair, PartTime, Refitted, Report, Sparse

    latency = [
        Latency(
            **{
                **row,
                "milliseconds": Pair(**row["milliseconds"]),
                "iqr": Pair(**row["iqr"]),
                "interval": tuple(row["interval"]),
            }
        )
        for row in data["latency"]
    ]
    clocked = data.get("clocked")
    if clocked is not None:
        clocked = Clocked.of(clocked)
    return Report(
        **{
            **data,
            "macs": Pair(**data["macs"]),
            "params": Pair(**data["params"]),
            "memory": Pair(**data["memory"]),
            "metric": Pair(**data["metric"]) if data["metric"] else None,
            "made": Provenance(**data["made"]),
            "losses": {name: [(n, loss) for n, loss in curve] for name, curve in data["losses"].items()},
            "parts": [PartTime(**p) for p in data["parts"]],
            "proof": Proof(**data["proof"]),
            "groups": [GroupPlan(**g) for g in data["groups"]],
            "latency": latency,
            "clocked": clocked,
            "refitted": [Refitted(**r) for r in data.get("refitted", [])],
            "tuned": Refitted(**data["tuned"]) if data.get("tuned") else None,
            "steps": [_read_step(s) for s in data.get("steps", [])],
            "sparse": [Sparse(**{**s, "shape": tuple(s["shape"])}) for s in data.get("sparse", [])],
            "engines": [
                EngineSummary(**{**e, "compute_capability": tuple(e["compute_capability"])})
                for e in data.get("engines", [])
            ],
        }
    )


def _read_step(data: dict[str, Any]) -> Any:
    from fxprune.report import Step

    pairs = {k: tuple(data[k]) for k in ("error", "metric", "speedup") if data.get(k) is not None}
    return Step(**{**data, **pairs})


def read_saved_report(folder: Path) -> Report:
    """Return the report of a saved model without reading its weights.

    Raises:
        SavedModelError: there is none, or it is damaged.
    """
    data = _read_plan(folder)
    try:
        report: Report = read_report(data["report"])
        return report
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise SavedModelError(f"'{folder / PLAN}' cannot be read: {type(error).__name__}: {error}") from error


def _read_plan(folder: Path) -> dict[str, Any]:
    """What stands in plan.json, which is of this version's format."""
    data = _read_json(folder, PLAN)
    if "format" not in data:
        raise SavedModelError(f"'{folder / PLAN}' is not what fxprune writes. Save the model again")
    if data["format"] != FORMAT:
        raise SavedModelError(
            f"'{folder / PLAN}' was written in format {data['format']}; this fxprune reads {FORMAT}. Update fxprune, "
            "or save the model again"
        )
    return data


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such directory"
        raise SavedModelError(f"'{path}' is missing (found: {known or 'an empty directory'})")
    return path


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads(_file(folder, name).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SavedModelError(f"'{folder / name}' is truncated or altered: {error}. Save the model again") from error
    if not isinstance(data, dict):
        raise SavedModelError(f"'{folder / name}' is not what fxprune writes. Save the model again")
    return data


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with contextlib.closing(path.open("rb")) as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
