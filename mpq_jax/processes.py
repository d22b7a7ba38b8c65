"""Several processes of one run: starting them, who writes and prints (process 0), and what all must agree on.

Nothing here imports JAX until a run asks for several processes, so that refusals stay quick.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

import numpy as np

from mpq_jax.config import Parallel
from mpq_jax.types import Refusal

HEARTBEAT = 30  # seconds of silence after which a process counts as lost
# Milliseconds to wait for process 0, which may prepare a data set or write a report; its loss ends that sooner.
LONG = 7 * 24 * 3600 * 1000
Value = TypeVar("Value")

_said = itertools.count()  # what `from_first` has sent: all processes send the same in the same order


@contextlib.contextmanager
def started(settings: Parallel) -> Iterator[None]:
    """Joins the run's other processes, if `settings` ask for any; standard output is process 0's alone.

    Where another process is lost this one ends with exit code 2 and a line of advice if JAX raises, as collective
    operations do whose connection breaks. Else JAX's coordination service ends it with many lines: after `HEARTBEAT`
    seconds without a sign of another process, and at once where process 0, which runs that service, is gone.
    Behind the block each process is `alone`.
    """
    if not (settings.distributed or settings.coordinator):
        yield
        return
    import jax

    _initialize(settings)
    stdout = sys.stdout if first() else _nowhere()
    try:
        with contextlib.redirect_stdout(stdout):
            yield
            # Process 0 may still be writing; JAX's own farewell does not wait for long.
            _client().wait_at_barrier("mpq_jax/end", LONG)
            _farewell()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not lost_another(error):
            raise
        reason = str(error).splitlines()[0][:200]
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} cannot go on, most likely because another was "
            f"lost ({reason}); start all of them again: the run goes on from its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        # An ordinary exit would wait for the lost process to say goodbye.
        os._exit(2)


def _farewell() -> None:
    """Behind the last barrier: process 0 goes when the others have said that they are past it, too.

    It runs the service that tells them. Gone before one of four was told, that one took it for lost; so does one that still
    listens to the service, which is why all take their leave of it here, and not at an exit that a program may cut short.
    All is done by now: whoever falls silent here loses nothing, and is not waited for beyond twice `HEARTBEAT`.
    """
    import jax

    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if first():
            for i in range(1, jax.process_count()):
                _client().blocking_key_value_get(f"mpq_jax/past/{i}", HEARTBEAT * 1000)
        else:
            _client().key_value_set(f"mpq_jax/past/{jax.process_index()}", "")
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()


def lost_another(error: BaseException) -> bool:
    """Whether an error is what a collective operation, or JAX's coordination service, raises where a process is gone.

    Of CPUs the former is a ValueError where the operation ran at once, and a JaxRuntimeError where its result was waited for.
    """
    if alone():
        return False
    import jax

    codes = ("UNKNOWN: ", "UNAVAILABLE: ", "INTERNAL: ", "ABORTED: ", "CANCELLED: ", "DEADLINE_EXCEEDED: ")
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" not in str(error)
    return isinstance(error, ValueError) and str(error).startswith(codes)


def _initialize(settings: Parallel) -> None:
    import jax

    given: dict[str, Any] = {}
    if settings.coordinator:
        host, _, port = settings.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise Refusal(f"--parallel.coordinator is {settings.coordinator!r}; write host:port of process 0")
        if not 0 <= settings.process < settings.processes:
            raise Refusal(
                f"--parallel.coordinator needs --parallel.processes N and --parallel.process 0 to N-1; found "
                f"{settings.processes} and {settings.process}"
            )
        given = {
            "coordinator_address": settings.coordinator,
            "num_processes": settings.processes,
            "process_id": settings.process,
        }
    # JAX would take SIGTERM for itself; stopping.py has it, and `agreement` tells the others.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT, initialization_timeout=120
        )
    except (ValueError, RuntimeError) as error:
        raise Refusal(
            f"the run's processes did not find each other ({str(error).splitlines()[0][:160]}); where JAX cannot find "
            "them by itself, give each --parallel.coordinator HOST:PORT --parallel.processes N --parallel.process I"
        ) from None


def alone() -> bool:
    """Whether there is one process only; found without importing JAX where nothing else has."""
    if "jax" not in sys.modules:
        return True
    import jax

    return not jax.distributed.is_initialized() or jax.process_count() == 1


def first() -> bool:
    """Whether this is the process that writes files and prints."""
    import jax

    return alone() or jax.process_index() == 0


def error_stream() -> TextIO:
    """Standard error for what only process 0 should say, such as progress."""
    return sys.stderr if first() else _nowhere()


def in_order(devices: Sequence[Any]) -> list[Any]:
    """Devices, process by process: in JAX's own order those of a TPU slice's hosts can alternate, and a batch would be shared
    out in pieces."""
    return sorted(devices, key=lambda device: device.process_index)


def _client() -> Any:
    """JAX's coordination service. Collective operations are no way to wait for process 0: their connections give up when one
    comes half a minute after another."""
    from jax._src import distributed  # as orbax does; there is no public name

    return distributed.global_state.client


@functools.cache
def _nowhere() -> TextIO:
    return io.TextIOWrapper(io.FileIO(os.devnull, "w"))


def from_first(value: Value) -> Value:
    """Process 0's `value`, on all of them, which wait for it: anything that JSON holds."""
    if alone():
        return value
    key = f"mpq_jax/{next(_said)}"
    if first():
        _client().key_value_set(key, json.dumps(value))
    return json.loads(_client().blocking_key_value_get(key, LONG))


def first_only(make: Callable[[], Value]) -> Value | None:
    """make() on process 0; None on the others, which wait for it. Where process 0 fails all do, with what it says."""
    if alone():
        return make()
    made, failure = None, None
    if first():
        try:
            made = make()
        except Exception as error:
            failure = error
    told = from_first(str(failure) or type(failure).__name__ if failure else "")
    if failure:
        raise failure
    if told:
        raise Refusal(told)
    return made


def first_alone(make: Callable[[], Value]) -> Value:
    """make() on process 0 before any other, for what makes files that the others then find."""
    made = first_only(make)
    return made if first() else make()  # type: ignore[return-value]


def agreement(ahead: int) -> Callable[[bool], bool]:
    """agreed(flag): whether any process gave True `ahead` calls ago or before; all processes learn it at the same call.

    For decisions in a loop of steps, of which `ahead` are under way: nothing waits for the answer. One process decides
    at once.
    """
    if alone():
        return lambda flag: flag
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(in_order(jax.devices())), ("all",))
    everyone = jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    local = np.zeros(jax.local_device_count(), bool)
    under_way: list[jax.Array] = []

    def agreed(flag: bool) -> bool:
        flags = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("all")), local | flag)
        under_way.append(everyone(flags))
        return len(under_way) > ahead and bool(under_way.pop(0))

    return agreed
