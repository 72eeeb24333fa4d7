"""Every error fxprune raises on purpose. Each message ends with what to do next."""

from __future__ import annotations


class FxpruneError(Exception):
    """The base of all errors below; `exit_code` is what the command line returns for it."""

    exit_code = 1


class RecipeError(FxpruneError):
    """The recipe has an unknown key, a value out of range, or parts that contradict each other."""

    exit_code = 2


class InputError(FxpruneError):
    """The model or its example inputs are not what was asked for."""

    exit_code = 3


class CaptureError(FxpruneError):
    """The model's forward cannot be recorded as a graph."""

    exit_code = 4


class TargetError(FxpruneError):
    """The target cannot be reached; the message says what can be, and what stands in the way."""

    exit_code = 5


class ProofError(FxpruneError):
    """The pruned model does not equal the masked dense one. Always a defect of a rule, never returned as a result."""

    exit_code = 6


class WriteBackError(FxpruneError):
    """The original class cannot hold the smaller model; `nodes` are the operators of the line that is in the way."""

    exit_code = 10

    def __init__(self, message: str, nodes: list[str] | None = None) -> None:
        """Keep the nodes beside the message."""
        super().__init__(message)
        self.nodes = nodes or []


class NonFiniteError(FxpruneError):
    """A weight or a statistic is NaN or infinite, so that no ranking of it means anything."""

    exit_code = 7


class BackendError(FxpruneError):
    """A backend is missing, or failed to build or to run."""

    exit_code = 8


class SavedModelError(FxpruneError):
    """A saved directory cannot be written, or what is in it is missing, truncated or altered."""

    exit_code = 9
