"""MinkUNet on one CPU, next to spconv's CPU engine: python tests/sparse/bench_spconv.py [--tuning FILE]

The forward pass of MinkUNet on a generated scan of about 80,000 voxels at 0.05 m, float32, evaluation mode, building
the maps included, with every dataflow of lumen and with spconv 2.3 (one thread, where its CPU path is fastest and
correct) on the same weights; both are pinned to one CPU and run in turn. lumen's default runs in bfloat16 too, which
spconv's CPU engine does not have, and what `lumen tune` found if its file is given. Prints medians, the largest
difference of the logits, the share of voxels with the same class, and the ratios. Without spconv, lumen alone.
"""

import argparse
import dataclasses
import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumen.evaluation.dataflows import FLOWS, fitted, scan_tensor
from lumen.io.names.torchsparse import RULES
from lumen.io.pretrained import to_original
from lumen.layers import Statistic
from lumen.sparse.minkunet import MAP_NAMES, MinkUNet, MinkUNetConfig
from lumen.sparse.tuning import Tuning
from lumen.training.lidar import street_scans
from pallas_kernels.sparse_convolution import Dataflows

RUNS = 3
BFLOAT16 = "default, bfloat16"


def spconv_minkunet(weights, shape):
    """The same network in spconv: (features, coordinates) -> logits."""
    import spconv.pytorch as spconv
    import torch

    def conv(name, kind, key):
        kernel = weights[f"{name}.kernel"]
        offsets, inputs, outputs = kernel.shape
        size = round(offsets ** (1 / 3))
        # Odd kernels have the first axis fastest, even ones the last; spconv wants [out, k0, k1, k2, in].
        cube = kernel.reshape(size, size, size, inputs, outputs)
        cube = cube.transpose(4, 2, 1, 0, 3) if offsets % 2 else cube.transpose(4, 0, 1, 2, 3)
        if kind == "submanifold":
            layer = spconv.SubMConv3d(inputs, outputs, size, bias=False, indice_key=key)
        elif kind == "down":
            layer = spconv.SparseConv3d(inputs, outputs, size, 2, bias=False, indice_key=key)
        else:
            layer = spconv.SparseInverseConv3d(inputs, outputs, size, bias=False, indice_key=key)
        layer.weight.data = torch.from_numpy(np.ascontiguousarray(cube))
        return layer.eval()

    layers = {}
    for level in range(5):
        prefixes = ["stem"] if level == 0 else [f"stage{level}"]
        prefixes += [f"up{4 - level}"] if level < 4 else []
        for name in (name.removesuffix(".kernel") for name in weights if name.endswith(".kernel")):
            if name.startswith(tuple(prefix + "." for prefix in prefixes)) and weights[f"{name}.kernel"].ndim == 3:
                kind, key = "submanifold", f"submanifold{level}"
                if weights[f"{name}.kernel"].shape[0] == 8:
                    kind, key = ("down", f"down{level}") if name.startswith("stage") else ("up", f"down{level + 1}")
                layers[name] = conv(name, kind, key)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}

    def norm(x, name):
        factor = tensors[f"{name}.weight"] / torch.sqrt(tensors[f"{name}.running_var"] + 1e-5)
        shift = tensors[f"{name}.bias"] - tensors[f"{name}.running_mean"] * factor
        return x.replace_feature(x.features * factor + shift)

    def relu(x):
        return x.replace_feature(torch.relu(x.features))

    def residual(x, name):
        y = relu(norm(layers[f"{name}.net.0"](x), f"{name}.net.1"))
        y = norm(layers[f"{name}.net.3"](y), f"{name}.net.4")
        if f"{name}.downsample.0.kernel" in tensors:
            x = norm(x.replace_feature(x.features @ tensors[f"{name}.downsample.0.kernel"]), f"{name}.downsample.1")
        return relu(y.replace_feature(y.features + x.features))

    def forward(features, coordinates):
        with torch.no_grad():
            x = spconv.SparseConvTensor(torch.from_numpy(features), torch.from_numpy(coordinates), shape, 1)
            for i in (0, 3):
                x = relu(norm(layers[f"stem.{i}"](x), f"stem.{i + 1}"))
            levels = [x]
            for stage in (1, 2, 3, 4):
                x = relu(norm(layers[f"stage{stage}.0.net.0"](x), f"stage{stage}.0.net.1"))
                x = residual(residual(x, f"stage{stage}.1"), f"stage{stage}.2")
                levels.append(x)
            for stage in (1, 2, 3, 4):
                x = relu(norm(layers[f"up{stage}.0.net.0"](x), f"up{stage}.0.net.1"))
                x = x.replace_feature(torch.cat([x.features, levels[4 - stage].features], 1))
                x = residual(residual(x, f"up{stage}.1.0"), f"up{stage}.1.1")
            return (x.features @ tensors["classifier.0.weight"].T + tensors["classifier.0.bias"]).numpy()

    return forward


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=1.0, help="width of the network")
    parser.add_argument("--seed", type=int, default=0, help="of scan and weights")
    parser.add_argument("--tuning", metavar="FILE", help="of `lumen tune`, for the same width")
    options = parser.parse_args()
    scan = street_scans("train", scans=1, seed=options.seed)[0]
    x = scan_tensor(scan["points"])
    rows = int(x.sites.count)
    features, coordinates = np.array(x.features[:rows]), np.array(x.sites.coordinates[:rows])
    model = MinkUNet(fitted(MinkUNetConfig.scaled(options.ratio), x), rngs=nnx.Rngs(options.seed))
    # Statistics as a trained model has them: without, activations of a random network die out.
    graphdef, state = nnx.split(model)

    def statistics_of(state, x):
        moved = nnx.merge(graphdef, state)
        moved(x, train=True)
        return nnx.state(moved, Statistic)

    nnx.update(model, jax.jit(statistics_of)(state, x))

    runs, outputs = {}, {}

    def lumen_runs(label, flows, dtype=None):
        changed = nnx.clone(model)
        changed.config = dataclasses.replace(model.config, dataflows=flows)
        given = x
        if dtype:
            nnx.update(changed, jax.tree.map(lambda a: a.astype(dtype), nnx.state(changed, nnx.Param)))
            given = dataclasses.replace(x, features=x.features.astype(dtype))
        forward = jax.jit(lambda model, x: model(x))
        runs[f"lumen, {label}"] = lambda: np.asarray(forward(changed, given)[:rows], np.float32)

    for label, flow in FLOWS.items():
        lumen_runs(label, tuple((name, Dataflows(flow, flow, flow)) for name in MAP_NAMES))
    lumen_runs("default", ())
    if options.tuning:
        lumen_runs("tuned", Tuning.load(options.tuning).dataflows)
    lumen_runs(BFLOAT16, (), jnp.bfloat16)
    try:
        theirs = spconv_minkunet(to_original(model, RULES), list(x.sites.spatial_shape))
        runs["spconv"] = lambda: theirs(features, coordinates)
    except ImportError:
        print("spconv is not installed: lumen alone.")
    times = {name: [] for name in runs}
    for name, run in runs.items():
        outputs[name] = run()
    for _ in range(RUNS):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    first = next(iter(outputs.values()))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"{rows} voxels, MinkUNet {options.ratio}, one CPU; medians of {RUNS}")
    for name, seconds in medians.items():
        gap = np.abs(outputs[name] - first).max() / np.abs(first).max()
        same = (outputs[name].argmax(1) == first.argmax(1)).mean()
        print(f"{name:32s} {seconds:7.2f} s   difference {gap:.1e}   same class {same:.2%}")
    if "spconv" in medians:
        best = min((name for name in medians if name not in ("spconv", f"lumen, {BFLOAT16}")), key=medians.__getitem__)
        for name in (best, f"lumen, {BFLOAT16}"):
            print(f"{name}: {medians['spconv'] / medians[name]:.2f}x as fast as spconv")


if __name__ == "__main__":
    main()
