"""The packed 4-bit weights of AWQ checkpoints on disk: four layouts, each read and written.

A quantised linear `P` is (q, scale, zero), whose weight is (q - zero) * scale:

    q      uint8 0..15  [D, F]      input channels first
    scale  float        [D/G, F]
    zero   uint8 0..15  [D/G, F]

and lies on disk as three tensors, `P.qweight`, `P.scales` and the zeros:

    layout     qweight          zeros                            scales       a word holds
    gemm       int32 [D, F/8]   qzeros int32 [D/G, F/8]          [D/G, F]     8 columns, in the order 0 2 4 6 1 3 5 7
    gemv       int32 [F, D/8]   qzeros int32 [F, ZW]             [F, 8 ZW]    8 input channels
    gemv_fast  int16 [F/4, D]   qzeros = -scale zero [8 ZW, F]   [8 ZW, F]    4 input channels, 8 apart
    llm-awq    int16 [F/4, D]   scaled_zeros, likewise           [8 ZW, F]    as gemv_fast

The lowest nibble of a word comes first. ZW = ceil(D/G/8), rounded up to a multiple of 128/G where G < 128; what lies
beyond D/G is zero. "llm-awq" is the second version of llm-awq's files; the first is the layout gemv, and `read_linear`
takes either. To convert a linear, write what was read: `write_linear(P, *read_linear(tensors, P, old), new)`.

Source: AWQ, arXiv:2306.00978; casper-hansen/AutoAWQ awq/modules/linear/{gemm,gemv,gemv_fast}.py and
awq/utils/packing_utils.py; mit-han-lab/llm-awq awq/quantize/qmodule.py and tinychat/offline-weight-repacker.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

Layout = Literal["gemm", "gemv", "gemv_fast", "llm-awq"]

_GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_ROW_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
_ZEROS = {"gemm": "qzeros", "gemv": "qzeros", "gemv_fast": "qzeros", "llm-awq": "scaled_zeros"}


@dataclasses.dataclass(frozen=True)
class AWQFormat:
    """How the linears of a checkpoint are stored: the `quantization_config` of its config.json.

    Attributes:
      group: G, input channels that share a scale and a zero; -1: all of them.
      layout: see the module.
      unconverted: a linear is not quantised if one of these strings is part of its dotted name.
    """

    group: int = 128
    layout: Layout = "gemm"
    unconverted: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AWQFormat":
        """Reads a `quantization_config`.

        Names and values may be in upper case; `w_bit` and `q_group_size` stand for `bits` and `group_size`; without a
        version it is "gemm"; the backend "llm-awq" is the layout of that name, whatever its version.

        Raises:
          ValueError: for another method, a number of bits, a version or a backend that cannot be read.
        """
        values = {str(key).lower(): value for key, value in config.items()}
        values = {key: value.lower() if isinstance(value, str) else value for key, value in values.items()}

        def require(key, value, wanted):
            if value not in wanted:
                choices = " or ".join(repr(choice) for choice in wanted)
                raise ValueError(
                    f"quantization_config: {key} is {value!r}; wanted {choices}; requantise the original weights."
                )
            return value

        require("quant_method", values.get("quant_method", "awq"), ("awq",))
        require("bits", values.get("bits", values.get("w_bit", 4)), (4,))
        require("zero_point", values.get("zero_point", True), (True,))
        backend = require("backend", values.get("backend", "autoawq"), ("autoawq", "llm-awq"))
        version = require("version", values.get("version", "gemm"), ("gemm", "gemv", "gemv_fast"))
        group = values.get("group_size", values.get("q_group_size", 128))
        if not isinstance(group, int) or (group < 1 and group != -1):
            raise ValueError(f"quantization_config: group_size is {group!r}; wanted -1 (a whole row) or 1 and more.")
        # In their own case: these are names.
        unconverted = {str(key).lower(): value for key, value in config.items()}.get("modules_to_not_convert")
        return cls(group, "llm-awq" if backend == "llm-awq" else version, tuple(unconverted or ()))

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` that `from_config` reads, with the keys that AutoAWQ writes."""
        backend = {"backend": "llm-awq"} if self.layout == "llm-awq" else {}
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group,
            "zero_point": True,
            "version": "gemv" if backend else self.layout,
            "modules_to_not_convert": list(self.unconverted) or None,
            **backend,
        }

    def converts(self, name: str) -> bool:
        """Whether the linear of this dotted name is quantised."""
        return not any(part in name for part in self.unconverted)


def read_linear(
    tensors: Mapping[str, np.ndarray], prefix: str, config: AWQFormat
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unpacks one linear.

    Args:
      tensors: a checkpoint's tensors by name.
      prefix: the linear's dotted name, e.g. "model.layers.0.mlp.down_proj".
      config: how it is stored. For "llm-awq", `qzeros` in place of `scaled_zeros` means the first version.

    Returns:
      (q uint8 [D, F], scale [D/G, F] in the dtype on disk, zero uint8 [D/G, F]).

    Raises:
      ValueError: naming the tensor that is missing, misshapen or of another dtype, or zeros that are no multiples of
        the scales.
    """
    layout = config.layout
    if layout == "llm-awq" and f"{prefix}.scaled_zeros" not in tensors and f"{prefix}.qzeros" in tensors:
        layout = "gemv"

    def take(name, *dtypes):
        if f"{prefix}.{name}" not in tensors:
            raise ValueError(
                f"AWQ: {prefix}.{name} is missing; layout {layout!r} wants qweight, {_ZEROS[layout]} and scales; "
                "check the version in quantization_config."
            )
        array = np.asarray(tensors[f"{prefix}.{name}"])
        if array.ndim != 2 or array.dtype not in dtypes:
            raise ValueError(
                f"AWQ: {prefix}.{name} is {array.dtype}{list(array.shape)}; layout {layout!r} wants two axes of "
                f"{' or '.join(np.dtype(dtype).name for dtype in dtypes)}; check the version in quantization_config."
            )
        return array

    floats = (np.float16, ml_dtypes.bfloat16, np.float32)
    scale = take("scales", *floats)
    if layout in ("gemm", "gemv"):
        words, zeros = take("qweight", np.int32), take("qzeros", np.int32)
    else:
        words, zeros = take("qweight", np.int16), take(_ZEROS[layout], *floats)
    depth = {"gemm": words.shape[0], "gemv": words.shape[1] * 8}.get(layout, words.shape[1])
    features = {"gemm": words.shape[1] * 8, "gemv": words.shape[0]}.get(layout, words.shape[0] * 4)
    group, groups = _groups(prefix, depth, config.group)
    _check_divides(prefix, layout, depth, features)
    padded = 8 * _zero_words(prefix, groups, group) if layout != "gemm" else groups
    shapes = {
        "gemm": ((groups, features), (groups, features // 8)),
        "gemv": ((features, padded), (features, padded // 8)),
    }.get(layout, ((padded, features), (padded, features)))
    for name, array, wanted in zip(("scales", _ZEROS[layout]), (scale, zeros), shapes, strict=True):
        if array.shape != wanted:
            raise ValueError(
                f"AWQ: {prefix}.{name} came {list(array.shape)}, wanted {list(wanted)} beside qweight "
                f"{list(words.shape)}, layout {layout!r}, group {config.group}; check group_size and version."
            )
    if layout == "gemm":
        return _unpack(words, _GEMM_ORDER), scale, _unpack(zeros, _GEMM_ORDER)
    if layout == "gemv":
        linear = _unpack(words, _ROW_ORDER), scale[:, :groups], _unpack(zeros, _ROW_ORDER)[:, :groups]
        q, scale, zero = (np.ascontiguousarray(array.T) for array in linear)
        return q, scale, zero
    scale, scaled = scale[:groups], zeros[:groups].astype(np.float32)
    positive = scale.astype(np.float32)
    exact = np.divide(-scaled, positive, out=np.zeros_like(positive), where=positive != 0)
    zero = np.rint(exact)
    if not (np.abs(exact - zero) < 0.25).all() or zero.min() < 0 or zero.max() > 15:
        raise ValueError(
            f"AWQ: {prefix}.{_ZEROS[layout]} holds values that are not -scale times 0..15; "
            "check the version in quantization_config."
        )
    return _unpack_interleaved(words), scale.copy(), zero.astype(np.uint8)


def write_linear(prefix: str, q, scale, zero, config: AWQFormat) -> dict[str, np.ndarray]:
    """Packs one linear: the inverse of `read_linear`.

    Args:
      prefix: the linear's dotted name.
      q: integers 0..15 [D, F].
      scale: [D/G, F]; stored as bfloat16 if it is that, else as float16, the dtype of the originals.
      zero: integers 0..15 [D/G, F].
      config: how to store it.

    Returns:
      {name: tensor} of the three tensors, C order.

    Raises:
      ValueError: for shapes that do not belong together, integers outside 0..15, sizes that the layout cannot hold
        (gemm F a multiple of 8; gemv D of 8 and G 32, 64 or at least 128; gemv_fast and llm-awq D of 64 and F of 8), or
        a scale that is not finite or not positive in the stored dtype.
    """
    q, scale, zero = np.asarray(q), np.asarray(scale), np.asarray(zero)
    depth, features = q.shape
    group, groups = _groups(prefix, depth, config.group)
    _check_divides(prefix, config.layout, depth, features)
    if scale.shape != (groups, features) or zero.shape != (groups, features):
        raise ValueError(
            f"AWQ: {prefix}: q {list(q.shape)} in groups of {group} wants scale and zero {[groups, features]}; "
            f"came {list(scale.shape)} and {list(zero.shape)}."
        )
    for name, integers in (("q", q), ("zero", zero)):
        if integers.min() < 0 or integers.max() > 15:
            raise ValueError(f"AWQ: {prefix}: {name} has values outside 0..15; wanted 4-bit integers.")
    with np.errstate(over="ignore"):  # reported below
        scale = scale if scale.dtype == ml_dtypes.bfloat16 else scale.astype(np.float16)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"AWQ: {prefix}: a scale is not finite and positive as {scale.dtype}; check the weights.")
    q, zero = q.astype(np.uint8), zero.astype(np.uint8)
    if config.layout == "gemm":
        packed = {"qweight": _pack(q, _GEMM_ORDER), "qzeros": _pack(zero, _GEMM_ORDER), "scales": scale}
    else:
        padding = ((0, 8 * _zero_words(prefix, groups, group) - groups), (0, 0))
        padded = np.pad(scale, padding)
        if config.layout == "gemv":
            zeros = _pack(np.pad(zero, padding).T, _ROW_ORDER)
            packed = {"qweight": _pack(q.T, _ROW_ORDER), "qzeros": zeros, "scales": padded.T}
        else:
            zeros = np.pad((-(scale.astype(np.float32) * zero)).astype(scale.dtype), padding)
            packed = {"qweight": _pack_interleaved(q), _ZEROS[config.layout]: zeros, "scales": padded}
    # In C order: safetensors writes the memory of a transposed view as it lies.
    return {f"{prefix}.{name}": np.array(tensor, order="C") for name, tensor in packed.items()}


def _groups(prefix: str, depth: int, group: int) -> tuple[int, int]:
    """(G, D/G)."""
    group = depth if group == -1 else group
    if depth % group:
        raise ValueError(f"AWQ: {prefix} has {depth} input channels, not a multiple of the group {group}.")
    return group, depth // group


def _zero_words(prefix: str, groups: int, group: int) -> int:
    """ZW of the module's table."""
    if group not in (32, 64) and group < 128:
        raise ValueError(
            f"AWQ: {prefix}: layouts gemv, gemv_fast and llm-awq have groups of 32, 64, or 128 and more, not {group}; "
            "use gemm."
        )
    multiple = max(1, 128 // group)
    return -(-groups // (8 * multiple)) * multiple


def _check_divides(prefix: str, layout: Layout, depth: int, features: int) -> None:
    unit = {"gemm": (1, 8), "gemv": (8, 1)}.get(layout, (64, 8))
    if depth % unit[0] or features % unit[1]:
        raise ValueError(
            f"AWQ: {prefix} is [{depth}, {features}]; layout {layout!r} wants input channels in multiples of {unit[0]} "
            f"and output channels in multiples of {unit[1]}; pad the layer or use another layout."
        )


def _pack(q: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Eight neighbours of the last axis in an int32, `order[i]` in nibble i: uint8 [M, N] -> int32 [M, N/8]."""
    q = q.reshape(q.shape[0], -1, 8)
    packed = np.empty((*q.shape[:2], 4), np.uint8)
    for byte in range(4):
        packed[..., byte] = q[..., order[2 * byte]] | (q[..., order[2 * byte + 1]] << 4)
    return packed.view("<i4")[..., 0].astype(np.int32, copy=False)


def _unpack(words: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    packed = np.ascontiguousarray(words, "<i4")[..., None].view(np.uint8)  # [M, N/8, 4]
    q = np.empty((*words.shape, 8), np.uint8)
    for byte in range(4):
        q[..., order[2 * byte]] = packed[..., byte] & 15
        q[..., order[2 * byte + 1]] = packed[..., byte] >> 4
    return q.reshape(words.shape[0], -1)


def _pack_interleaved(q: np.ndarray) -> np.ndarray:
    """uint8 [D, F] -> int16 [F/4, D].

    Input channel 64 i + 32 j + 8 m + k of column 4 c + n is nibble m of word [c, 64 i + 16 n + 8 j + k].
    """
    depth, features = q.shape
    nibbles = q.astype(np.uint16).reshape(depth // 64, 2, 4, 8, features // 4, 4)
    words = nibbles[:, :, 0] | nibbles[:, :, 1] << 4 | nibbles[:, :, 2] << 8 | nibbles[:, :, 3] << 12
    return words.transpose(3, 0, 4, 1, 2).reshape(features // 4, depth).view(np.int16)


def _unpack_interleaved(words: np.ndarray) -> np.ndarray:
    quarter, depth = words.shape
    words = words.view(np.uint16).reshape(quarter, depth // 64, 4, 2, 8).transpose(1, 3, 4, 0, 2)  # i j k c n
    words = np.ascontiguousarray(words)
    q = np.empty((depth // 64, 2, 4, 8, quarter, 4), np.uint8)
    for nibble in range(4):
        q[:, :, nibble] = words >> (4 * nibble) & 15
    return q.reshape(depth, quarter * 4)
