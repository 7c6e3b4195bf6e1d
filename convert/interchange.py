"""NVFP4 weights in the two conventions that other tools write: compressed-tensors' and NVIDIA ModelOpt's.

Of a linear layer `name` with weight [N, K], both store two codes a byte with the value of even index in the low nibble,
E4M3 block scales, and one float32 scale for the tensor, as we do (`NVFP4Array`); they differ in names and in the last::

                        compressed-tensors                     ModelOpt
    uint8 [N, K/2]      name.weight_packed                     name.weight
    E4M3 [N, K/16]      name.weight_scale                      name.weight_scale
    float32             name.weight_global_scale [1]           name.weight_scale_2 []
    value               code * (block scale / global scale)    code * (block scale * scale 2)
    of activations      name.input_global_scale, unused here   name.input_scale, unused here

ModelOpt's tensors are ours bit for bit, both ways. compressed-tensors' codes and block scales are too, but its tensor
scale is the reciprocal of ours, rounded to float32 each time: there and back again is within one unit in the last place
(the reciprocal of 3 is not a float), the same for powers of two, and exact from the second trip on.

Sources: `compressed_tensors.compressors.nvfp4` and `compressed_tensors.quantization.lifecycle.forward_helpers` 0.20;
`modelopt.torch.quantization.qtensor.nvfp4_tensor` and `modelopt.torch.export` 0.47.

`convert.interchange_models` puts such weights into a model of ours, and takes them out.

Neither has a rotation, so weights must have been quantised with `hadamard=0` to be written.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

import sixbit_jax
from convert.errors import CheckpointError, ConversionError, Problem
from convert.rules import Shape
from pallas_kernels.common.formats import BLOCK, NVFP4Array
from sixbit_jax.video import replacing

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT8 = {
    "F8_E4M3": E4M3,
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""By the names of safetensors."""
READABLE = ("BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64", "C64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convention:
    """How one library names and stores a linear layer's NVFP4 weight.

    Attributes:
        codes, scales, tensor_scale: last part of the names of the three tensors.
        reciprocal: whether the stored tensor scale divides.
        shape: in which the tensor scale is written. Read are [] and [1].
        activation: last part of the name of the scale of the layer's input. We measure that as we go, and don't use it.
        changes: last parts of names of tensors that make the layer something else than codes times scales.
    """

    codes: str
    scales: str
    tensor_scale: str
    reciprocal: bool
    shape: Shape
    activation: str
    changes: tuple[str, ...]


CONVENTIONS = {
    "compressed-tensors": Convention(
        codes="weight_packed",
        scales="weight_scale",
        tensor_scale="weight_global_scale",
        reciprocal=True,
        shape=(1,),
        activation="input_global_scale",
        changes=("weight_zero_point", "weight_g_idx"),
    ),
    "modelopt": Convention(
        codes="weight",
        scales="weight_scale",
        tensor_scale="weight_scale_2",
        reciprocal=False,
        shape=(),
        activation="input_scale",
        changes=("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"),
    ),
}


def from_tensors(tensors: Mapping[str, np.ndarray], convention: str, name: str = "") -> NVFP4Array:
    """The weight of one linear layer, from the tensors that a convention stores.

    Args:
        tensors: at least the three of the table above, under their full names; float8_e4m3fn for the block scales.
        convention: "compressed-tensors" or "modelopt".
        name: of the layer; "" if names have one part only.

    Returns:
        codes [N, K/2], scales [N, K/16] and tensor_scale [], in NumPy, not rotated.

    Raises:
        ValueError: on an unknown convention.
        ConversionError: lists every tensor that is missing, or of a wrong shape, dtype or value.
    """
    rules = _convention(convention)
    if problems := list(_problems(tensors, rules, name)):
        raise ConversionError(f"{name or 'weight'} ({convention})", problems)
    codes, scales, stored = (np.asarray(tensors[_join(name, part)]) for part in _parts(rules))
    scale = _stored(stored.reshape(()), rules)
    return NVFP4Array(codes=codes, scales=scales.view(np.uint8), tensor_scale=scale)


def to_tensors(array: NVFP4Array, convention: str, name: str = "") -> dict[str, np.ndarray]:
    """The inverse of `from_tensors`.

    Args:
        array: [N, K], not rotated.
        convention: "compressed-tensors" or "modelopt".
        name: of the layer; "" if names have one part only.

    Returns:
        The three tensors, under their full names.

    Raises:
        ValueError: on an unknown convention, or an array that is not valid.
        ConversionError: lists what the convention cannot hold: a rotation, more axes than [N, K], more than one tensor
            scale, or one that is not positive and finite.
    """
    rules = _convention(convention)
    array.validate()
    if problems := list(_unwritable(array, name)):
        raise ConversionError(f"{name or 'weight'} ({convention})", problems)
    scale = np.asarray(array.tensor_scale)
    values = (
        np.asarray(array.codes),
        np.asarray(array.scales).view(E4M3),
        _stored(scale, rules).reshape(rules.shape),
    )
    return {_join(name, part): value for part, value in zip(_parts(rules), values, strict=True)}


def read(path: str | Path, convention: str | None = None) -> tuple[dict[str, NVFP4Array], dict[str, np.ndarray]]:
    """Reads a checkpoint with NVFP4 weights into host memory.

    Args:
        path: a safetensors file, or a folder of which every *.safetensors file is read.
        convention: None to tell it by the names of the tensors.

    Returns:
        The NVFP4 weights by name of their layer, and every other tensor (biases, norms, scales of activations, weights
        in other formats) by its own name, as stored.

    Raises:
        ValueError: on an unknown convention.
        CheckpointError: if there is no such file, none holds NVFP4 weights, or both conventions occur.
        ConversionError: lists every tensor that is missing, or of a wrong shape, dtype or value, every tensor that
            changes what a layer means (ModelOpt's AWQ and SVDQuant, a zero point), and every file that can't be read.
    """
    path = Path(path)
    tensors = _tensors(path)
    if convention is None:
        found = [key for key, rules in CONVENTIONS.items() if _names(tensors, rules)]
        # A block scale without codes belongs to both; the names of the others tell.
        sure = [key for key in found if any(_split(k)[1] == CONVENTIONS[key].tensor_scale for k in tensors)] or found
        if len(sure) != 1:
            what = f"layers of {' and '.join(sure)}; pass one as convention=" if sure else "no NVFP4 weight"
            raise CheckpointError(f"{path}: {what}")
        (convention,) = sure
    rules = _convention(convention)
    names = _names(tensors, rules)
    if problems := [problem for name in names for problem in _problems(tensors, rules, name)]:
        raise ConversionError(f"{path} ({convention})", problems)
    used = {_join(name, part) for name in names for part in _parts(rules)}
    others = {key: tensor for key, tensor in tensors.items() if key not in used}
    return {name: from_tensors(tensors, convention, name) for name in names}, others


def write(
    arrays: Mapping[str, NVFP4Array],
    path: str | Path,
    *,
    convention: str,
    others: Mapping[str, np.ndarray] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a safetensors file, which appears at `path` when it is complete.

    `quantization_config` makes what goes with it into a `config.json`.

    Args:
        arrays: weights [N, K] by name of their layer.
        path: of the file, in a folder that exists.
        convention: "compressed-tensors" or "modelopt".
        others: further tensors, by full name, to be stored as they are.
        overwrite: replace a file.

    Returns:
        `path`.

    Raises:
        ValueError: on an unknown convention, or an array that is not valid.
        CheckpointError: if `path` exists and `overwrite` is false, or its folder does not exist.
        ConversionError: lists every weight that the convention cannot hold, and every name that occurs twice.
    """
    path, tensors, problems = Path(path), {}, []
    _convention(convention)
    for name, array in arrays.items():
        try:
            tensors |= to_tensors(array, convention, name)
        except ConversionError as error:
            problems += error.problems
    for key in tensors.keys() & (others or {}).keys():
        problems.append(Problem(mark="+", where="others", key=key, wanted="a name that no weight takes"))
    if problems:
        raise ConversionError(f"{path} ({convention})", problems)
    tensors |= {key: np.asarray(value) for key, value in (others or {}).items()}
    if path.is_dir() or (path.exists() and not overwrite):
        raise CheckpointError(f"{path}: exists; choose another place, or overwrite a file (overwrite=True)")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path}: the folder {path.absolute().parent} does not exist")
    with replacing(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode
        # Readers take "pt" to mean that the tensors are laid out as torch's.
        save_file({k: np.ascontiguousarray(v).reshape(v.shape) for k, v in tensors.items()}, beside, {"format": "pt"})
        beside.chmod(mode)  # safetensors makes files that only their owner can read
    return path


def quantization_config(convention: str, ignore: Iterable[str] = ()) -> dict[str, Any]:
    """The entry "quantization_config" of a `config.json` that says: NVFP4 weights, 16-bit activations.

    Args:
        convention: "compressed-tensors" or "modelopt".
        ignore: names of the linear layers that are not quantised.

    Raises:
        ValueError: on an unknown convention.
    """
    _convention(convention)
    weights: dict[str, Any] = {"num_bits": 4, "type": "float", "group_size": BLOCK, "dynamic": False}
    common = {"quant_method": convention, "ignore": list(ignore)}
    if convention == "modelopt":
        group = {"weights": weights, "targets": ["Linear"]}
        producer = {"name": "sixbit_jax", "version": sixbit_jax.__version__}
        return common | {"quant_algo": "W4A16_NVFP4", "producer": producer, "config_groups": {"group_0": group}}
    format = "nvfp4-pack-quantized"
    weights |= {"symmetric": True, "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    group = {"weights": weights, "targets": ["Linear"], "format": format}
    return common | {"format": format, "quantization_status": "compressed", "config_groups": {"group_0": group}}


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise ValueError(f"unknown convention {name!r}; conventions are {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def _parts(rules: Convention) -> tuple[str, str, str]:
    return rules.codes, rules.scales, rules.tensor_scale


def _stored(scale: np.ndarray, rules: Convention) -> np.ndarray:
    """Our tensor scale [] as a convention stores it, or the other way round."""
    return np.asarray(np.float32(1) / scale if rules.reciprocal else scale)


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _split(key: str) -> tuple[str, str]:
    name, _, part = key.rpartition(".")
    return name, part


def _names(tensors: Mapping[str, np.ndarray], rules: Convention) -> list[str]:
    """Names of the layers in NVFP4, whole or not: those with codes, a tensor scale, or block scales and no weight."""
    found = {}
    for key, tensor in tensors.items():
        name, part = _split(key)
        if (
            part == rules.tensor_scale
            or (part == rules.codes and (part != "weight" or tensor.dtype == np.uint8))
            or (part == rules.scales and not {_join(name, p) for p in ("weight", "weight_packed")} & tensors.keys())
        ):
            found[name] = None
    return list(found)


def _problems(tensors: Mapping[str, np.ndarray], rules: Convention, name: str) -> Iterator[Problem]:
    """What keeps one layer's tensors from being a weight in NVFP4."""
    where = name or "weight"
    codes = tensors.get(_join(name, rules.codes))
    rows, half = codes.shape if codes is not None and codes.ndim == 2 else (None, None)
    for part, dtype in zip(_parts(rules), (np.dtype(np.uint8), E4M3, np.dtype(np.float32)), strict=True):
        key, tensor = _join(name, part), tensors.get(_join(name, part))
        wrong = None
        if tensor is None:
            yield Problem(mark="-", where=where, key=key, wanted=dtype.name)
        elif tensor.dtype != dtype:
            wrong = dtype.name
        elif part == rules.codes and (half is None or half == 0 or half % (BLOCK // 2)):
            wrong = "[N, K/2], K a positive multiple of 16"
        elif part == rules.scales and half is not None and tensor.shape != (rows, 2 * half // BLOCK):
            wrong = f"[N, K/16] = {[rows, 2 * half // BLOCK]}"
        elif part == rules.tensor_scale and tensor.shape not in ((), (1,)):
            wrong = "one value"
        elif part == rules.tensor_scale and not _has_reciprocal(tensor.reshape(())):
            yield Problem(mark="!", where=where, key=key, found=str(tensor.reshape(())), wanted=_POSITIVE)
        if tensor is not None and wrong is not None:
            yield Problem(mark="!", where=where, key=key, found=f"{tensor.dtype} {list(tensor.shape)}", wanted=wrong)
    for part in rules.changes:
        if (key := _join(name, part)) in tensors:
            wanted = "none: it makes the layer more than codes times scales"
            yield Problem(mark="+", where=where, key=key, found=tensors[key].shape, wanted=wanted)


_POSITIVE = "a positive normal float32 whose reciprocal is one too"


def _has_reciprocal(scale: np.ndarray) -> bool:
    """Whether a float32 can be stored either way round."""
    return bool(2.0**-126 <= scale <= 2.0**126)  # False for NaN


def _unwritable(array: NVFP4Array, name: str) -> Iterator[Problem]:
    """What a convention cannot hold of a valid array."""
    where = name or "weight"
    if array.hadamard:
        wanted = "0: the conventions have no rotation, so quantise with hadamard=0"
        yield Problem(mark="!", where=where, found=f"hadamard={array.hadamard}", wanted=wanted)
    if len(array.shape) != 2:
        yield Problem(mark="!", where=where, found=array.shape, wanted="[N, K], one layer")
    scale = np.asarray(array.tensor_scale)
    if scale.shape:
        yield Problem(mark="!", where=where, found=f"tensor_scale {list(scale.shape)}", wanted="one tensor scale")
    elif not _has_reciprocal(scale):
        yield Problem(mark="!", where=where, found=f"tensor_scale {scale}", wanted=_POSITIVE)


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, or of the files of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise CheckpointError(f"{path}: no safetensors file")
    tensors, problems = {}, []
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a mapping
                    if key in tensors:
                        problems.append(Problem(mark="+", where=file.name, key=key, wanted="each name in one file"))
                    dtype = opened.get_slice(key).get_dtype()
                    if dtype in FLOAT8:
                        tensors[key] = _float8(file, key)
                    elif dtype not in READABLE:
                        wanted = "a dtype that NumPy or ml_dtypes has"
                        problems.append(Problem(mark="!", where=file.name, key=key, found=dtype, wanted=wanted))
                    else:
                        tensors[key] = opened.get_tensor(key)
        except (safetensors.SafetensorError, OSError) as error:
            wanted = "a complete safetensors file"
            problems.append(Problem(mark="x", where=file.name, found=str(error), wanted=wanted))
    if problems:
        raise ConversionError(str(path), problems)
    return tensors


def _float8(file: Path, key: str) -> np.ndarray:
    """A tensor of 8-bit floats from a file that `safe_open` has accepted, which itself can't give them to NumPy.

    The file is: length of the header, uint64 little-endian; header, JSON; data, to which offsets are relative.
    """
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(length))[key]
        opened.seek(8 + length + entry["data_offsets"][0])
        data = opened.read(math.prod(entry["shape"]))
    return np.frombuffer(data, FLOAT8[entry["dtype"]]).reshape(entry["shape"])
