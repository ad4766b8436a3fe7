"""Save compiled code to a file, for another process or another machine of the same kind.

    hidrop.save_compiled(model, "llava.hidrop")         # after some calls compiled it

    hidrop.compile(model, schedule)                     # elsewhere
    hidrop.load_compiled(model, "llava.hidrop")         # before the first call
    model.generate(**inputs)                            # traces, and compiles nothing

On one machine PyTorch's cache directory serves the same purpose without a file. PyTorch's key of an
artifact is made from the graph itself: another schedule, or a pass that rewrites differently, gives
another graph, and finds no code rather than the wrong one.

The file is a zip archive of `header.json`, PyTorch's cache artifacts, and the shared libraries that
Inductor built for the CPU, which the artifacts leave out.
"""

import hashlib
import json
import logging
import os
import platform
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import hidrop_fx.passes as passes
import hidrop_fx.version as version
from hidrop_fx.capture.layers import embedding_table, text_decoder
from hidrop_fx.capture.placement import home
from hidrop_fx.errors import HidropError
from hidrop_fx.pipeline.custom_passes import names_of, sources_of
from hidrop_fx.runtime.hf.binding import require_runtime
from hidrop_fx.runtime.runtime import Runtime

logger = logging.getLogger("hidrop_fx")

FORMAT = 2
_HEADER, _ARTIFACTS, _LIBRARIES = "header.json", "artifacts", "libraries"
# Names that Inductor gives to libraries; nothing else is extracted from an archive.
_LIBRARY_NAME = re.compile(r"c[a-z2-7]{50,60}(\.[a-z]+)?\.so")
# Occurs in the sources of Inductor's probes for instruction sets.
_PROBE = "_chk_kernel"

# Header fields that must be equal, with the remedy: a difference means that the file is the wrong one.
_REQUIRED = {
    "model": "load the file into the model that it was saved from",
    "schedule": "compile the model with that schedule first",
    "options": "compile the model with those options first",
    "passes": "compile the model with those passes first",
    "device": "move the model there, or save a file from a model on this device",
}


def save_compiled(model: object, path: str | Path) -> None:
    """Write the code that was compiled for a model, and a header of all that must match to load it.

    PyTorch keeps one record of compiled code a process, and all of it is written: if several models
    were compiled, the file holds the code of all. Weights are not in it.

    Args:
        model: a compiled model that was called.
        path: the file, replaced if it exists; its directory must exist.

    Raises:
        HidropError: the model is not compiled, its backend generates no code, no call compiled
            anything yet, or PyTorch's caches are off.
    """
    runtime = _runtime(model, "there is no compiled code to save")
    if not runtime.programs.log.entries:
        raise HidropError(
            "nothing is compiled yet: compilation happens at the first calls. Call the model once as "
            "you will use it (e.g. generate), then save"
        )
    found = torch.compiler.save_cache_artifacts()
    if found is None:
        raise HidropError(
            "PyTorch recorded no compiled code, so its caches are off; unset "
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES, TORCHINDUCTOR_FX_GRAPH_CACHE and "
            "TORCHINDUCTOR_AUTOGRAD_CACHE, and compile in a new process"
        )
    artifacts, _ = found
    if Path(path).is_dir():
        raise HidropError(f"{path} is a directory; name a file in it")
    header = {"format": FORMAT, **_identity(runtime), **_environment(runtime)}
    libraries = list(_libraries())
    _write(Path(path), header, artifacts, libraries)
    logger.info(
        "saved compiled code, %d bytes and %d libraries: %s", len(artifacts), len(libraries), path
    )


def load_compiled(model: object, path: str | Path) -> bool:
    """Load code that `save_compiled` wrote into PyTorch's caches.

    Call it between `compile` and the first call. A call of a kind that was not saved compiles as
    usual. The file is code, and PyTorch unpickles part of it: load only what you trust.

    Args:
        model: a compiled model.
        path: the file.

    Returns:
        True if the code was loaded. False, with a log line that names both values, if versions,
        sources or hardware differ from those in the header: the model then compiles again, slower
        at first and never wrong.

    Raises:
        HidropError: the file is damaged or of another format, or it belongs to another model,
            schedule, set of options, or kind of device.
    """
    runtime = _runtime(model, "call hidrop.compile(model, schedule) before loading its code")
    if runtime.programs.log.entries:
        logger.warning(
            "this model has been called, and compiled code for it: what is loaded now serves other "
            "calls alone. Load before the first call"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            header = json.loads(archive.read(_HEADER))
            if not _fits(header, runtime, path):
                return False
            if torch.compiler.load_cache_artifacts(archive.read(_ARTIFACTS)) is None:
                raise HidropError(f"PyTorch cannot read the code in {path}; save it anew")
            for name in archive.namelist():
                _place_library(name, archive)
    except FileNotFoundError as error:
        raise HidropError(f"{path} does not exist; write it with hidrop.save_compiled") from error
    except IsADirectoryError as error:
        raise HidropError(f"{path} is a directory; name the file in it") from error
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise HidropError(
            f"{path} is damaged, or not written by hidrop.save_compiled ({error}); save it anew"
        ) from error
    logger.info("loaded compiled code from %s", path)
    return True


# The header.


def _fits(header: Any, runtime: Runtime, path: str | Path) -> bool:
    """Return True if code with this header fits a model here; log why not.

    Raises:
        HidropError: the file is of another format, or belongs to another model.
    """
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise HidropError(
            f"{path} has format {found!r}, this version of hidrop_fx reads {FORMAT}; save it anew"
        )
    for name, here in _identity(runtime).items():
        if header.get(name) != here:
            raise HidropError(
                f"{path} was saved with {name} {header.get(name)!r}, here it is {here!r}; "
                f"{_REQUIRED[name]}"
            )
    current = _environment(runtime)
    differing = [name for name in current if header.get(name) != current[name]]
    if differing:
        logger.warning(
            "%s is not loaded, the model compiles again: it was saved with %s. Save it anew",
            path,
            "; ".join(f"{n} {header.get(n)!r}, here {current[n]!r}" for n in differing),
        )
    return not differing


def _identity(runtime: Runtime) -> dict[str, str]:
    """Return the header fields of `_REQUIRED`."""
    config = runtime.model.config.get_text_config()
    weight = embedding_table(text_decoder(runtime.model))
    options = runtime.options
    return {
        "model": f"{type(runtime.model).__name__} over {type(text_decoder(runtime.model)).__name__}, "
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, {config.num_key_value_heads} of keys, {weight.dtype}",
        "schedule": _schedules(runtime),
        "options": f"backend={options.backend!r}, lowering={options.lowering!r}, attention={options.attention!r}, "
        f"activation_memory_budget={options.activation_memory_budget!r}",
        "passes": names_of(options.passes),
        "device": _devices(runtime),
    }


def _devices(runtime: Runtime) -> str:
    """Return the kind of device that a model is on, or each of those that its text decoder computes on."""
    placement = runtime.programs.store.placement
    return home(text_decoder(runtime.model)).type if placement is None else str(placement)


def _schedules(runtime: Runtime) -> str:
    """Return the schedules of a model, with their names where it has several."""
    named = {p.name: str(p.schedule) for p in runtime.peers if p.name is not None}
    if len(named) < 2:
        return next(iter(named.values()), str(runtime.schedule))
    return "; ".join(f"{name}: {schedule}" for name, schedule in named.items())


def _environment(runtime: Runtime) -> dict[str, str]:
    """Return header fields that may change without the caller's doing: a difference costs a compilation."""
    return {
        "hidrop_fx": version.__version__,
        "sources": _source_hash(),
        "pass sources": sources_of(runtime.options.passes),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "hardware": _hardware(home(text_decoder(runtime.model))),
    }


@cache
def _source_hash() -> str:
    """Return a digest of every module of hidrop_fx, its passes included."""
    digest = hashlib.sha256()
    for name, file in _sources().items():
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _sources() -> dict[str, Path]:
    """Return the modules of hidrop_fx and of its passes, by path relative to the package."""
    roots = (Path(str(version.__file__)).parent, Path(str(passes.__file__)).parent)
    files = ((root, file) for root in roots for file in sorted(root.rglob("*.py")))
    return {f"{root.name}/{file.relative_to(root)}": file for root, file in files}


def _hardware(device: torch.device) -> str:
    """Return the hardware that code is generated for, CPU flags included: libraries are built for them."""
    host = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_cpu_flags()}"
    if device.type != "cuda":
        return host
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{host}, {torch.cuda.get_device_name(device)} sm_{major}{minor} CUDA {torch.version.cuda}"
    )


@cache
def _cpu_flags() -> str:
    """Return a digest of the instruction sets; the processor's name if the system does not list them."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    flags = next((x.split(":", 1)[1] for x in lines if x.startswith(("flags", "Features"))), "")
    if not flags:
        return platform.processor()
    return hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:16]


# The archive.


def _write(path: Path, header: dict[str, Any], artifacts: bytes, libraries: list[Path]) -> None:
    """Write the archive atomically."""
    if not path.parent.is_dir():
        raise HidropError(f"{path.parent} is no directory; make it, or save elsewhere")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            archive.writestr(_HEADER, json.dumps(header, indent=2))
            archive.writestr(_ARTIFACTS, artifacts, zipfile.ZIP_DEFLATED)
            for library in libraries:
                archive.write(library, f"{_LIBRARIES}/{library.name}", zipfile.ZIP_DEFLATED)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _libraries() -> Iterator[Path]:
    """Yield the libraries that Inductor built for the CPU and that this process loaded."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    directory = Path(cache_dir()).resolve()
    for module in list(sys.modules.values()):
        origin = getattr(getattr(module, "__spec__", None), "origin", None)
        if isinstance(origin, str) and _LIBRARY_NAME.fullmatch(Path(origin).name):
            library = Path(origin).resolve()
            if directory in library.parents and library.is_file():
                yield library
    # Probes for the instruction sets of compiler and CPU; building them takes seconds.
    for library in directory.glob("*/c*.so"):
        source = library.with_suffix(".cpp")
        plain = library.name.count(".") == 1 and _LIBRARY_NAME.fullmatch(library.name)
        if plain and source.is_file() and _PROBE in source.read_text():
            yield library


def _place_library(name: str, archive: zipfile.ZipFile) -> None:
    """Extract a library to where Inductor looks before it builds: its name hashes source and flags."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder, _, file = name.partition("/")
    if folder != _LIBRARIES or not _LIBRARY_NAME.fullmatch(file):
        return
    place = Path(cache_dir()) / file[1:3] / file
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=place.parent)
    with os.fdopen(handle, "wb") as out:
        out.write(archive.read(name))
    Path(temporary).chmod(0o755)
    Path(temporary).replace(place)


def _runtime(model: object, consequence: str) -> Runtime:
    runtime = require_runtime(model, consequence)
    if runtime.options.backend != "inductor":
        raise HidropError(
            f"backend={runtime.options.backend!r} generates no code to keep; "
            'compile the model with backend="inductor"'
        )
    return runtime
