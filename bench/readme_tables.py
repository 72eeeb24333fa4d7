"""The generated parts of README.md and of docs/: from the documents that `bench` writes to lines of Markdown.

Nothing here measures, and nothing here knows a number.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from bench import training_tables
from bench.tables import Documents, Missing, Part, plural, required, table

#: What the tasks are called.
TASKS = {
    "digits_resnet": "ResNet on digits",
    "digits_vit": "ViT on digits",
    "minilm_similarity": "MiniLM, similarity",
    "minilm_modules": "MiniLM, classes",
    "stdlib_gpt": "byte-level GPT",
}
#: Columns of other tools: the heading, and how the names of its methods begin.
TOOLS = {
    "Torch-Pruning's best": "Torch-Pruning",
    "FastNAS": "ModelOpt FastNAS",
    "onnxsim's best": "onnxsim",
    "`torch.nn.utils.prune`": "torch masks",
}


# ---------------------------------------------------------------------- accuracy at measured speed
def _score(measure: str, number: float) -> str:
    """Return a score; what is counted downwards, as -bits/byte, without its sign.

    >>> _score("accuracy", 0.98444), _score("-bits/byte", -1.6876)
    ('0.984', '1.688')
    """
    return f"{-number if measure.startswith('-') else number:.3f}"


def _cell(row: dict[str, Any] | None, measure: str) -> tuple[str, str]:
    """Return a method's score and its speed-up."""
    if row is None:
        return "-", ""
    if "error" in row:
        return "fails", ""
    return _score(measure, next(iter(row["measures"].values()))), f"{row['speedup']:.2f} x"


def _best(cells: dict[str, Any], start: str) -> dict[str, Any] | None:
    """Return the best row among the methods whose names begin so; one that failed where all did."""
    rows = [row for name, row in cells.items() if name.startswith(start)]
    scored = [row for row in rows if "measures" in row]
    return max(scored, key=lambda row: next(iter(row["measures"].values())), default=rows[0] if rows else None)


def accuracy(speed: str) -> Callable[[Documents], list[str]]:
    """Return what shows the scores at a speed-up."""

    def render(documents: Documents) -> list[str]:
        document = required(documents, "accuracy.json")
        tasks = {n: r for n, r in document["tasks"].items() if "fxprune" in r["speedups"].get(speed, {})}
        if not tasks:
            raise Missing(f"No model was measured at {speed} x")
        found = {n: r["speedups"][speed] for n, r in tasks.items()}
        tools = {h: s for h, s in TOOLS.items() if any(_best(cells, s) for cells in found.values())}
        rows = []
        for name, result in tasks.items():
            cells = found[name]
            measure = next((next(iter(r["measures"])) for r in cells.values() if "measures" in r), "score")
            row = [f"{TASKS.get(name, name)}, {measure.removeprefix('-')}", _score(measure, result["dense"])]
            row += _cell(cells["fxprune"], measure)
            for start in tools.values():
                row += _cell(_best(cells, start), measure)
            rows.append(row)
        head = ["task", "dense", "fxprune", "at"]
        for tool in tools:
            head += [tool, "at"]
        title = f"At {speed} x, {document['backend']}, {plural(document['threads'], 'thread')}:"
        return [title, "", *table(head, rows)]

    return render


def efficiency(documents: Documents) -> list[str]:
    """Return how much of the saved multiply-accumulates the clock sees."""
    rows = []
    for name, result in documents.get("accuracy.json", {}).get("tasks", {}).items():
        for speed, cells in sorted(result["speedups"].items(), key=lambda item: float(item[0])):
            row = cells.get("fxprune", {})
            if "speedup" in row:
                rows.append(_saving(f"{TASKS.get(name, name)}, asked for {speed} x", row["macs"], row["speedup"]))
    rounding = documents.get("rounding.json", {})
    for name, model in rounding.get("models", {}).items():
        faster = model["timing"]["runners"]["default"]["ratio"]["median"]
        share = model["roundings"]["default"]["macs"]
        rows.append(_saving(f"{name}, asked for {rounding['share']:g} of the MACs", share, faster))
    if not rows:
        raise Missing("Neither `bench/results/accuracy.json` nor `bench/results/rounding.json` is there")
    return table(["model", "MACs left", "times fewer", "times as fast", "efficiency"], rows)


def _saving(name: str, share: float, faster: float) -> list[str]:
    return [name, f"{share:.2f}", f"{1 / share:.2f}", f"{faster:.2f}", f"{share * faster:.2f}"]


# ---------------------------------------------------------------------- pruning itself
def compile_time(documents: Documents) -> list[str]:
    """Return the seconds and the memory of pruning, beside Torch-Pruning's."""
    document = required(documents, "compile_time.json")
    rows = []
    counts = set()
    for name, model in document["models"].items():
        own, other = model.get("fxprune", {}), model.get("torch_pruning", {})
        whole, theirs = (_median(row, "whole") for row in (own, other))
        counts |= {len(row["seconds"]["whole"]) for row in (own, other) if "seconds" in row}
        rows.append(
            [
                name,
                _number(_median(own, "analyse"), 3),
                _number(whole, 2),
                _number(theirs, 2),
                _number(whole / theirs if whole and theirs else None, 2),
                *(_number(_weights(row), 2) for row in (own, other)),
            ]
        )
    rounds = " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else "no"
    title = (
        f"Seconds to prune to {document['share']:g} of the MACs by magnitude, medians of {rounds} rounds in turns in "
    )
    title += "one process; extra memory at the peak in units of the weights' size:"
    head = ["model", "analysis alone", "fxprune, all of `compile`", "Torch-Pruning", "ratio", "extra memory"]
    return [title, "", *table([*head, "Torch-Pruning's"], rows)]


def _median(row: dict[str, Any], stage: str) -> float | None:
    values = row.get("seconds", {}).get(stage)
    return statistics.median(values) if values else None


def _weights(row: dict[str, Any]) -> float | None:
    memory = row.get("memory", {})
    return memory["peak"] / memory["weights"] if "peak" in memory else None


def _number(value: float | None, digits: int) -> str:
    return "fails" if value is None else f"{value:.{digits}f}"


def coverage(documents: Documents) -> list[str]:
    """Return how many models of the zoo come out smaller, proved, and in their class."""
    document = required(documents, "coverage.json")
    said, rows = document["summary"], document["rows"]
    shelves = Counter(key.partition("/")[0] for key in rows)
    peers = [row["torch_pruning"] for row in rows.values() if "torch_pruning" in row]
    late = sum(row.get("error", "").startswith("no result in") for row in peers)
    smaller = sum(row["fxprune"].get("params", 1) < 1 for row in rows.values() if "fxprune" in row)
    title = f"{said['models']} architectures ({', '.join(f'{n} of {shelf}' for shelf, n in shelves.items())}) to half "
    title += f"their MACs; Torch-Pruning ran into its time limit on {late} of those that it did not prune:"
    lines = [
        ["smaller, running and proved equal to the masked model", str(said["proved"]), "none is checked"],
        ["smaller and running", str(smaller), str(said["peer"][0])],
        [
            "in its original class, all of the plan / a plan that the class can hold",
            f"{said['like']} / {said['keep_class'][0]}",
            "",
        ],
    ]
    if said["ratio"]:
        many = f"over the {said['ratio'][1]} above 5 M parameters that both prune"
        ratio = f"{said['ratio'][0]:.2f} ({said['largest_ratio'][0]:.2f})"
        lines.append([f"seconds for a model, proof left out, median ratio (largest) {many}", ratio, "1"])
    return [title, "", *table(["", "fxprune", "Torch-Pruning"], lines)]


# ---------------------------------------------------------------------- what comes out
def rounding(documents: Documents) -> list[str]:
    """Return what rounding widths does to the speed."""
    document = required(documents, "rounding.json")
    title = f"At {document['share']:g} of the MACs, onnxruntime, float32, batch {document['batch']}, "
    title += f"{plural(document['threads'], 'thread')}, dense and all of a model's pruned ones in turns in one run:"
    rows = []
    for name, model in document["models"].items():
        for multiple, figures in model["roundings"].items():
            ratio = model["timing"]["runners"][multiple]["ratio"]
            shown = f"default ({figures['round_to']})" if multiple == "default" else multiple
            between = f"{ratio['low']:.2f}-{ratio['high']:.2f}"
            efficient = f"{ratio['median'] * figures['macs']:.2f}"
            rows.append([name, shown, f"{ratio['median']:.2f} x", between, efficient])
    return [title, "", *table(["model", "round_to", "measured speed-up", "95 % interval", "efficiency"], rows)]


def patterns(documents: Documents) -> list[str]:
    """Return what is left of the scores in 2:4, and what orders of channels win."""
    document = required(documents, "patterns.json")
    scores = {name: found for name, found in document.get("scores", {}).items() if found.get("dense")}
    if not scores:
        raise Missing("No score was measured in `bench/results/patterns.json`")
    measures = {name: next(iter(found["dense"])) for name, found in scores.items()}
    head = ["masks", *(f"{TASKS.get(n, n)}, {m.removeprefix('-')}" for n, m in measures.items())]
    rows = [["dense", *(_score(m, scores[n]["dense"][m]) for n, m in measures.items())]]
    failed: dict[str, str] = {}
    for label in dict.fromkeys(label for found in scores.values() for label in found["methods"]):
        cells = []
        for name, measure in measures.items():
            row = scores[name]["methods"].get(label, {})
            if "failed" in row:
                failed[label] = row["failed"]
            cells.append(_score(measure, row["measures"][measure]) if "measures" in row else "fails" if row else "-")
        rows.append([label, *cells])
    lines = [f"What is left in {document['pattern']}, without training:", "", *table(head, rows)]
    lines += ["", "SparseGPT is the published algorithm, which llm-compressor's SparseGPTModifier runs, too."]
    for label, reason in failed.items():
        lines += ["", f"{label}: {reason}"]
    for row in document.get("orders", [])[:1]:
        lines += [
            "",
            f"An order of the columns closes {row['efficacy']:.1%} of the gap between {document['pattern']} and "
            f"unstructured 50 % on random matrices of {row['rows']} x {row['columns']} (median of {row['matrices']}).",
        ]
    return lines


def memory(documents: Documents) -> list[str]:
    """Return the memory of pruning, storing and running."""
    document = required(documents, "memory.json")
    rows = []
    for name, model in document["models"].items():
        row = [name]
        for tool in ("fxprune", "torch_pruning"):
            found = model["compile"][tool]
            row.append(_number(statistics.median(found["peak"]) / found["weights"] if "peak" in found else None, 2))
        sizes = [{k: model["files"].get(v, {}).get(k) for k in ("weights", "onnx")} for v in ("dense", "pruned")]
        runs = [model["onnxruntime"].get(variant, {}).get("peak") for variant in ("dense", "pruned")]
        row += [" / ".join(_mebibytes(size[kind]) for size in sizes) for kind in ("weights", "onnx")]
        row.append(" / ".join(_mebibytes(statistics.median(run) if run else None) for run in runs))
        rows.append(row)
    title = f"At {document['share']:g} of the MACs, each number in fresh processes (medians of {document['repeats']}); "
    title += f"pruning in units of the weights, the rest in MiB, dense / pruned, running at batch {document['batch']}:"
    head = ["model", "pruning, fxprune", "pruning, Torch-Pruning", "weights", "ONNX file", "running in onnxruntime"]
    return [title, "", *table(head, rows)]


def _mebibytes(number: float | None) -> str:
    return "fails" if number is None else f"{number / 2**20:.1f}"


# ---------------------------------------------------------------------- the stamp
def stamp(documents: Documents) -> list[str]:
    """Return the machines, versions and dates, one line for the files that were measured alike."""
    alike: dict[str, list[str]] = {}
    for name, document in sorted(documents.items()):
        about = document["machine"]
        threads = document.get("threads", about["threads"])
        size = f"{plural(about['cores'], 'core')}, {plural(threads, 'thread')}"
        known = [f"{k} {v}" for k, v in about.items() if k not in _MACHINE and v != "not installed"]
        line = f"{about['processor']}, {size}; {', '.join(known)}; {about['date']}"
        alike.setdefault(line, []).append(name.removesuffix(".json"))
    if not alike:
        raise Missing("No result is there")
    return [f"- {', '.join(names)}: {line}" for line, names in alike.items()]


_MACHINE = ("processor", "cores", "threads", "date")
_FILES = ("accuracy", "compile_time", "coverage", "ladder", "mask_cost", "memory", "patterns", "rounding")

#: Every generated part by the name in its markers.
PARTS: dict[str, Part] = {
    "accuracy-1.5": Part(("accuracy.json",), "python -m bench.accuracy --speedup 1.5 --resume", accuracy("1.5")),
    "accuracy-2": Part(("accuracy.json",), "python -m bench.accuracy --speedup 2 --resume", accuracy("2")),
    "accuracy-3": Part(("accuracy.json",), "python -m bench.accuracy --speedup 3 --resume", accuracy("3")),
    "efficiency": Part(("accuracy.json", "rounding.json"), "python -m bench accuracy latency", efficiency),
    "coverage": Part(("coverage.json",), "python -m bench coverage", coverage),
    "compile_time": Part(("compile_time.json",), "python -m bench compile_time", compile_time),
    "rounding": Part(("rounding.json",), "python -m bench latency", rounding),
    "patterns": Part(("patterns.json",), "python -m bench patterns", patterns),
    "memory": Part(("memory.json",), "python -m bench memory", memory),
    "ladder": Part(("ladder.json",), "python -m bench.ladder --resume", training_tables.ladder),
    "mask_cost": Part(("mask_cost.json",), "python -m bench.mask_cost", training_tables.mask_cost),
    **{
        f"methods-{model}": Part(
            ("methods.json",), "python -m bench.methods --resume", training_tables.methods(model), training_tables.PAGE
        )
        for model in ("digits_resnet", "digits_vit")
    },
    "methods-stamp": Part(("methods.json",), "python -m bench.methods --resume", stamp, training_tables.PAGE),
    "stamp": Part(tuple(f"{name}.json" for name in _FILES), "python -m bench", stamp),
}
