"""Many devices: a mesh with the axes `data` and `row`, and what of a training step lies where on it.

`data` splits the batch. The step is one program over the whole batch, and the compiler splits it (`jax.jit` with
shardings): means, BatchNorm statistics, quantization errors, least squares and element counts stay those of the whole
batch, as on one device. `row` splits the rows. Operations run rows one by one (see ops.py), in one program on one device;
what no compiler splits is split here, by `jax.shard_map` over `row` alone: each device runs its own rows, and the sum of the
gradients is all that passes between them. A mesh of one device is the same code, and the same program as without a mesh:
nothing is said of what lies where.

Between steps the state lies on the mesh. Between stages values are whole, on every process the same.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpq_jax import processes
from mpq_jax.config import Parallel
from mpq_jax.types import Refusal

DATA, ROW = "data", "row"
SMALL = 1024  # elements: parameters below stay whole on every device


class Layout(NamedTuple):
    """mesh: [data, row] devices. fsdp: whether parameters are split over `data`."""

    mesh: Mesh
    fsdp: bool = False

    @property
    def data(self) -> int:
        return self.mesh.shape[DATA]

    @property
    def row(self) -> int:
        return self.mesh.shape[ROW]


def layout(settings: Parallel) -> Layout:
    """The mesh that `settings` ask for. Raises Refusal, naming what fits, where the devices are too few or left over."""
    devices, found = processes.in_order(jax.devices()), jax.device_count()
    if settings.row < 1 or settings.data < 0:
        raise Refusal(
            f"--parallel.data {settings.data} --parallel.row {settings.row}: give numbers from 1 (data: or 0, all)"
        )
    data = settings.data or max(1, found // settings.row)
    count = data * settings.row
    if count > found or (count < found and jax.process_count() > 1):
        why = "more than" if count > found else "fewer than"
        fits = ", ".join(f"{found // r}x{r}" for r in range(1, found + 1) if found % r == 0)
        raise Refusal(
            f"--parallel.data {data} --parallel.row {settings.row} is {count} devices, {why} the {found} there are; "
            f"data x row may be {fits}"
        )
    made = Layout(Mesh(np.array(devices[:count]).reshape(data, settings.row), (DATA, ROW)), settings.fsdp)
    block(made)
    return made


def block(layout: Layout) -> tuple[int, int]:
    """(index, count): this process reads block `index` of `count` of every batch. Processes that share rows read the same."""
    mine = [d for d, devices in enumerate(layout.mesh.devices) if any(_is_mine(device) for device in devices)]
    size = len(mine)
    if layout.data % size or mine[0] % size or mine != list(range(mine[0], mine[0] + size)):
        raise Refusal(
            f"{layout.row} devices for the rows leave process {jax.process_index()} no even part of a batch; choose a "
            "--parallel.row that divides a host's devices, or is a multiple of them"
        )
    return mine[0] // size, layout.data // size


def _is_mine(device: Any) -> bool:
    return device.process_index == jax.process_index()


def check_rows(layout: Layout, rows: int, at_a_time: int = 0) -> None:
    """Refuses rows that the row axis does not divide, naming what does; at_a_time: rows_at_a_time, of each device."""
    if rows % layout.row:
        fits = [n for n in range(1, rows + 1) if rows % n == 0]
        raise Refusal(f"--parallel.row {layout.row} does not divide the {rows} rows; choose one of {fits}")
    here = rows // layout.row
    if at_a_time and here % at_a_time:
        fits = [n for n in range(1, here + 1) if here % n == 0]
        raise Refusal(f"rows_at_a_time={at_a_time} does not divide the {here} rows of a device; choose one of {fits}")


def check_batch(layout: Layout, size: int, option: str) -> None:
    """Refuses a batch that the data axis does not divide."""
    if size % layout.data:
        below = size - size % layout.data
        fits = " or ".join(str(n) for n in (below, below + layout.data) if n)
        raise Refusal(f"--{option} {size} cannot be split over --parallel.data {layout.data}; choose {fits}")


def up_to(layout: Layout, size: int) -> int:
    """The least batch size from `size` on that the data axis divides."""
    return -(-size // layout.data) * layout.data


# ---- what lies where ----------------------------------------------------------------------------------------------


def _whole(layout: Layout) -> NamedSharding:
    return NamedSharding(layout.mesh, PartitionSpec())


def _parameter(layout: Layout, leaf: Any) -> NamedSharding:
    """Whole on every device; with fsdp the longest axis that `data` divides is split over it."""
    shape = jnp.shape(leaf)
    fits = [i for i, n in enumerate(shape) if n % layout.data == 0] if layout.fsdp and layout.data > 1 else []
    if not fits or np.prod(shape) < SMALL:
        return _whole(layout)
    longest = max(fits, key=lambda i: shape[i])
    return NamedSharding(layout.mesh, PartitionSpec(*(DATA if i == longest else None for i in range(len(shape)))))


def state_shardings(layout: Layout, state: Any) -> Any:
    """The sharding of every leaf of a TrainState: rows over `row`; the rest like parameters.

    A state whose rows the row axis does not divide (fine-tuning's one row) is whole.
    """
    shardings = jax.tree.map(lambda leaf: _parameter(layout, leaf), state)
    if layout.row == 1:
        return shardings._replace(rows=jax.tree.map(lambda _: _whole(layout), state.rows)) if layout.fsdp else shardings
    count = jax.tree.leaves(state.rows)[0].shape[0]
    over = PartitionSpec(ROW) if count % layout.row == 0 else PartitionSpec()
    return shardings._replace(rows=jax.tree.map(lambda _: NamedSharding(layout.mesh, over), state.rows))


def place(layout: Layout, tree: Any, shardings: Any = None) -> Any:
    """A whole tree, the same on every process, on the mesh. shardings: of each leaf; None: whole everywhere.

    On one device it is left as it came: the device that a compiled function takes it to is that one.
    """
    if layout.mesh.size == 1:
        return tree
    shardings = jax.tree.map(lambda _: _whole(layout), tree) if shardings is None else shardings
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    # Each process makes its own part of what all of them hold; nothing is sent.
    return jax.tree.map(_from_copy, tree, shardings)


def _from_copy(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _from_copy(jax.random.key_data(leaf), sharding)
        return jax.jit(lambda x: jax.random.wrap_key_data(x, impl=jax.random.key_impl(leaf)))(data)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def place_state(layout: Layout, state: Any) -> Any:
    """A copy of a whole state, laid out on the mesh."""
    # Steps consume their state; the caller's arrays stay.
    copied = jax.tree.map(jnp.copy, state)
    if layout.mesh.size == 1:
        # On that device by name, as a step's results are that has seen one array of a checkpoint: else the second step
        # would be compiled again.
        return jax.device_put(copied, layout.mesh.devices.item())
    return place(layout, copied, state_shardings(layout, state))


def place_batch(layout: Layout, batch: Any) -> Any:
    """This process's block of a batch as part of the whole one, split over `data`; on one device as it came."""
    if layout.mesh.size == 1:
        return batch
    sharding = NamedSharding(layout.mesh, PartitionSpec(DATA))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    _, blocks = block(layout)

    def part(x: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), (len(x) * blocks, *np.shape(x)[1:]))

    return jax.tree.map(part, batch)


def whole(layout: Layout, tree: Any) -> Any:
    """A tree from the mesh, whole and on this process's first device."""
    if layout.mesh.size == 1:
        return tree
    return jax.tree.map(lambda x: x.addressable_data(0), _gather(layout)(tree))


@functools.cache
def _gather(layout: Layout) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=_whole(layout))


# ---- the step -----------------------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """`function`, compiled, with what it returns whole on every device."""
    return jax.jit(function) if layout.mesh.size == 1 else jax.jit(function, out_shardings=_whole(layout))


def laid_out(step: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """A step of joint's signature whose state stays laid out as it came, with metrics whole on every device."""
    if layout.mesh.size == 1:
        return step

    def constrained(state: Any, *arguments: Any) -> Any:
        state, metrics = step(state, *arguments)
        state = jax.lax.with_sharding_constraint(state, state_shardings(layout, state))
        return state, jax.lax.with_sharding_constraint(metrics, _whole(layout))

    return constrained


def by_rows(gradients: Callable[..., Any], layout: Layout | None) -> Callable[..., Any]:
    """gradients(state, policies, own, batch, rngs) -> ((shared, affine [P]), losses [P], stats [P], moved), rows over `row`.

    Each device sees its rows of state, policies and the rows' own samples; `shared` and `moved`, sums over rows, are summed over devices.
    """
    if layout is None or layout.row == 1:
        return gradients

    def local(*arguments: Any) -> Any:
        (shared, affine), losses, stats, moved = gradients(*arguments)
        shared, moved = jax.lax.psum((shared, moved), ROW)
        return (shared, affine), losses, stats, moved

    def split(state: Any, policies: Any, own: Any, batch: Any, rngs: Any) -> Any:
        rows = jax.tree.leaves(state.rows)[0].shape[0]
        if policies is None or rows % layout.row:
            # One row, of float training or fine-tuning: over data alone.
            return gradients(state, policies, own, batch, rngs)
        one, every = PartitionSpec(), PartitionSpec(ROW)
        mapped = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(type(state)(one, every, one, one, one), every, every, one, one),
            out_specs=((one, every), every, every, one),
            axis_names={ROW},
            check_vma=False,
        )
        return mapped(state._replace(optimizer=(), average=None), policies, own, batch, rngs)

    return split


def rows_everywhere(tree: Any, layout: Layout | None) -> tuple[Any, Any]:
    """Inside `by_rows`: (the rows [P_local, ...] of all devices as [P, ...], the number of this device's first row)."""
    if layout is None or layout.row == 1:
        return tree, 0
    here = jax.tree.leaves(tree)[0].shape[0]
    return jax.lax.all_gather(tree, ROW, tiled=True), here * jax.lax.axis_index(ROW)
