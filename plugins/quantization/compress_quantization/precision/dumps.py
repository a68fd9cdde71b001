"""Files for people who want to look at what a search has measured, and files of traces computed before."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress_core import ConfigError
from compress_core.data.ranks import exchange, number_of_ranks
from compress_core.errors import FileError
from compress_core.files import replaced_file
from compress_quantization.precision.search import PrecisionSearch


def dump(search: PrecisionSearch, files: Mapping[str, Any]) -> dict[str, str]:
    """Writes values as JSON files into the folder `dump_path`, if the config asks for it, and returns the effects.

    Of several processes, the first writes.

    Args:
        search: The search.
        files: Name of the file without its ending -> JSON-able values.

    Raises:
        ConfigError: The folder cannot be made.
        FileError: A file cannot be written.
    """
    if not search.config.dump_init_precision_data:
        return {}
    folder = search.config.dump_path
    if folder is None:
        return {"dump_init_precision_data": "no effect: dump_path names no folder, so nothing is written"}
    is_first = number_of_ranks() == 1 or torch.distributed.get_rank() == 0
    if is_first:
        target = Path(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"'{folder}' cannot be made a folder: {error}", path=f"{search.path}.dump_path"
            ) from error
        for name, values in files.items():
            with replaced_file(target / f"{name}.json") as file:
                file.write((json.dumps(values, indent=1) + "\n").encode())
    written = ", ".join(f"{name}.json" for name in files)
    return {"dump_init_precision_data": f"wrote {written}", "dump_path": f"holds {written}"}


def agreed(bits: Mapping[str, int]) -> dict[str, int]:
    """Returns what process 0 has chosen: others may have measured errors that differ by roundings."""
    return dict(bits) if number_of_ranks() == 1 else dict(exchange("numbers of bits", dict(bits))[0])


def read_traces(path: str, names: Sequence[str], where: str) -> list[float]:
    """Returns the traces in a file: one for each weight, in the order in which the forward uses the weights.

    Nothing in the file is executed: .npy files are read without pickle, others as JSON or with torch's safe loader.

    Args:
        path: A .npy file, a .json file with a list or an object with an entry for each weight, or a tensor that
            torch.save wrote.
        names: Names of the quantizers of the weights.
        where: Path of the value in the config, for messages.

    Raises:
        ConfigError: The file cannot be read, or does not have a finite number for each weight.
    """
    try:
        values = _read(path)
    except (OSError, ValueError, RuntimeError, FileError, EOFError, TypeError) as error:
        raise ConfigError(f"'{path}' holds no traces: {str(error).splitlines()[0]}", path=where) from error
    except Exception as error:  # what torch's safe loader raises for pickled objects
        raise ConfigError(
            f"'{path}' is not read, because it holds more than tensors ({type(error).__name__}); write the traces with "
            "numpy.save or as JSON",
            path=where,
        ) from error
    if isinstance(values, Mapping):
        absent = [name for name in names if name not in values]
        if absent or len(values) != len(names):
            what = f"lacks '{absent[0]}'" if absent else "names weights that are not chosen for"
            raise ConfigError(f"'{path}' {what}; it must have the entries {list(names)}", path=where)
        values = [values[name] for name in names]
    traces = np.asarray(values)
    if traces.dtype.kind not in "fiu" or traces.shape != (len(names),) or not np.isfinite(traces).all():
        shape = f"an array of shape {list(traces.shape)} and type {traces.dtype}"
        raise ConfigError(
            f"'{path}' holds {shape}; it must hold {len(names)} finite numbers, one for each of {list(names)}",
            path=where,
        )
    return [float(value) for value in traces]


def _read(path: str) -> Any:
    if path.endswith(".npy"):
        return np.load(path, allow_pickle=False)
    if path.endswith(".json"):
        return json.loads(Path(path).read_text("utf-8"))
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(loaded, torch.Tensor):
        return loaded.detach().double().numpy()
    return loaded
