"""The products of a sparse convolution in plain JAX, one function per family of dataflows: what runs without a kernel.

All loops over tiles and pairs end where the data does (dynamic trip counts), so the work is what the dataflow executes
and not what the shapes would allow. Products accumulate in float32 in a fixed order.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_convolution.kernel_map import Dataflow, Pairs, Tiles


def product(x, w, table, preparation, dataflow: Dataflow, identity: int | None = None):
    """y[i] = sum_k x[table[k, i]] @ w[k], float32 [M, D]; entries of -1 add nothing.

    Args:
      x: [N, C]. Rows that no entry names are never read.
      w: [K, C, D].
      table: int32 [K, M].
      preparation: of the table for the dataflow.
      dataflow: see `Dataflow`.
      identity: see `KernelMap`.
    """
    if isinstance(preparation, Pairs):
        y = jnp.zeros((table.shape[1], w.shape[2]), jnp.float32)
        if identity is not None:
            y = _own_rows(x, w[identity], y, table[identity])
        return _scattered(x, w, y, preparation, dataflow)
    x = _with_zero_row(x)
    if preparation is None:
        return _unsorted(x, w, table)
    parts = [_tiled(x, w[slice(*part.offsets)], part, table.shape[1]) for part in preparation]
    return functools.reduce(jnp.add, parts)


def weight_gradient(x, dy, table, preparation, dataflow: Dataflow, identity: int | None = None):
    """dw[k] = sum_i x[table[k, i]]ᵀ dy[i], float32 [K, C, D].

    Args:
      x: [N, C].
      dy: [M, D], zero in rows that read nothing.
      table, preparation, dataflow, identity: as for `product`.
    """
    if isinstance(preparation, Pairs):
        dw = _gradient_of_pairs(_with_zero_row(x), _with_zero_row(dy), preparation, dataflow.tile)
        if identity is None:
            return dw
        return dw.at[identity].set(_own_gradient(x, dy, table[identity]))
    x = _with_zero_row(x)
    if preparation is None:
        return jax.lax.map(lambda rows: _multiply(x[rows].T, dy), table)
    return jnp.concatenate([_gradient_of_tiles(x, dy, part) for part in preparation])


def _with_zero_row(x):
    """A last row of zeros: index -1 reads it."""
    return jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])


def _own_rows(x, weight, y, rows):
    """y with x @ weight in the tiles that hold rows that read themselves; those come first. The rest is padding."""
    tile = _whole_tile(len(rows))

    def write(i, y):
        begin = i * tile
        return jax.lax.dynamic_update_slice_in_dim(y, _multiply(_used(x, rows, begin, tile), weight), begin, 0)

    return jax.lax.fori_loop(0, -(-(rows >= 0).sum(dtype=jnp.int32) // tile), write, y)


def _own_gradient(x, dy, rows):
    tile = _whole_tile(len(rows))

    def add(i, total):
        part = jax.lax.dynamic_slice_in_dim(dy, i * tile, tile)
        return total + _multiply(_used(x, rows, i * tile, tile).T, part)

    start = jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, -(-(rows >= 0).sum(dtype=jnp.int32) // tile), add, start)


def _whole_tile(rows: int) -> int:
    """A number of rows that divides all of them."""
    return next(size for size in (1024, 512, 256, 128, rows) if rows % size == 0)


def _used(x, rows, begin, length: int):
    """A tile of x, zero in rows that do not read themselves."""
    x, rows = (jax.lax.dynamic_slice_in_dim(a, begin, length) for a in (x, rows))
    return jnp.where((rows >= 0)[:, None], x, 0)


def _multiply(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _unsorted(x, w, table):
    def add(y, rows_and_weight):
        rows, weight = rows_and_weight
        return y + _multiply(x[rows], weight), None

    y = jnp.zeros((table.shape[1], w.shape[2]), jnp.float32)
    return jax.lax.scan(add, y, (table, w))[0]


def _tiled(x, w, part: Tiles, outputs: int):
    """Offset by offset, the tiles that have it: the weight stays, and a tile of y is read and written in one piece."""
    tile = part.table.shape[1] // part.tiles.shape[1]

    def visit(y, per_offset):
        table, weight, tiles, count = per_offset

        def add(i, y):
            begin = tiles[i] * tile
            rows = jax.lax.dynamic_slice_in_dim(table, begin, tile)
            total = jax.lax.dynamic_slice_in_dim(y, begin, tile) + _multiply(x[rows], weight)
            return jax.lax.dynamic_update_slice_in_dim(y, total, begin, 0)

        return jax.lax.fori_loop(0, count, add, y), None

    y = jnp.zeros((part.table.shape[1], w.shape[2]), jnp.float32)
    y = jax.lax.scan(visit, y, (part.table, w, part.tiles, part.tile_counts))[0][:outputs]
    if part.order is None:
        return y
    place = jnp.zeros_like(part.order).at[part.order].set(jnp.arange(outputs, dtype=jnp.int32), unique_indices=True)
    return y[place]


def _scattered(x, w, y, pairs: Pairs, dataflow: Dataflow):
    """y plus, group by group, chunks of the pairs of every offset in it: gather, one batched product, scatter-add.

    Pairs beyond an offset's count read some row and write nowhere.
    """
    tile, outputs = dataflow.tile, y.shape[0]
    pad = ((0, 0), (0, -pairs.inputs.shape[1] % tile))
    inputs = jnp.pad(jnp.maximum(pairs.inputs, 0), pad)
    targets = jnp.pad(jnp.where(pairs.outputs < 0, outputs, pairs.outputs), pad, constant_values=outputs)

    def visit(y, group):  # the group's offsets
        weight, counts = w[group], pairs.counts[group]

        def add(i, y):
            rows, places = (
                jnp.stack([jax.lax.dynamic_slice(a, (offset, i * tile), (1, tile))[0] for offset in group])
                for a in (inputs, targets)
            )
            parts = _multiply(x.at[rows].get(mode="promise_in_bounds"), weight)  # [g, tile, D]
            for place, part in zip(places, parts, strict=True):  # within an offset no row comes twice
                y = y.at[place].add(part, mode="drop", unique_indices=True)
            return y

        return jax.lax.fori_loop(0, -(-counts.max() // tile), add, y)

    if not dataflow.groups:
        each = jnp.arange(w.shape[0])[:, None]
        return jax.lax.scan(lambda y, one: (visit(y, one), None), y, each)[0]
    for group in dataflow.groups:
        y = visit(y, jnp.asarray(group))
    return y


def _gradient_of_tiles(x, dy, part: Tiles):
    tile = part.table.shape[1] // part.tiles.shape[1]
    if part.order is not None:
        dy = dy[part.order]
    dy = jnp.pad(dy, ((0, part.table.shape[1] - dy.shape[0]), (0, 0)))

    def one(per_offset):
        table, tiles, count = per_offset

        def add(i, total):
            begin = tiles[i] * tile
            rows = x[jax.lax.dynamic_slice_in_dim(table, begin, tile)]
            return total + _multiply(rows.T, jax.lax.dynamic_slice_in_dim(dy, begin, tile))

        return jax.lax.fori_loop(0, count, add, jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32))

    return jax.lax.map(one, (part.table, part.tiles, part.tile_counts))


def _gradient_of_pairs(x, dy, pairs: Pairs, tile: int):
    pad = ((0, 0), (0, -pairs.inputs.shape[1] % tile))
    inputs, outputs = (jnp.pad(rows, pad, constant_values=-1) for rows in (pairs.inputs, pairs.outputs))

    def one(per_offset):
        inputs, outputs, count = per_offset

        def add(i, total):
            rows, places = (jax.lax.dynamic_slice_in_dim(a, i * tile, tile) for a in (inputs, outputs))
            return total + _multiply(x[rows].T, dy[places])

        return jax.lax.fori_loop(0, -(-count // tile), add, jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32))

    return jax.lax.map(one, (inputs, outputs, pairs.counts))
