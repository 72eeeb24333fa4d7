"""INT8: ONNX files with QuantizeLinear and DequantizeLinear around what is computed in 8 bits, by onnxruntime's tool.

`import onnxruntime` inside this module is the library: imports are absolute.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fxprune.backends.quiet import quiet
from fxprune.errors import BackendError

Feeds = Mapping[str, npt.NDArray[Any]]
#: How the range of an activation is taken from what calibration data show: onnxruntime's names.
RANGES = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}


@dataclass(frozen=True, slots=True)
class Int8:
    """How a file is quantised.

    Attributes:
        symmetric: activations from -127 to 127 around zero, which TensorRT takes; else from 0 to 255 around a zero
            point, in which CPUs are faster.
        ranges: a key of RANGES.
        operators: ONNX operators that are quantised; None for all that onnxruntime can.
        per_channel: weights have a scale for each output.
    """

    symmetric: bool = False
    ranges: str = "minmax"
    operators: tuple[str, ...] | None = None
    per_channel: bool = True


def quantize(source: Path, target: Path, feeds: Iterable[Feeds], settings: Int8) -> None:
    """Write `source`, a file in float32, in 8 bits to `target`.

    Args:
        feeds: calibration batches: input -> array, that set the ranges of activations.

    Raises:
        BackendError: onnxruntime cannot quantise the file; with its own words.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory(prefix="fxprune-") as folder, _no_log(), quiet():
        prepared = _prepared(source, Path(folder) / "prepared.onnx")
        try:
            quantize_static(
                str(prepared),
                str(target),
                _reader(iter(feeds)),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QInt8 if settings.symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=settings.per_channel,
                op_types_to_quantize=list(settings.operators) if settings.operators else None,
                calibrate_method=getattr(CalibrationMethod, RANGES[settings.ranges]),
                calibration_providers=["CPUExecutionProvider"],
                extra_options={"ActivationSymmetric": settings.symmetric, "WeightSymmetric": True},
            )
        except Exception as error:  # the tool raises whatever its parts do
            raise BackendError(f"onnxruntime cannot quantise '{source.name}': {error}") from error


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    """Keep the tool, which logs to the root, from giving it a handler that stays."""
    root, nothing = logging.getLogger(), logging.NullHandler()
    root.addHandler(nothing)
    try:
        yield
    finally:
        root.removeHandler(nothing)


def _prepared(source: Path, target: Path) -> Path:
    """The file with the shapes of its tensors, which the tool decides by; as it is where they cannot be inferred."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True, skip_optimization=True)
    except Exception:  # operators that shape inference does not know
        return source
    return target


def _reader(feeds: Iterator[Feeds]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            found = next(feeds, None)
            return None if found is None else {name: np.ascontiguousarray(value) for name, value in found.items()}

    return Reader()
