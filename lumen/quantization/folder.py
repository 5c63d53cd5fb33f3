"""From a published folder to a quantised one."""

import dataclasses
import io
import os
import pathlib
import shutil
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lumen.io.awq import AWQFormat
from lumen.language import pretrained
from lumen.language.decoder import Decoder
from lumen.qtensor import QuantizedLinear
from lumen.quantization.awq import AWQConfig, decoder_graph, quantize_decoder
from lumen.quantization.report import report_plot, report_table

Layout = Literal["gemm", "gemv", "gemv_fast", "llm-awq", "dense"]


def quantize_folder(
    source: str | os.PathLike,
    target: str | os.PathLike,
    tokens: np.ndarray,
    config: AWQConfig,
    *,
    layout: Layout = "gemm",
) -> str:
    """Quantises the model of a folder by `quantize_decoder`, and writes the folder of the result.

    What is not packed is written in float16, as AutoAWQ does. Beside the weights lie report.md and report.png. What is
    finished of a run that is cut off stays in a hidden folder beside the target, and the next run goes on from there.

    Args:
      source: folder of the model in full precision.
      target: folder to make.
      tokens: [S, T] calibration tokens.
      config: how to quantise.
      layout: of the packed weights, see `lumen.io.awq`; "dense": the rounded weights, not packed.

    Returns:
      The report, in Markdown.
    Raises:
      FileExistsError: if there is something at the target.
      ValueError: for a source that is quantised already, 3 bits in a packed layout, values that float16 cannot hold,
        and as `quantize_decoder`.
    """
    target = pathlib.Path(target).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"quantize: {target} exists; choose another folder, or remove it.")
    if config.bits != 4 and layout != "dense":
        raise ValueError(
            f"quantize: layout {layout!r} holds 4-bit codes and bits={config.bits}; use 4 bits, or layout 'dense', "
            "which holds the rounded weights in 16 bits."
        )
    # A CPU has no float16 attention.
    model, folder = pretrained.load(source, dtype=jnp.float32 if jax.default_backend() == "cpu" else None)
    if folder.quantization is not None:
        raise ValueError(f"quantize: {source} is quantised already; start from the weights in full precision.")
    finished = target.with_name(f".{target.name}.unfinished")
    quantized, report = quantize_decoder(model, tokens, config, resume_dir=finished)
    table = report_table(report)
    picture = io.BytesIO()
    Image.fromarray(report_plot(report)).save(picture, "png")
    files = {**folder.files, "report.md": table.encode(), "report.png": picture.getvalue()}
    form = None
    if layout == "dense":
        quantized = _dense(quantized)
    else:
        form = AWQFormat(config.group, layout)
    pretrained.save(
        target, _in_float16(quantized), dataclasses.replace(folder, files=files, layout=None, quantization=form)
    )
    shutil.rmtree(finished)
    return table


def _dense(model: Decoder) -> Decoder:
    """The model with its packed linears unpacked."""
    model = jax.tree.map(lambda leaf: leaf, model)
    for name in decoder_graph(model.config).linears:
        linear = getattr(model.blocks, name)
        if isinstance(linear, QuantizedLinear):
            setattr(model.blocks, name, linear.dense())
    return model


def _in_float16(model: Decoder) -> Decoder:
    def cast(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        narrow = leaf.astype(jnp.float16)
        if not bool(jnp.isfinite(narrow).all()):
            raise ValueError("quantize: the model has weights that float16 cannot hold; AWQ checkpoints are float16.")
        return narrow

    return jax.tree.map(cast, model)
