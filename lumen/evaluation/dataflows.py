"""What the dataflows of MinkUNet cost on a scan: work executed beyond the needed, and the tuner on it."""

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumen.sparse.minkunet import LEVELS, MAP_NAMES, MinkUNet, MinkUNetConfig, segmentation_loss, unet_maps
from lumen.sparse.tensor import SparseTensor, check_capacity, from_numpy
from lumen.sparse.tuning import CostModel, Tuning, search_space, timed, tune
from lumen.sparse.voxels import level_counts, voxelize
from pallas_kernels.sparse_convolution import Dataflow, Dataflows, default_dataflows, executed

FLOWS = {
    "unsorted": Dataflow("unsorted"),
    "sorted, 1 split": Dataflow("sorted", 1),
    "sorted, 2 splits": Dataflow("sorted", 2),
    "sorted, 3 splits": Dataflow("sorted", 3),
    "sorted, 4 splits": Dataflow("sorted", 4),
    "tile-skip, 128 rows": Dataflow("tile_skip"),
    "tile-skip, 16 rows": Dataflow("tile_skip", tile=16),
    "gather-scatter, 1024 pairs": Dataflow("gather_scatter", tile=1024),
    "fetch-on-demand, 128 pairs": Dataflow("fetch_on_demand"),
}


def scan_tensor(points, voxel_size: float = 0.05) -> SparseTensor:
    """One scan as MinkUNet sees it: voxels in Morton order with the features of their first point.

    Args:
      points: float [n, 4], x, y, z in metres and intensity.
      voxel_size: metres.
    """
    voxels = voxelize(points, voxel_size, rule="round", order="morton")
    whole = 1 << LEVELS  # windows of every level lie in the grid
    shape = (-(-(voxels.coordinates.max(0) + 1) // whole) * whole).tolist()
    coordinates = np.pad(voxels.coordinates, ((0, 0), (1, 0)))
    return from_numpy(voxels.features, coordinates, spatial_shape=shape, batch_size=1)


def fitted(config: MinkUNetConfig, x: SparseTensor) -> MinkUNetConfig:
    """The config with the smallest capacities that hold a scan, for programs that run on nothing else."""
    counts = level_counts(np.asarray(x.sites.coordinates)[: int(x.sites.count)], LEVELS)[1:]
    return dataclasses.replace(config, level_fractions=tuple(min(count / x.sites.capacity, 1.0) for count in counts))


def redundancy(x: SparseTensor, config: MinkUNetConfig) -> list[dict[str, Any]]:
    """Multiply-adds executed per multiply-add needed, of each level's 3 x 3 x 3 layers, by dataflow.

    Returns:
      Per level: "voxels", "neighbours" (mean sites present in a window) and a ratio by the names of `FLOWS`.
    """
    config, rows = fitted(config, x), []
    for label, flow in FLOWS.items():
        flows = tuple((name, Dataflows(flow, flow, flow)) for name in MAP_NAMES)
        changed = dataclasses.replace(config, dataflows=flows)
        maps = jax.jit(lambda sites, changed=changed: unet_maps(sites, changed))(x.sites)
        check_capacity(maps.levels)
        for level, one in enumerate(maps.submanifold):
            counts = {name: int(value) for name, value in jax.jit(executed)(one.kernel_map).items()}
            voxels = int(one.outputs.count)
            if len(rows) <= level:
                rows.append({"voxels": voxels, "neighbours": counts["needed"] / voxels})
            # Implicit GEMM without a sort does all rows in use; the rest of the capacity is not its fault.
            whole = -(-voxels // flow.tile) * flow.tile * one.kernel_map.offsets
            work = whole if flow.kind == "unsorted" else counts["forward"]
            rows[level][label] = work / counts["needed"]
    return rows


def redundancy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of `redundancy`."""
    head = ["level", "voxels", "neighbours", *FLOWS]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for level, row in enumerate(rows):
        ratios = [f"{row[label]:.2f}" for label in FLOWS]
        lines.append("| " + " | ".join([str(level), str(row["voxels"]), f"{row['neighbours']:.2f}", *ratios]) + " |")
    return "\n".join(lines)


def program(model: MinkUNet, x: SparseTensor, *, training: bool = False):
    """What the tuner times: dataflows -> a call of the forward pass, or of loss and gradients, maps included."""

    def build(dataflows: Mapping[str, Dataflows]):
        graphdef, params, others = nnx.split(model, nnx.Param, ...)
        config = dataclasses.replace(model.config, dataflows=tuple(dataflows.items()))

        def forward(params, x, train):
            run = nnx.merge(graphdef, params, others, copy=True)
            return run(x, unet_maps(x.sites, config), train=train)

        def loss(params, x):
            labels = jnp.where(x.sites.used, jnp.arange(x.sites.capacity) % config.classes, 255)
            return segmentation_loss(forward(params, x, True), labels)

        run = jax.jit(jax.grad(loss) if training else lambda params, x: forward(params, x, False))
        return lambda: run(params, x)

    return build


def tune_minkunet(
    config: MinkUNetConfig,
    points,
    *,
    voxel_size: float = 0.05,
    training: bool = False,
    binding: str = "all",
    tiles: Sequence[int] = (128,),
    device: str | None = None,
    dtype: str = "float32",
    runs: int = 5,
    seed: int = 0,
) -> Tuning:
    """Tunes MinkUNet on a scan.

    Args:
      config: the network; its own dataflows do not matter.
      points: float [n, 4], a typical scan.
      voxel_size: metres.
      training: time loss and gradients, not the forward pass.
      binding: see `tune`.
      tiles: sizes to try.
      device: None to time programs here; a name of `lumen.sparse.tuning.DEVICES` to ask the cost model instead.
      dtype: of features and weights.
      runs: timed runs of each program.
      seed: of the weights.
    """
    x = scan_tensor(points, voxel_size)
    x, config = SparseTensor(x.features.astype(dtype), x.sites), fitted(config, x)
    maps = jax.jit(lambda sites: unet_maps(sites, dataclasses.replace(config, dataflows=())))(x.sites)
    check_capacity(maps.levels)
    groups = dict(zip(MAP_NAMES, (*maps.submanifold, *maps.down), strict=True))
    kernel_maps = {name: one.kernel_map for name, one in groups.items()}
    space = {
        name: search_space(np.asarray((one.table >= 0).sum(1)).tolist(), tiles=tiles)
        for name, one in kernel_maps.items()
    }
    provenance: dict[str, Any] = {"network": f"MinkUNet {config.widths}", "dtype": dtype, "training": training}
    provenance |= {"voxels": int(x.sites.count), "capacity": x.sites.capacity}
    if device is None:
        chip = jax.devices()[0]
        provenance["device"] = chip.device_kind if chip.platform != "cpu" else f"cpu ({platform.processor() or 'cpu'})"
        model = MinkUNet(config, rngs=nnx.Rngs(seed))
        measure = timed(program(model, x, training=training), runs)
        objective = "measured"
    else:
        provenance["device"] = device
        itemsize = jnp.dtype(dtype).itemsize
        measure = CostModel(kernel_maps, layer_channels(config), device, training, itemsize)
        objective = "cost model"
    return tune(
        MAP_NAMES,
        measure,
        space=space,
        default=default_dataflows(),
        binding=binding,  # type: ignore[arg-type]
        objective=objective,
        provenance=provenance,
    )


def layer_channels(config: MinkUNetConfig) -> list[tuple[str, int, int]]:
    """(map, Cin, Cout) of every convolution of MinkUNet that has a map."""
    widths = config.widths
    down, up = widths[: LEVELS + 1], widths[LEVELS:]
    layers = [("submanifold0", config.inputs, down[0]), ("submanifold0", down[0], down[0])]

    def blocks(name, inputs, outputs):
        return [(name, inputs, outputs), *[(name, outputs, outputs)] * 3]

    for level in range(1, LEVELS + 1):
        layers.append((f"down{level}", down[level - 1], down[level - 1]))
        layers += blocks(f"submanifold{level}", down[level - 1], down[level])
    for step, level in enumerate(reversed(range(LEVELS))):
        layers.append((f"down{level + 1}", up[step], up[step + 1]))
        layers += blocks(f"submanifold{level}", up[step + 1] + down[level], up[step + 1])
    return layers
