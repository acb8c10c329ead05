"""Weights that others published, put into a model: reading the files, and a table from parameter to tensor.

Each model has its own table (`nat_checkpoint`, `flux_checkpoint`, ..); no key of any model stands here, and nothing is
downloaded.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

_INDEX = ".safetensors.index.json"
_PICKLES = (".pth", ".pt", ".bin")
_WRAPPERS = ("model", "state_dict", "state_dict_ema")
"""Under these keys training scripts store the tensors, beside optimizer states and step numbers."""
_SHOWN = 8
"""Keys that an error names before it only counts."""


class Checkpoint(Mapping[str, np.ndarray]):
    """Tensors by key, each read when it is asked for; made by `open_checkpoint`."""

    def __init__(self, name: str, readers: Mapping[str, Callable[[], np.ndarray]], shapes: Mapping):
        self.name = name
        self._readers = readers
        self._shapes = shapes

    def __getitem__(self, key: str) -> np.ndarray:
        return self._readers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of one tensor, without reading it."""
        return self._shapes[key]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a `.safetensors` file, a folder or index of several, or a PyTorch `.pth`, `.pt` or `.bin` file.

    Of a folder (as diffusers and transformers write them) the index is taken, or the only `.safetensors` file in it.
    PyTorch's files need torch, and are read with `weights_only=True`: nothing in them is executed. bfloat16 stays bfloat16.

    Raises:
      ValueError: a file of another kind, or a folder without weights or with several.
      FileNotFoundError: nothing there, or a shard that the index names is missing.
      RuntimeError: safetensors, or torch for a PyTorch file, is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; give a file that exists")
    if path.name.endswith(_INDEX):
        files = json.loads(path.read_text())["weight_map"]
        shards = {name: _open_safetensors(path.parent / name) for name in set(files.values())}
        readers = {key: shards[name]._readers[key] for key, name in files.items()}
        return Checkpoint(str(path), readers, {k: shards[n].shape(k) for k, n in files.items()})
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in _PICKLES:
        return _open_pickle(path)
    raise ValueError(
        f"a checkpoint is a .safetensors file, its {_INDEX}, a folder of these, or one of {', '.join(_PICKLES)};"
        f" got {path.name}"
    )


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter as a function of tensors of the checkpoint: `convert(tensor of sources[0], ..)`.

    `convert` is traced for its shape first, so it uses array methods and `jax.numpy`.
    """

    sources: tuple[str, ...]
    convert: Callable[..., Any]


def same(key: str) -> Entry:
    """The tensor as it is."""
    return Entry((key,), lambda tensor: tensor)


def linear(key: str) -> Entry:
    """Kernel [in, out] of PyTorch's `Linear.weight` [out, in]."""
    return Entry((key,), lambda weight: weight.T)


def conv(key: str) -> Entry:
    """Kernel [*window, in, out] of PyTorch's `Conv*d.weight` [out, in, *window]."""
    return Entry((key,), lambda weight: weight.transpose(*range(2, weight.ndim), 1, 0))


def linear_heads(key: str, heads: int) -> Entry:
    """Kernel [in, heads, head_dim] of `Linear.weight` [heads * head_dim, in]."""
    return Entry((key,), lambda weight: weight.T.reshape(weight.shape[1], heads, -1))


def bias_heads(key: str, heads: int) -> Entry:
    """Bias [heads, head_dim] of `Linear.bias` [heads * head_dim]."""
    return Entry((key,), lambda bias: bias.reshape(heads, -1))


def linear_out(key: str, heads: int) -> Entry:
    """Kernel [heads, head_dim, out] of `Linear.weight` [out, heads * head_dim]."""
    return Entry((key,), lambda weight: weight.T.reshape(heads, -1, weight.shape[0]))


def load_parameters(
    model: nnx.Module,
    checkpoint: Checkpoint,
    entries: Mapping[str, Entry],
    ignored: Callable[[str], bool] = lambda key: False,
) -> None:
    """Put a checkpoint into a model, all of it or, where anything is wrong, nothing.

    A parameter keeps its dtype and its sharding. The model may be abstract (`nnx.eval_shape(lambda: Model(..))`): then
    a parameter is made here, and no memory is spent on initial values.

    Args:
      model: every `nnx.Param` of it gets a value.
      entries: by parameter, its path in the model joined by dots: `levels.0.blocks.1.attention.query.kernel`.
      ignored: keys of the file that may stay unused.

    Raises:
      ValueError: parameters without an entry, keys that the file lacks or that nothing uses, shapes that differ.
    """
    state = nnx.state(model, nnx.Param)
    params = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(state)}
    _check_names(params, checkpoint, entries, ignored)
    _check_shapes(params, checkpoint, entries)
    for path, param in params.items():
        entry = entries[path]
        old = param.get_value()
        new = jnp.asarray(entry.convert(*(checkpoint[key] for key in entry.sources)), old.dtype)
        sharding = getattr(old, "sharding", None)
        param.set_value(new if sharding is None else jax.device_put(new, sharding))
    nnx.update(model, state)


def _check_names(
    params: Mapping[str, Any],
    checkpoint: Checkpoint,
    entries: Mapping[str, Entry],
    ignored: Callable[[str], bool],
) -> None:
    """Every parameter has an entry and every entry a parameter; every key is there and used."""
    if params.keys() != entries.keys():
        raise ValueError(
            "every parameter of the model needs an entry and the other way round;"
            f" got no entry for {_few(params.keys() - entries.keys())},"
            f" no parameter for {_few(entries.keys() - params.keys())}"
        )
    wanted = {key for entry in entries.values() for key in entry.sources}
    missing = wanted - checkpoint.keys()
    unused = {key for key in checkpoint.keys() - wanted if not ignored(key)}
    if missing or unused:
        raise ValueError(
            f"{checkpoint.name} is not a checkpoint of this model: the file must hold exactly the model's keys;"
            f" got {len(missing)} missing: {_few(missing)}; {len(unused)} that nothing uses: {_few(unused)};"
            " make the model in the size and with the options of the checkpoint"
        )


def _check_shapes(
    params: Mapping[str, Any], checkpoint: Checkpoint, entries: Mapping[str, Entry]
) -> None:
    """Every converted tensor has its parameter's shape; none is read for this."""
    for path, entry in entries.items():
        shapes = [checkpoint.shape(key) for key in entry.sources]
        told = ", ".join(f"{key} {shape}" for key, shape in zip(entry.sources, shapes, strict=True))
        want = params[path].get_value().shape
        try:
            dummies = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
            got = jax.eval_shape(entry.convert, *dummies).shape
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{checkpoint.name} is of another size than the model: {told} cannot become parameter {path} {want};"
                f" make the model in the size of the checkpoint ({error})"
            ) from error
        if got != want:
            raise ValueError(
                f"{checkpoint.name} is of another size than the model: {told} would become parameter {path} {got};"
                f" the model's is {want}; make the model in the size of the checkpoint"
            )


def _few(keys: Any) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more if keys else "none"


def _weights_in(folder: Path) -> Path:
    """The one index of a folder, or its one `.safetensors` file."""
    found = sorted(folder.glob(f"*{_INDEX}")) or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(
            f"a folder must hold one {_INDEX} or one .safetensors file; got {[f.name for f in found]} in {folder};"
            " give the file itself"
        )
    return found[0]


def _open_safetensors(path: Path) -> Checkpoint:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise RuntimeError(
            "reading .safetensors needs the package safetensors, which is not installed;"
            " pip install 'gna-jax[models]'"
        ) from error
    if not path.exists():
        raise FileNotFoundError(f"the index names a shard that is not there: {path}")
    file = safe_open(path, framework="np")
    keys = list(file.keys())
    readers = {key: lambda key=key: file.get_tensor(key) for key in keys}
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    return Checkpoint(str(path), readers, shapes)


def _open_pickle(path: Path) -> Checkpoint:
    try:
        import torch  # pyright: ignore[reportMissingImports] # no requirement: for PyTorch files alone
    except ImportError as error:
        raise RuntimeError(
            f"{path.suffix} files are PyTorch's, and torch is not installed;"
            " pip install torch, or save the checkpoint as .safetensors"
        ) from error
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    while wrapper := next((name for name in _WRAPPERS if _holds_tensors(tensors, name)), None):
        tensors = tensors[wrapper]
    readers = {key: lambda tensor=tensor: _as_numpy(tensor) for key, tensor in tensors.items()}
    return Checkpoint(str(path), readers, {key: tuple(t.shape) for key, t in tensors.items()})


def _holds_tensors(stored: Mapping[str, Any], name: str) -> bool:
    return isinstance(stored.get(name), Mapping)


def _as_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor's values; numpy has bfloat16 from ml_dtypes, torch does not know of it."""
    tensor = tensor.detach().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":
        import torch  # pyright: ignore[reportMissingImports] # no requirement: for PyTorch files alone

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def count_parameters(model: nnx.Module) -> int:
    """Numbers in all parameters of a model, abstract or real."""
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(math.prod(param.shape) for param in params)
