"""What the command line calls MODEL, turned into a module with example inputs.

Nothing is ever downloaded: what a name cannot give (weights, code) is said to be missing.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxprune import named
from fxprune.capture import example
from fxprune.errors import FxpruneError, InputError
from fxprune.registry import nearest

FORMS = (
    "timm:NAME",
    "hf:DIRECTORY or hf:CONFIG.json",
    "FILE.py:FACTORY or MODULE:FACTORY",
    "FILE.pt2",
    "a directory that fxprune saved",
)
#: Length of a text made up for a transformers model.
TOKENS = 32


@dataclass(frozen=True, slots=True)
class Source:
    """A module, what it is called with, and what the user should know about both.

    Attributes:
        args, kwargs: example inputs; empty where none are known.
        notes: where weights and inputs come from.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def has_inputs(self) -> bool:
        """Whether there are example inputs."""
        return bool(self.args or self.kwargs)


def resolve(model: str, inputs: Sequence[str] = (), seed: int = 0, needs_inputs: bool = True) -> Source:
    """Return the module that MODEL names, with example inputs.

    Args:
        inputs: as given to `--input`; they replace those that the source has.
        seed: of random weights and random inputs; the global random state is left as it was.
        needs_inputs: whether it is an error that there are none.

    Raises:
        InputError: there is no such model, a package is missing, or there are no example inputs.
    """
    # First, so that a typing error is told before a model has been built.
    given = [parse_input(text) for text in inputs]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        source = _reader(model, seed)()
        if given:
            source = _with_inputs(source, given)
    if needs_inputs and not source.has_inputs:
        raise InputError(
            f"'{model}' comes without example inputs; give their shapes, for example --input 1x3x224x224 "
            "or --input input_ids=2x16:int64:0-30000"
        )
    return source


def _reader(model: str, seed: int) -> Callable[[], Source]:
    """The function that reads this kind of MODEL."""
    kind, _, rest = model.partition(":")
    if kind == "timm":
        return lambda: _timm(rest)
    if kind == "hf":
        return lambda: _transformers(Path(rest))
    if named.is_name(model):
        return lambda: _python(model, seed)
    if model.endswith(".pt2"):
        return lambda: _exported(Path(model))
    if Path(model).is_dir():
        return lambda: _directory(Path(model))
    raise InputError(f"'{model}' names no model. MODEL is one of: {', '.join(FORMS)}")


# ---------------------------------------------------------------------- example inputs
@dataclass(frozen=True, slots=True)
class InputSpec:
    """One `--input`: a name (empty for a positional input), a shape, a type and the range of its whole numbers."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    low: int = 0
    high: int = 2

    def make(self) -> Tensor:
        """Return a random tensor: normal for floats, evenly distributed in low <= value < high for whole numbers."""
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(self.shape, dtype=self.dtype)
        return torch.randint(self.low, self.high, self.shape).to(self.dtype)

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape)) or "a scalar"
        return f"{self.name or 'positional'} {size} {str(self.dtype).removeprefix('torch.')}"


_INPUT = re.compile(
    r"(?:(?P<name>\w+)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?(?::(?P<low>-?\d+)-(?P<high>-?\d+))?"
)


def parse_input(text: str) -> InputSpec:
    """Read one `--input`: [NAME=]SHAPE[:DTYPE[:LOW-HIGH]].

    Raises:
        InputError: it has another form, or the type is unknown.

    >>> str(parse_input("1x3x224x224"))
    'positional 1x3x224x224 float32'
    >>> parse_input("input_ids=2x16:int64:0-30000").high
    30000
    """
    found = _INPUT.fullmatch(text)
    if found is None:
        raise InputError(
            f"--input {text}: this is not [NAME=]SHAPE[:DTYPE[:LOW-HIGH]]; for example 1x3x224x224 "
            "or input_ids=2x16:int64:0-30000"
        )
    known = sorted(n for n, v in vars(torch).items() if isinstance(v, torch.dtype))
    name = found["dtype"] or "float32"
    if name not in known:
        raise InputError(f"--input {text}: torch has no type '{name}'{nearest(name, known)}")
    dtype: torch.dtype = getattr(torch, name)
    low, high = int(found["low"] or 0), int(found["high"] or 2)
    if found["low"] is not None and (dtype.is_floating_point or dtype.is_complex):
        raise InputError(f"--input {text}: a range is for whole numbers, and {name} is not; leave it out")
    if low >= high:
        raise InputError(f"--input {text}: the range holds nothing: LOW <= value < HIGH")
    return InputSpec(found["name"] or "", tuple(map(int, found["shape"].split("x"))), dtype, low, high)


def _with_inputs(source: Source, given: list[InputSpec]) -> Source:
    device = next((p.device for p in source.module.parameters()), torch.device("cpu"))
    args = tuple(spec.make().to(device) for spec in given if not spec.name)
    kwargs = {spec.name: spec.make().to(device) for spec in given if spec.name}
    return Source(source.module, args, kwargs, source.notes)


def describe_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return the example inputs in a few words.

    >>> describe_inputs((torch.zeros(1, 3),), {"mask": None})
    '1x3 float32, mask=None'
    """
    named = [("", a) for a in args] + [(f"{k}=", v) for k, v in kwargs.items()]
    return ", ".join(name + _describe_value(value) for name, value in named)


def _describe_value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
    leaves = pytree.tree_leaves(value)
    if leaves and any(isinstance(leaf, Tensor) for leaf in leaves):
        return f"{type(value).__name__} of {len(leaves)}"
    return repr(value)


# ---------------------------------------------------------------------- the kinds of MODEL
def _package(name: str) -> Any:
    """Import a package that is needed only by one kind of MODEL."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise InputError(f"the package {name} is not installed: pip install {name}") from None
        raise InputError(
            f"{name} cannot be imported, because it needs {error.name}: pip install {error.name}"
        ) from error
    except Exception as error:  # anything can go wrong while a package of somebody else is imported
        raise InputError(_cannot_import(name, error)) from error


def _cannot_import(name: str, error: BaseException) -> str:
    """What failed in the import of a package, and whose it was: often a package that it depends on."""
    error = root_cause(error)
    culprit = failing_package(error) or name
    blame = f" in {culprit}" if culprit != name else ""
    text = str(error).strip().splitlines()
    return (
        f"{name} cannot be imported: {type(error).__name__}{blame}: {text[0] if text else 'no message'}. "
        f'Try python -c "import {culprit}"; where that fails too, install a {culprit} that fits '
        f"torch {torch.__version__}"
    )


def root_cause(error: BaseException) -> BaseException:
    """Return the exception that a chain of `raise ... from` began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def failing_package(error: BaseException) -> str | None:
    """Return the top-level package, other than torch, that ran last before an import failed, or None."""
    innermost, frame = None, error.__traceback__
    while frame is not None:
        top = str(frame.tb_frame.f_globals.get("__name__", "")).split(".")[0]
        if top not in ("torch", "fxprune", "", *sys.stdlib_module_names):
            innermost = top
        frame = frame.tb_next
    return innermost


def _timm(name: str) -> Source:
    timm = _package("timm")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; the nearest are {', '.join(near)}" if near else "; timm.list_models() lists them"
        raise InputError(f"timm has no model '{name}'{hint}")
    try:
        module: nn.Module = timm.create_model(name, pretrained=False)
    except Exception as error:  # whatever a model's constructor raises
        raise InputError(f"timm cannot make '{name}': {type(error).__name__}: {error}") from error
    notes = (f"timm:{name} has random weights; load trained ones in a FILE.py:FACTORY",)
    size = (getattr(module, "pretrained_cfg", None) or {}).get("input_size")
    return Source(module, (torch.randn(1, *size),) if size else (), notes=notes)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keep the Hugging Face libraries off the network, also where a file they look for is not in the directory."""
    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _transformers(path: Path) -> Source:
    config_file = path / "config.json" if path.is_dir() else path
    if not config_file.is_file():
        raise InputError(
            f"hf:{path} is neither a directory with a config.json nor a config file. fxprune downloads nothing: "
            "fetch the model first (hf download NAME --local-dir DIRECTORY)"
        )
    with _offline():
        transformers = _package("transformers")
        bars = transformers.utils.logging
        shown = bars.is_progress_bar_enabled()
        bars.disable_progress_bar()
        try:
            config = transformers.AutoConfig.from_pretrained(str(config_file), local_files_only=True)
            # A decoder's cache of keys and values is state between calls, and no tensor.
            if hasattr(config, "use_cache"):
                config.use_cache = False
            module, notes = _transformers_module(transformers, config, path)
            kwargs = _transformers_inputs(config, module)
        except FxpruneError:
            raise
        except ImportError as error:  # it imports the file of a model, and what that needs, when the model is asked for
            raise InputError(_cannot_import("transformers", error)) from error
        except Exception as error:  # a dozen kinds
            raise InputError(f"transformers cannot make hf:{path}: {type(error).__name__}: {error}") from error
        finally:
            if shown:
                bars.enable_progress_bar()
    return Source(module, (), kwargs, notes)


def _transformers_module(transformers: Any, config: Any, path: Path) -> tuple[nn.Module, tuple[str, ...]]:
    names = config.architectures or []
    if not names:
        kind = transformers.AutoModel
    elif (kind := getattr(transformers, names[0], None)) is None:
        raise InputError(
            f"hf:{path} asks for the class {names[0]}, which transformers {transformers.__version__} does not have; "
            "code that comes with a model is not run. Make it in a FILE.py:FACTORY"
        )
    weights = path.is_dir() and (any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")))
    if weights:
        return kind.from_pretrained(str(path), config=config, local_files_only=True, dtype=torch.float32), ()
    note = f"hf:{path} has random weights: there are none beside the configuration"
    return (kind.from_config(config) if not names else kind(config)), (note,)


def _transformers_inputs(config: Any, module: Any) -> dict[str, Any]:
    """Inputs by the modality that `main_input_name` says; empty where it is none of those known."""
    main = getattr(module, "main_input_name", "input_ids")
    vision = getattr(config, "vision_config", None) or config
    inputs: dict[str, Any] = {}
    if main == "input_ids":
        text = config.get_text_config()
        length = min(TOKENS, getattr(text, "max_position_embeddings", None) or TOKENS)
        tokens = torch.randint(0, text.vocab_size, (1, length))
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens.clone()
        if hasattr(config, "vision_config") and hasattr(config, "projection_dim"):  # two encoders, as in CLIP
            main = "pixel_values"
    if main == "pixel_values":
        size = getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        inputs["pixel_values"] = torch.randn(1, getattr(vision, "num_channels", 3), height, width)
    elif main == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        inputs["input_features"] = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(0, config.vocab_size, (1, TOKENS))
    elif main == "input_values" and hasattr(config, "conv_stride"):  # wave2vec and its relatives: a second of sound
        inputs["input_values"] = torch.randn(1, 16_000)
    elif main == "input_values" and hasattr(config, "num_mel_bins"):
        inputs["input_values"] = torch.randn(1, config.max_length, config.num_mel_bins)
    return inputs


_FACTORY = "a function that returns a module"


def _python(name: str, seed: int) -> Source:
    made = named.load(name, _FACTORY, seed)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise InputError(f"'{name}' is of type {type(made).__name__}, not {_FACTORY}")
        made = named.call(name, made)
    inputs: Any = ()
    if isinstance(made, tuple) and len(made) == 2:
        made, inputs = made
    if not isinstance(made, nn.Module):
        raise InputError(f"'{name}' returns {type(made).__name__}, not a module or (module, example inputs)")
    args, kwargs = example(inputs)
    return Source(made, args, kwargs)


def _exported(path: Path) -> Source:
    if not path.is_file():
        raise InputError(f"there is no file '{path}'")
    try:
        program = torch.export.load(path)
        module = program.module()
    except Exception as error:  # a damaged file fails in many ways
        raise InputError(f"'{path}' is not what torch.export.save writes: {type(error).__name__}: {error}") from error
    args, kwargs = program.example_inputs or ((), {})
    return Source(module, tuple(args), dict(kwargs))


def _directory(path: Path) -> Source:
    from fxprune.saved import PLAN, load_pruned

    if not (path / PLAN).exists() and (path / "config.json").exists():
        raise InputError(f"'{path}' was not saved by fxprune, but it has a config.json: did you mean hf:{path}?")
    saved = load_pruned(path)
    return Source(saved.module, saved.args, saved.kwargs)
