"""The registry of benchmark suites: what each measures, against which tools, into which file, and how long it takes.

A suite is one or more steps, each a program of this folder that writes one JSON file. `python -m bench` prints this
table and runs from it. Nothing heavy is imported here.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Step:
    """One program of a suite.

    Attributes:
        module: that is run, as `python -m MODULE` does; it takes `--json FILE`.
        file: that it writes, in the folder of results.
        full: its arguments when everything is measured.
        quick: its arguments when a few minutes have to do.
        resume: what tells it to go on from the file.
        anew: what tells it to forget the file.
    """

    module: str
    file: str
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    resume: tuple[str, ...] = ("--resume",)
    anew: tuple[str, ...] = ()

    def arguments(self, folder: Path, quick: bool, resume: bool) -> list[str]:
        """Return what Python is called with.

        >>> Step("bench.rounding", "rounding.json", quick=("vit",)).arguments(Path("out"), quick=True, resume=True)
        ['-m', 'bench.rounding', 'vit', '--resume', '--json', 'out/rounding.json']
        """
        said = (*(self.quick if quick else self.full), *(self.resume if resume else self.anew))
        return ["-m", self.module, *said, "--json", str(folder / self.file)]


@dataclass(frozen=True, slots=True)
class Suite:
    """A row of the registry.

    Attributes:
        name: that it is called by.
        what: it measures.
        peers: other tools beside fxprune; those that are not installed become rows that say so.
        steps: its programs.
        minutes: about how long everything takes on two cores, and the quick setting.
        needs: packages without which it does not run, by their import names.
        gpu: whether it needs a CUDA device.
        notes: what a reader of its figures must know.
    """

    name: str
    what: str
    peers: str
    steps: tuple[Step, ...]
    minutes: tuple[float, float]
    needs: tuple[str, ...] = ()
    gpu: bool = False
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it writes."""
        return tuple(step.file for step in self.steps)

    def missing(self) -> str | None:
        """Return why it cannot run here; None where it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"not installed: {', '.join(absent)} (pip install fxprune[bench])"
        if self.gpu:
            import torch

            if not torch.cuda.is_available():
                return f"torch {torch.__version__} finds no CUDA device"
        return None


_ALL = (
    Suite(
        name="compile_time",
        what="seconds that pruning to half of the MACs takes, stage by stage, and the memory at its peak",
        peers="Torch-Pruning",
        steps=(
            Step(
                "bench.compile_time",
                "compile_time.json",
                quick=("--models", "resnet50,mobilenetv3_small_050", "--repeats", "2"),
            ),
        ),
        minutes=(10, 1.5),
        needs=("torch_pruning", "timm"),
    ),
    Suite(
        name="coverage",
        what="how many architectures are pruned, run and are proved equal to the masked model; what stays whole, why",
        peers="Torch-Pruning",
        steps=(
            Step(
                "bench.coverage",
                "coverage.json",
                full=("--threads", "1", "--peer-limit", "20"),
                quick=("test_vit", "test_byobnet", "llama", "xglm", "points", "--limit", "60", "--peer-limit", "20"),
            ),
        ),
        minutes=(90, 1.5),
        needs=("torch_pruning", "timm", "transformers"),
    ),
    Suite(
        name="accuracy",
        what="what is left of the score of trained models at the same measured speed-up, without any training",
        peers="Torch-Pruning, torch.nn.utils.prune, ModelOpt FastNAS, onnxsim",
        steps=(
            Step(
                "bench.accuracy",
                "accuracy.json",
                quick=(
                    *("digits_resnet", "--speedup", "2", "--samples", "128"),
                    *("--method", "fxprune", "--method", "Torch-Pruning magnitude", "--method", "torch masks"),
                    *("--method", "ModelOpt FastNAS", "--method", "onnxsim magnitude"),
                ),
            ),
        ),
        minutes=(180, 5),
        needs=("torch_pruning", "sklearn", "onnxruntime", "onnxscript", "matplotlib"),
        notes=(
            "Torch-Pruning, FastNAS and onnxsim are given the ratio at which they are as fast on the clock; "
            "torch.nn.utils.prune only writes zeros, so that its models are as slow as the dense one.",
            "FastNAS counts with torchprofile 0.0.4; a later one lacks what it reads there.",
            "Block movement pruning (nn_pruning) learns its masks in training: its row is in the suite `training`.",
        ),
    ),
    Suite(
        name="latency",
        what="whole-model speed-up against the MACs that are left, by what widths are rounded to; "
        "how long the exact allocations take",
        peers="none: roundings and solvers against each other",
        steps=(
            Step("bench.rounding", "rounding.json", quick=("mobilenetv3_small_050", "--rounds", "6")),
            Step("bench.allocation_time", "allocation_time.json", quick=("--small", "--rounds", "1")),
        ),
        minutes=(20, 1.5),
        needs=("timm", "transformers", "onnxruntime", "onnxscript"),
    ),
    Suite(
        name="patterns",
        what="2:4: the error of each layer and what is left of the score by each way to choose masks; "
        "what orders of channels win",
        peers="ModelOpt and onnxsim (2:4 by magnitude, Wanda, SparseGPT)",
        steps=(
            Step(
                "bench.patterns",
                "patterns.json",
                quick=("digits_resnet", "--samples", "64", "--seeds", "1", "--largest", "10000"),
            ),
        ),
        minutes=(60, 2),
        needs=("sklearn", "transformers"),
        notes=(
            "The row SparseGPT is fxprune's `method: sparsegpt`, the published algorithm, which is what "
            "llm-compressor's SparseGPTModifier runs, too.",
        ),
    ),
    Suite(
        name="training",
        what="every way to prune while training, before and after tuning; the ladder and block movement at the same "
        "measured speed-up; what masks cost a training step",
        peers="nn_pruning's block movement and CoFi's gates, restated from their papers",
        steps=(
            Step(
                "bench.methods",
                "methods.json",
                quick=("digits_vit", "--method", "magnitude", "--seeds", "1", "--epochs", "2"),
            ),
            Step(
                "bench.ladder",
                "ladder.json",
                quick=("--only", "dense, trained on", "--limit", "64", "--epochs", "1", "--more", "1", "--seeds", "1"),
            ),
            Step("bench.mask_cost", "mask_cost.json", quick=("--rounds", "12", "--tokens", "16"), resume=()),
        ),
        minutes=(360, 2),
        needs=("sklearn", "transformers", "onnxruntime", "onnxscript"),
    ),
    Suite(
        name="memory",
        what="peak memory of pruning; bytes of the weights and of the ONNX file; peak memory of onnxruntime, dense and "
        "pruned",
        peers="Torch-Pruning",
        steps=(Step("bench.memory", "memory.json", quick=("mobilenetv3_small_050", "--repeats", "1")),),
        minutes=(10, 1.5),
        needs=("torch_pruning", "timm", "transformers", "onnxruntime", "onnxscript"),
    ),
    Suite(
        name="gpu",
        what="half the MACs and 2:4 weights on a GPU in half precision, eager with CUDA graphs and compiled",
        peers="none: dense, pruned, 2:4 and both against each other",
        steps=(Step("bench.gpu", "gpu.json", full=("--seconds", "3000"), resume=(), anew=("--fresh",)),),
        minutes=(40, 0),
        needs=("timm", "transformers"),
        gpu=True,
    ),
)

#: Every suite by its name, in the order in which they run.
SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}
