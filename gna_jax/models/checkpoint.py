"""Weights that others published, put into a model: reading the files, and a table from parameter to tensor.

Each model has its own table (`nat_checkpoint`, `flux_checkpoint`, ..); no key of any model stands here, and nothing is
downloaded.
"""

import dataclasses
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding

_INDEX = ".safetensors.index.json"
_PICKLES = (".pth", ".pth.tar", ".pt", ".bin")
_WRAPPERS = ("model", "state_dict", "state_dict_ema")
"""Under these keys training scripts store the tensors, beside optimizer states and step numbers."""
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes that weights are read in, by their names in safetensors."""
_SHOWN = 8
"""Keys that an error names before it only counts."""


class Checkpoint(Mapping[str, np.ndarray]):
    """Tensors by key, each read when it is asked for; made by `open_checkpoint`."""

    def __init__(
        self,
        name: str,
        readers: Mapping[str, Callable[[], np.ndarray]],
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, str],
    ):
        self.name = name
        self._readers = readers
        self._shapes = shapes
        self._dtypes = dtypes

    def __getitem__(self, key: str) -> np.ndarray:
        return self._readers[key]()

    def __contains__(self, key: object) -> bool:
        return key in self._readers  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of one tensor, without reading it."""
        return self._shapes[key]

    def dtype(self, key: str) -> str:
        """Name of one tensor's dtype, `bfloat16` say, without reading it."""
        return self._dtypes[key]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a `.safetensors` file, a folder or index of several, or a PyTorch `.pth`, `.pth.tar`, `.pt` or `.bin` file.

    Of a folder (as diffusers and transformers write them) the index is taken, or the only `.safetensors` file in it.
    PyTorch's files need torch, and are read with `weights_only=True`: nothing in them is executed. bfloat16 stays bfloat16.

    Raises:
      ValueError: a file of another kind, damaged, or with more than tensors; a folder without weights or with several.
      FileNotFoundError: nothing there, or a shard that the index names is missing.
      RuntimeError: safetensors, or torch for a PyTorch file, is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; give a file that exists")
    if path.name.endswith(_INDEX):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.name.endswith(_PICKLES):
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
    kinds: tuple[type[nnx.Variable], ...] = (nnx.Param,),
) -> None:
    """Put a checkpoint into a model, all of it or, where anything is wrong, nothing.

    A parameter keeps its dtype and its sharding. The model may be abstract (`nnx.eval_shape(lambda: Model(..))`): then
    a parameter is made here, and no memory is spent on initial values. Old values are kept until all new ones are there.

    Args:
      model: every variable of `kinds` in it gets a value.
      entries: by parameter, its path in the model joined by dots: `levels.0.blocks.1.attention.query.kernel`.
      ignored: keys of the file that may stay unused.
      kinds: of variables that the file holds.

    Raises:
      ValueError: parameters without an entry, keys that the file lacks or that nothing uses, shapes that differ, tensors that
        are not of floating point; an abstract model with more than these variables, such as the keys of dropout.
    """
    state = nnx.state(model, kinds)
    params = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(state)}
    _check_names(params, checkpoint, entries, ignored)
    _check_shapes(params, checkpoint, entries)
    _check_dtypes(checkpoint, entries)
    _check_the_rest(nnx.state(model, nnx.Not(kinds)))
    values = []  # all before the first one is set: reading may fail
    for path, param in params.items():
        entry = entries[path]
        old = param.get_value()
        new = jnp.asarray(entry.convert(*(checkpoint[key] for key in entry.sources)), old.dtype)
        sharding = getattr(old, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
            sharding = sharding.spec  # an abstract model names no devices: those of jax.set_mesh
        values.append(new if sharding is None else jax.device_put(new, sharding))
    for param, value in zip(params.values(), values, strict=True):
        param.set_value(value)
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


def _check_dtypes(checkpoint: Checkpoint, entries: Mapping[str, Entry]) -> None:
    """Tensors hold numbers that mean what they say: integers and 8-bit floats are of quantized weights."""
    keys = {key for entry in entries.values() for key in entry.sources}
    wrong = {key for key in keys if checkpoint.dtype(key) not in _FLOATS.values()}
    if wrong:
        raise ValueError(
            f"weights must be {', '.join(_FLOATS.values())}; got {_few(f'{k} of {checkpoint.dtype(k)}' for k in wrong)}"
            f" in {checkpoint.name}; quantized weights are not read, give those that they were made from"
        )


def _check_the_rest(state: Any) -> None:
    """What the file does not hold has a value."""
    bare = [
        ".".join(map(str, path))
        for path, variable in nnx.to_flat_state(state)
        if isinstance(variable.get_value(), jax.ShapeDtypeStruct)
    ]
    if bare:
        raise ValueError(
            f"a model made by nnx.eval_shape may hold nothing but what the checkpoint has; got {_few(bare)} without a value,"
            " random keys of dropout say; switch dropout off (drop_path=0.0), or make the model without nnx.eval_shape"
        )


def _few(keys: Any) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more if keys else "none"


def _weights_in(folder: Path) -> Path:
    """The one index of a folder, or its one `.safetensors` file."""
    found = sorted(folder.glob(f"*{_INDEX}")) or sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    others = [path for path in sorted(folder.iterdir()) if path.name.endswith(_PICKLES)]
    others += sorted({path.parent for path in folder.glob("*/*.safetensors")})
    raise ValueError(
        f"a folder must hold one {_INDEX} or one .safetensors file; got {[f.name for f in found]} in {folder};"
        f" give the file itself{f', or one of: {_few(map(str, others))}' if others else ''}"
    )


def _open_index(path: Path) -> Checkpoint:
    try:
        files = dict(json.loads(path.read_text())["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"an index is JSON with the shard of every key under weight_map; got {path} ({error!r}); download it again"
        ) from error
    names = sorted(set(files.values()))
    if missing := [name for name in names if not (path.parent / name).exists()]:
        raise FileNotFoundError(
            f"{path} names a shard that is not there: {_few(missing)}; download every shard into that folder"
        )
    shards = {name: _open_safetensors(path.parent / name) for name in names}
    if lost := [f"{key} in {name}" for key, name in files.items() if key not in shards[name]]:
        raise ValueError(
            f"every key of an index must be in its shard; {path} lacks {_few(lost)}; download index and shards together"
        )
    return Checkpoint(
        str(path),
        {key: shards[name]._readers[key] for key, name in files.items()},
        {key: shards[name].shape(key) for key, name in files.items()},
        {key: shards[name].dtype(key) for key, name in files.items()},
    )


def _open_safetensors(path: Path) -> Checkpoint:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise RuntimeError(
            "reading .safetensors needs the package safetensors, which is not installed;"
            " pip install 'gna-jax[models]'"
        ) from error
    try:
        file = safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole .safetensors file of {path.stat().st_size} bytes ({error}); download it again"
            " (some hundred bytes are a pointer of Git LFS: git lfs pull)"
        ) from error
    keys = list(file.keys())
    readers = {key: lambda key=key: file.get_tensor(key) for key in keys}
    slices = {key: file.get_slice(key) for key in keys}
    shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
    dtypes = {key: str(part.get_dtype()) for key, part in slices.items()}
    return Checkpoint(
        str(path), readers, shapes, {key: _FLOATS.get(name, name) for key, name in dtypes.items()}
    )


def _open_pickle(path: Path) -> Checkpoint:
    try:
        import torch  # pyright: ignore[reportMissingImports] # no requirement: for PyTorch files alone
    except ImportError as error:
        raise RuntimeError(
            f"{path.suffix} files are PyTorch's, and torch is not installed;"
            " pip install torch, or save the checkpoint as .safetensors"
        ) from error
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"a PyTorch file must hold tensors and nothing that reading would have to execute; got {path} with"
            f" {found[1] if found else 'a pickle of something else'}; if you trust it, save its tensors alone:"
            " torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pth'), with the key that it has"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{path} of {path.stat().st_size} bytes is damaged or was not written by torch.save ({error!r});"
            " download it again"
        ) from error
    tensors = _tensors_of(stored, path)
    return Checkpoint(
        str(path),
        {key: lambda tensor=tensor: _as_numpy(tensor) for key, tensor in tensors.items()},
        {key: tuple(tensor.shape) for key, tensor in tensors.items()},
        {key: str(tensor.dtype).removeprefix("torch.") for key, tensor in tensors.items()},
    )


def _tensors_of(stored: Any, path: Path) -> Mapping[str, Any]:
    """The mapping of tensors in what a training script saved."""
    while isinstance(stored, Mapping) and (
        wrapper := next((n for n in _WRAPPERS if isinstance(stored.get(n), Mapping)), None)
    ):
        stored = stored[wrapper]
    told = f"a PyTorch file must hold tensors by key, at its top or under {', '.join(_WRAPPERS)}"
    if not isinstance(stored, Mapping):
        raise ValueError(f"{told}; got a {type(stored).__name__} in {path}; save a state_dict")
    if others := {str(key) for key, value in stored.items() if not hasattr(value, "detach")}:
        raise ValueError(
            f"{told}; got something else under {_few(others)} in {path}; save the state_dict alone"
        )
    return stored


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
