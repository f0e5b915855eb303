"""Converts official PyTorch checkpoints of TarFlow and iTARFlow to Flax variables and back.

The official codes (github.com/apple/ml-tarflow and ml-itarflow) store linear weights as [out, in]
and patches in (channel, row, column) order. Here, kernels are [in, out] and patches are in (row,
column, channel) order. The tables `_BLOCK`, `_NOISE` and `_LAYER` define the mapping: loading reads
them from left to right, saving from right to left.
"""

import collections
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from tarflow_jax import files, json_files, paths, torch_file, wrong_files
from tarflow_jax.flow.flow import Flow, TarFlow, Variables, field_defaults

# Official name, our path, and the axes of both, named as in `_sizes`. Axes in parentheses are
# merged. TarFlow's code registers the layers as `blocks.B.attn_blocks.L`, iTARFlow's as
# `blocks.B.head_blocks.L`; here they are stacked along a leading axis.
_BLOCK = (
    ('pos_embed', 'position_embedding', 'T W', 'T W'),
    ('class_embed', 'class_embedding', 'N one W', '(N one) W'),
    ('proj_in.weight', 'proj_in/kernel', 'W (C row col)', '(row col C) W'),
    ('proj_in.bias', 'proj_in/bias', 'W', 'W'),
    ('proj_out.weight', 'proj_out/kernel', '(half C row col) W', 'W (half row col C)'),
    ('proj_out.bias', 'proj_out/bias', '(half C row col)', '(half row col C)'),
)
# Additional tensors of noise-conditioned flows.
_NOISE = (
    ('time_embed.mlp.0.weight', 'noise_embedding/mlp_in/kernel', 'F W', 'W F'),
    ('time_embed.mlp.0.bias', 'noise_embedding/mlp_in/bias', 'F', 'F'),
    ('time_embed.mlp.2.weight', 'noise_embedding/mlp_out/kernel', 'W F', 'F W'),
    ('time_embed.mlp.2.bias', 'noise_embedding/mlp_out/bias', 'W', 'W'),
)
_LAYER = (
    ('attention.norm.weight', 'attention_norm/scale', 'W', 'W'),
    ('attention.norm.bias', 'attention_norm/bias', 'W', 'W'),
    ('attention.qkv.weight', 'qkv/kernel', '(qkv H K) W', 'W qkv H K'),
    ('attention.qkv.bias', 'qkv/bias', '(qkv H K)', 'qkv H K'),
    ('attention.proj.weight', 'attention_proj/kernel', 'W (H K)', 'H K W'),
    ('attention.proj.bias', 'attention_proj/bias', 'W', 'W'),
    ('mlp.norm.weight', 'mlp_norm/scale', 'W', 'W'),
    ('mlp.norm.bias', 'mlp_norm/bias', 'W', 'W'),
    ('mlp.main.0.weight', 'mlp_in/kernel', 'F W', 'W F'),
    ('mlp.main.0.bias', 'mlp_in/bias', 'F', 'F'),
    ('mlp.main.2.weight', 'mlp_out/kernel', 'W F', 'F W'),
    ('mlp.main.2.bias', 'mlp_out/bias', 'W', 'W'),
)
_PRIOR = ('var', 'prior/variance', 'T (C row col)', 'T (row col C)')

# No shape depends on head_dim. The official model always uses 64; files written here record it.
_OFFICIAL_HEAD_DIM = '64'
_CLASS_NAMES = 'class_names'
_DIGEST = 'sha256'
_MAX_NAMED = 10


class _Row(NamedTuple):
    """One official tensor and its leaf, or entry `layer` of a stacked leaf."""

    official: str
    path: str
    official_axes: str
    axes: str
    layer: int | None = None


def load_official(path: str | os.PathLike[str], model: TarFlow) -> dict[str, Any]:
    """Loads the variables of `model` from a checkpoint of the official PyTorch code, without torch.

    Args:
      path: the `.pth` file of the official training script (a state dict), or a `.safetensors`
        file of the same tensors, such as `save_official` writes.
      model: the `TarFlow` of the checkpoint.
    Returns:
      `{'params': ...}`, and `'prior'` for volume-preserving models: the tree of `model.init`, as
      float32 NumPy arrays.
    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file cannot be read, or if a tensor is missing, is unknown, has a wrong
        shape or dtype, is not finite, or (attention masks, prior variance) has values that the
        model cannot represent.
    """
    path = paths.local_copy(path)
    _check_representable(model)
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist; pass the path of an official checkpoint.')
    if not path.is_file():
        what = wrong_files.described(path) or 'is not a file'
        raise ValueError(f'{path} {what}; pass the path of an official checkpoint.')
    if path.suffix == '.safetensors':
        tensors, head_dim = _read_safetensors(path)
    elif path.suffix in ('.pth', '.pt'):
        tensors, head_dim = torch_file.read_torch_file(path), _OFFICIAL_HEAD_DIM
    else:
        what = wrong_files.described(path) or f'ends with {path.suffix!r}'
        raise ValueError(f'{path} {what}; pass a .pth or a .safetensors checkpoint.')
    tensors = _without_prefix(tensors)

    _check_kind(path, model, tensors)
    rows, sizes, buffers = _rows(model), _sizes(model), _buffers(model)
    shapes = {row.official: _shape(row.official_axes, sizes) for row in rows}
    shapes |= {name: buffer.shape for name, buffer in buffers.items()}
    problems = _problems(tensors, shapes, buffers)
    if head_dim != str(model.head_dim):
        problems.insert(0, f'it was trained with head_dim {head_dim:.20}, not {model.head_dim}')
    _refuse(path, model, problems)

    leaves = collections.defaultdict(list)
    for row in rows:
        tensor = tensors[row.official]
        leaves[row.path].append(_rearrange(tensor, row.official_axes, row.axes, sizes))
    stacked = {row.path for row in rows if row.layer is not None}
    copies = {
        leaf: np.array(entries if leaf in stacked else entries[0], order='C')
        for leaf, entries in leaves.items()
    }
    return traverse_util.unflatten_dict(copies, sep='/')


def class_names(path: str | os.PathLike[str]) -> list[str] | None:
    """Reads the class names that `save_official` stored in a file; None if there are none.

    The official code stores none; it numbers classes by sorted name.

    Raises:
      ValueError: if the stored value is not a list of names.
    """
    if Path(path).suffix != '.safetensors':
        return None
    with safetensors.safe_open(paths.local_copy(path), framework='numpy') as file:
        text = (file.metadata() or {}).get(_CLASS_NAMES)
    if text is None:
        return None
    try:
        return json_files.parse(text, [str])
    except json_files.Damaged:
        raise ValueError(
            f'{path}: {_CLASS_NAMES} is {text[:60]!r}, not a list of names; save it again.'
        ) from None


def save_official(
    variables: Variables, model: TarFlow, path: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
) -> None:
    """Writes the variables under their official names, for `load_state_dict` of the official model.

    In PyTorch: `model.load_state_dict(safetensors.torch.load_file(path))`. The official model needs
    the same number of layers in every block and heads of 64 channels. It rejects uneven blocks, and
    silently computes wrong results with other heads. `load_official` reads both back unchanged. The
    file is written atomically.

    Args:
      variables: the tree of `model.init`, as float32 NumPy or JAX arrays.
      model: the `TarFlow` of the variables.
      path: path of the file, which must end with `.safetensors`; an existing file is replaced.
      class_names: class names by label to store in the file; None for none.
    Raises:
      FileNotFoundError: if the folder of `path` does not exist.
      ValueError: if `path` has another suffix, or if a leaf is missing, is unknown, has a wrong
        shape or dtype, or is not finite.
    """
    path = paths.of(path)
    _check_representable(model)
    if path.suffix != '.safetensors':
        raise ValueError(f'{path} ends with {path.suffix!r}; choose a name ending in .safetensors.')
    if not paths.can_hold_files(path.parent):
        raise FileNotFoundError(f'the folder {path.parent} does not exist; create it first.')

    rows, sizes = _rows(model), _sizes(model)
    depths = collections.Counter(row.path for row in rows if row.layer is not None)
    shapes = {}
    for row in rows:
        stack = () if row.layer is None else (depths[row.path],)
        shapes[row.path] = stack + _shape(row.axes, sizes)
    if not isinstance(variables, Mapping):
        kind = type(variables).__name__
        raise ValueError(f'variables is a {kind}; pass the dict that model.init returns.')
    flat = traverse_util.flatten_dict(variables)
    leaves = {'/'.join(map(str, keys)): np.asarray(leaf) for keys, leaf in flat.items()}
    _refuse('the tree of variables', model, _problems(leaves, shapes, {}))

    tensors = _buffers(model)
    for row in rows:
        leaf = leaves[row.path] if row.layer is None else leaves[row.path][row.layer]
        tensor = _rearrange(leaf, row.axes, row.official_axes, sizes)
        tensors[row.official] = np.ascontiguousarray(tensor)
    metadata = {'head_dim': str(model.head_dim)}
    if class_names is not None:
        metadata[_CLASS_NAMES] = json.dumps(list(class_names))
    metadata[_DIGEST] = _digest(tensors, metadata)
    data = safetensors.numpy.save(tensors, metadata=metadata)
    with files.replacing(path) as file:  # safetensors would make it readable by its owner only
        file.write(data)


def _without_prefix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the prefixes of wrapped models from tensor names.

    DistributedDataParallel adds `module.`, torch.compile adds `_orig_mod.`; there may be both.
    """
    for prefix in ('module.', '_orig_mod.') * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _check_representable(model: Flow) -> None:
    """Raises ValueError if the official codes do not support the flow."""
    if not isinstance(model, TarFlow):
        raise ValueError(
            f'the model is a {type(model).__name__}, but official checkpoints are for images; pass '
            'a TarFlow.'
        )
    defaults = field_defaults(model)
    for field in ('num_features', 'orders', 'scale', 'scale_limit', 'first_token'):
        if getattr(model, field) != defaults[field]:
            raise ValueError(
                f'{field} {getattr(model, field)!r:.100} is not supported by official checkpoints; '
                f'they need {defaults[field]!r}.'
            )
    if len(set(model.patch_shape)) > 1 or len(set(model.image_shape[:2])) > 1:
        raise ValueError(
            f'image_size {model.image_size} and patch_size {model.patch_size} are not supported by '
            'official checkpoints; their images and patches are square.'
        )


def _check_kind(path: Path, model: TarFlow, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if an iTARFlow is loaded from a TarFlow's checkpoint, or the reverse."""
    conditioned = any('.time_embed.' in name for name in tensors)
    if tensors and conditioned != model.noise_conditioned:
        there, noise = ('an iTARFlow', 'levels') if conditioned else ('a TarFlow', 'gaussian')
        raise ValueError(
            f'{path} has {there}, but the model has noise_conditioned {model.noise_conditioned}; '
            f"set it to {conditioned}, and in a config set train.noise to '{noise}' too."
        )


def _rows(model) -> list[_Row]:
    """Lists all tensors of the official state dict except `_buffers`."""
    rows = [_Row(*_PRIOR)] if model.volume_preserving else []
    layers = 'head_blocks' if model.noise_conditioned else 'attn_blocks'
    for b, num_layers in enumerate(model.layers_per_block):
        for official, path, theirs, ours in _BLOCK + _NOISE * model.noise_conditioned:
            if official != 'class_embed' or model.num_classes:
                official, path = f'blocks.{b}.{official}', f'params/block_{b}/{path}'
                rows.append(_Row(official, path, theirs, ours))
        for i in range(num_layers):
            for official, path, theirs, ours in _LAYER:
                official = f'blocks.{b}.{layers}.{i}.{official}'
                rows.append(_Row(official, f'params/block_{b}/layers/{path}', theirs, ours, i))
    return rows


def _buffers(model) -> dict[str, np.ndarray]:
    """Returns constants in the official state dict that are not variables here."""
    mask = np.tril(np.ones((model.num_patches, model.num_patches), np.float32))
    buffers = {f'blocks.{b}.attn_mask': mask for b in range(len(model.layers_per_block))}
    if not model.volume_preserving:
        buffers['var'] = np.ones((model.num_patches, model.patch_dim), np.float32)
    return buffers


def _sizes(model) -> dict[str, int]:
    return {
        'T': model.num_patches,
        'W': model.width,
        'N': model.num_classes,
        'one': 1,
        'C': model.image_channels,
        'row': model.patch_shape[0],
        'col': model.patch_shape[1],
        'half': 1 if model.volume_preserving else 2,  # log-scale and shift, or only shift
        'qkv': 3,
        'H': model.width // model.head_dim,
        'K': model.head_dim,
        'F': 4 * model.width,
    }


def _shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    groups = re.findall(r'\(.*?\)|\w+', axes)
    return tuple(math.prod(sizes[a] for a in re.findall(r'\w+', g)) for g in groups)


def _rearrange(array: np.ndarray, source: str, target: str, sizes: dict[str, int]) -> np.ndarray:
    """Splits the axes as in `source`, transposes them to the order of `target`, and merges them."""
    split, order = re.findall(r'\w+', source), re.findall(r'\w+', target)
    array = array.reshape([sizes[axis] for axis in split])
    return array.transpose([split.index(axis) for axis in order]).reshape(_shape(target, sizes))


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """Reads the tensors and head_dim of a file."""
    try:
        with safetensors.safe_open(path, framework='numpy') as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}
            for name, dtype in dtypes.items():
                # Rejected before loading because NumPy lacks some of these dtypes.
                if dtype != 'F32':
                    raise ValueError(
                        f'{path}: tensor {name[:100]!r} is {dtype}; save it as float32.'
                    )
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in dtypes}
    except safetensors.SafetensorError as error:
        what = wrong_files.described(path) or f'is damaged or not a safetensors file ({error})'
        raise ValueError(f'{path} {what}; copy the file again, or pass another.') from None
    digest = metadata.pop(_DIGEST, None)
    if digest not in (None, _digest(tensors, metadata)):
        raise ValueError(
            f'{path} is damaged: its numbers do not match their checksum; copy the file again.'
        )
    return tensors, metadata.get('head_dim', _OFFICIAL_HEAD_DIM)


def _digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Returns a checksum of the contents of a file; the format has none."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f'{name} {tensors[name].shape}'.encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _problems(
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    buffers: Mapping[str, np.ndarray],
) -> list[str]:
    """Lists the problems of the arrays, one clause each."""
    problems = []
    for name, shape in shapes.items():
        array = arrays.get(name)
        if array is None:
            problems.append(f'{name} {list(shape)} is missing')
        elif array.shape != shape:
            problems.append(
                f'{name} has shape {list(array.shape)}, but the model needs {list(shape)}'
            )
        elif array.dtype != np.float32:
            problems.append(f'{name} is {array.dtype} (cast it to float32)')
        elif not np.isfinite(array).all():
            value = array[~np.isfinite(array)][0]
            problems.append(f'{name} has {value}, but all numbers must be finite')
        elif name in buffers and not np.array_equal(array, buffers[name]):
            meaning = 'all ones' if name == 'var' else 'the lower-triangular causal mask'
            problems.append(f'{name} is not {meaning}, which the model assumes')
        elif name in (_PRIOR[0], _PRIOR[1]) and array.min() <= 0:
            problems.append(f'{name} has {array.min()}, but a variance must be positive')
    extra = [name for name in arrays if name not in shapes]
    return problems + [f'{str(name)[:100]!r} is unknown to the model' for name in extra]


def _refuse(what, model, problems: list[str]) -> None:
    """Raises ValueError with the problems, if there are any."""
    if not problems:
        return
    fields = (
        'image_size', 'image_channels', 'patch_size', 'width', 'layers_per_block', 'num_classes',
        'head_dim', 'volume_preserving', 'noise_conditioned',
    )
    settings = ', '.join(f'{field}={getattr(model, field)}' for field in fields)
    named = problems[:_MAX_NAMED]
    if len(problems) > _MAX_NAMED:
        named.append(f'and {len(problems) - _MAX_NAMED} more')
    raise ValueError(
        f'{what} does not fit TarFlow({settings}); pass the model it belongs to: '
        f'{"; ".join(named)}.'
    )
