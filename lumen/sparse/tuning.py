"""The sparse autotuner: which dataflow each kernel map of a network should run.

Layers that share a kernel map are one group, because the map's preparation is theirs in common. What is minimised is
the time of the whole program, preparation included, with one group changed and all others at the default: a linear
search, groups x candidates. Training has three products; `Binding` says which of them share a candidate, and those that
do not are searched one after the other, as their times add up.

    tuning = tune(MAP_NAMES, measure, space=search_space(), default=Dataflows(), binding="backward")
    tuning.save("minkunet.json")
    config = MinkUNetConfig.scaled(1.0, dataflows=Tuning.load("minkunet.json").dataflows)

Source: TorchSparse++, arXiv:2311.12862; torchsparse/utils/tune.py. Deviations: gather-scatter and tile-skip are in the
space; what won is measured again before it is taken; where nothing can be timed a cost model decides and the result
says so.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from tqdm import tqdm

from pallas_kernels.sparse_convolution import Dataflow, Dataflows, KernelMap, executed, group_offsets, prepare

Binding = Literal["all", "backward", "none"]
# Products that share a candidate, by binding.
_BOUND: dict[str, tuple[tuple[str, ...], ...]] = {
    "all": (("forward", "dgrad", "wgrad"),),
    "backward": (("forward",), ("dgrad", "wgrad")),
    "none": (("forward",), ("dgrad",), ("wgrad",)),
}


class TuningError(ValueError):
    """A tuning file that cannot be used; the message names it."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What the cost model knows of a chip.

    Attributes:
      flops: dense multiply-adds times two per second, in 16 bits (in float32 on a CPU).
      bandwidth: bytes per second.
      launch: seconds that a pass over a buffer costs at least.
    """

    flops: float
    bandwidth: float
    launch: float


# Data sheets, dense rates; the CPU is one core with 512-bit vectors.
DEVICES = {
    "h200": Device(989e12, 4.8e12, 4e-6),
    "h100": Device(989e12, 3.35e12, 4e-6),
    "v5p": Device(459e12, 2.765e12, 4e-6),
    "cpu": Device(1e11, 2e10, 1e-6),
}


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A choice of dataflows, and where it comes from.

    Attributes:
      dataflows: (map, dataflows) of every group.
      objective: "measured", or "cost model" where nothing could be timed.
      default_seconds, tuned_seconds: of the whole program with the default everywhere, and as tuned.
      provenance: device, versions, date, what was tuned on.
      trials: (map, products, candidate, seconds) of everything tried.
    """

    dataflows: tuple[tuple[str, Dataflows], ...]
    objective: Literal["measured", "cost model"]
    default_seconds: float
    tuned_seconds: float
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    trials: tuple[tuple[str, str, str, float], ...] = ()

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, whole or not at all."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(self) | {
            "dataflows": {name: dataclasses.asdict(flows) for name, flows in self.dataflows}
        }
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tuning":
        """Reads what `save` wrote.

        Raises:
          TuningError: the file is missing or damaged, or holds what this version does not know.
        """
        try:
            values = json.loads(pathlib.Path(path).read_text())
            flows = tuple(
                (name, Dataflows(**{product: _dataflow(one) for product, one in products.items()}))
                for name, products in values.pop("dataflows").items()
            )
            trials = tuple(tuple(trial) for trial in values.pop("trials"))
            return cls(dataflows=flows, trials=trials, **values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TuningError(
                f"{path}: not a tuning file of this version: {error}; wanted the JSON that `lumen tune` writes. "
                "Tune again, or leave it out."
            ) from error


def search_space(counts: Sequence[int] = (), *, tiles: Sequence[int] = (128,)) -> tuple[Dataflow, ...]:
    """Every kind of dataflow: unsorted, sorted with 1 to 4 splits, tile-skip, fetch-on-demand and gather-scatter.

    Args:
      counts: pairs of each offset on a typical input, for the adaptive grouping of gather-scatter; () for no groups.
      tiles: sizes to try of each.
    """
    space = [Dataflow("unsorted")]
    for tile in tiles:
        space += [Dataflow("sorted", splits, tile) for splits in (1, 2, 3, 4)]
        space += [Dataflow("tile_skip", tile=tile), Dataflow("fetch_on_demand", tile=tile)]
        space += [Dataflow("gather_scatter", tile=8 * tile)]
        if counts:
            space += [Dataflow("gather_scatter", tile=8 * tile, groups=group_offsets(counts, 0.3))]
    return tuple(space)


def tune(
    maps: Sequence[str],
    measure: Callable[[Mapping[str, Dataflows]], float],
    *,
    space: Sequence[Dataflow] | Mapping[str, Sequence[Dataflow]],
    default: Dataflows,
    binding: Binding = "all",
    objective: Literal["measured", "cost model"] = "measured",
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Tuning:
    """Searches the groups one after the other.

    Args:
      maps: the groups' names.
      measure: seconds of the whole program with the given dataflows; see `timed` and `CostModel`.
      space: candidates, for all groups or by name.
      default: of every group that is not being tuned.
      binding: "all": one candidate for forward, dgrad and wgrad. "backward": one for forward and one for dgrad and
        wgrad. "none": one each.
      objective: what `measure` is.
      provenance: kept with the result.
      progress: show a bar.
    Returns:
      The best candidate of each group, if it is faster once more: after the search they are taken over one group after
      the other, the largest gain first, and stay where the whole program gets faster by it than it ever was. Gains
      that were noise, or that do not add up, go.
    """
    if binding not in _BOUND:
        raise ValueError(f"tune: binding={binding!r}; wanted one of {', '.join(map(repr, _BOUND))}.")
    spaces = {name: space[name] if isinstance(space, Mapping) else space for name in maps}
    everywhere = dict.fromkeys(maps, default)
    default_seconds = measure(everywhere)
    best, gains, trials = dict(everywhere), dict.fromkeys(maps, 0.0), []
    total = sum(len(spaces[name]) for name in maps) * len(_BOUND[binding])
    with tqdm(total=total, desc="tuning", unit="trial", disable=None if progress else True) as bar:
        for name in maps:
            for products in _BOUND[binding]:
                least = default_seconds
                for candidate in spaces[name]:
                    changed = dataclasses.replace(default, **dict.fromkeys(products, candidate))
                    seconds = measure(everywhere | {name: changed})
                    trials.append((name, "+".join(products), describe(candidate), seconds))
                    if seconds < least:
                        least = seconds
                        best[name] = dataclasses.replace(best[name], **dict.fromkeys(products, candidate))
                    bar.update()
                    bar.set_postfix_str(f"{name}: {describe(candidate)} {seconds * 1e3:.3g} ms")
                gains[name] += default_seconds - least
    tuned, tuned_seconds = everywhere, default_seconds
    for name in sorted((name for name in maps if gains[name]), key=gains.__getitem__, reverse=True):
        seconds = measure(tuned | {name: best[name]})
        if seconds < tuned_seconds:
            tuned, tuned_seconds = tuned | {name: best[name]}, seconds
    described = {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "binding": binding}
    return Tuning(
        tuple(tuned.items()),
        objective,
        default_seconds,
        tuned_seconds,
        described | dict(provenance or {}),
        tuple(trials),
    )


def timed(program: Callable[[Mapping[str, Dataflows]], Callable[[], Any]], runs: int = 5):
    """A measure by the clock: the least of `runs` calls of program(dataflows), after one that compiles.

    What disturbs a run only adds to it, so the least is steadier than the median.
    """

    def measure(dataflows: Mapping[str, Dataflows]) -> float:
        run = program(dataflows)
        jax.block_until_ready(run())
        seconds = []
        for _ in range(runs):
            begin = time.perf_counter()
            jax.block_until_ready(run())
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    return measure


@dataclasses.dataclass(frozen=True)
class CostModel:
    """A measure without a clock: the roofline of what each dataflow executes and moves, layer by layer.

    seconds = sum over products of max(2 rows C D / flops, bytes / bandwidth), plus the preparation of each map.
    Tuned for order, not for milliseconds.

    Attributes:
      maps: one typical kernel map per group, concrete.
      layers: (map, Cin, Cout) of every convolution.
      device: a name in `DEVICES`.
      training: count dgrad and wgrad too.
      itemsize: bytes per number.
    """

    maps: Mapping[str, KernelMap]
    layers: Sequence[tuple[str, int, int]]
    device: str
    training: bool = False
    itemsize: int = 2
    _known: dict[tuple[str, Dataflows], float] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __call__(self, dataflows: Mapping[str, Dataflows]) -> float:
        """Seconds."""
        groups = [(name, dataflows[name]) for name in self.maps]
        for group in groups:
            if group not in self._known:
                self._known[group] = self._group(*group)
        return sum(self._known[group] for group in groups)

    def _group(self, name: str, flows: Dataflows) -> float:
        kernel_map, chip = self.maps[name], DEVICES[self.device]
        prepared = jax.jit(prepare, static_argnums=(3, 4))(
            kernel_map.table, kernel_map.transposed, kernel_map.count, flows, kernel_map.identity
        )
        rows = {key: int(value) for key, value in jax.jit(executed)(prepared).items()}
        offsets, outputs = kernel_map.table.shape
        inputs = kernel_map.transposed.shape[1]
        total = 0.0
        for product in ("forward", "dgrad", "wgrad") if self.training else ("forward",):
            flow: Dataflow = getattr(flows, product)
            total += self._preparation(flow, offsets * outputs * 4)
            for group, c, d in self.layers:
                if group != name:
                    continue
                read, written, reads, writes = (
                    (c, d, inputs, outputs) if product != "dgrad" else (d, c, outputs, inputs)
                )
                moved = (reads * read + offsets * c * d) * self.itemsize + writes * written * self.itemsize
                moved += rows[product] * 4  # the map's entries
                passes = 1.0
                if flow.kind == "sorted" and product != "wgrad":
                    moved += 2 * flow.splits * writes * written * 4
                    passes += flow.splits
                if flow.kind in ("gather_scatter", "fetch_on_demand") and product != "wgrad":
                    moved += 2 * rows["needed"] * written * 4
                if flow.kind == "gather_scatter":
                    moved += 2 * rows["needed"] * read * self.itemsize
                    passes = len(flow.groups) or offsets
                compute = 2 * rows[product] * c * d / chip.flops
                total += max(compute, moved / chip.bandwidth) + passes * chip.launch
        return total

    def _preparation(self, flow: Dataflow, table_bytes: int) -> float:
        """Passes over the map: of a sort some twenty, of compaction a few."""
        passes = {"unsorted": 0, "tile_skip": 1, "sorted": 20, "fetch_on_demand": 4, "gather_scatter": 4}[flow.kind]
        chip = DEVICES[self.device]
        return passes * (table_bytes / chip.bandwidth + chip.launch)


def describe(flow: Dataflow) -> str:
    """A dataflow in a few words."""
    splits = f" {flow.splits}" if flow.kind == "sorted" else ""
    groups = f" {len(flow.groups)} groups" if flow.groups else ""
    return f"{flow.kind}{splits}{groups} / {flow.tile}"


def _dataflow(values: Mapping[str, Any]) -> Dataflow:
    return Dataflow(**{**values, "groups": tuple(tuple(group) for group in values.get("groups", ()))})
