"""Several processes, on one host or many, that run one model together: JAX's own runtime, with bounds on waiting.

Every process calls `initialize`, then the same program: `make_mesh` sees the devices of all, `load` and `random_model`
fill the shards of a process's own, and `generate` returns the same tokens everywhere.
"""

import jax

# JAX's own default of 100 s would leave the others waiting for longer than a minute when a process hangs or dies.
HEARTBEAT_TIMEOUT_SECONDS = 30


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout_seconds: int = HEARTBEAT_TIMEOUT_SECONDS,
) -> None:
    """Joins the processes; to be called in each of them before JAX is used for anything else.

    When a process dies, what the others wait for on a CPU fails at once with a `jax.errors.JaxRuntimeError`; where the
    transport does not notice (NCCL, a process that hangs), the runtime ends them with a message that names the lost
    process, `heartbeat_timeout_seconds` after its last sign of life. Nothing waits for ever.

    Args:
      coordinator_address: "HOST:PORT" of process 0, the same in all; None: all three from Slurm or Open MPI, as
        `jax.distributed.initialize` finds them.
      num_processes: how many there are.
      process_id: this one, from 0.
      heartbeat_timeout_seconds: silence after which a process counts as dead; at exit, how long to wait for the others.

    Raises `ValueError` where only some of the three are given, or one is out of range.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise ValueError(f"{', '.join(missing)}: must be given, or none of {', '.join(given)}")
    else:
        assert coordinator_address is not None
        assert num_processes is not None
        assert process_id is not None
        host, _, port = coordinator_address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ValueError(f"coordinator_address={coordinator_address!r}: must be HOST:PORT")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"process_id={process_id}: must be between 0 and num_processes - 1 = {num_processes - 1}")
    if heartbeat_timeout_seconds < 1:
        raise ValueError(f"heartbeat_timeout_seconds={heartbeat_timeout_seconds}: must be at least 1")
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=heartbeat_timeout_seconds,
        shutdown_timeout_seconds=heartbeat_timeout_seconds,
    )
