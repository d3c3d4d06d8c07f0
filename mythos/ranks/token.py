"""The secret by which the ranks of a `mythos data` job recognise each other, without torch and its process group.

1. MYTHOS_JOB_TOKEN, if it is set, the same for all ranks (slurm/data_prep.sh does so).
2. Under mpiexec, a value that rank 0 broadcasts when the ranks meet.
3. Otherwise, under a plain srun for example, a file in the home directory, which only the user can read. Rank 0 writes
   it when it listens and removes it at the end; a file that a killed job has left is replaced.

Training needs none: its ranks trust the network as torch does, and recognise each other by the numbers of their job.

Other users can read neither an environment nor such a file. Processes that one process starts need no secret: they
inherit their connection.
"""

import os
import secrets
from pathlib import Path

from mythos.errors import UserError, os_errors_as_user_errors
from mythos.ranks.world import World

REMEDY = "set MYTHOS_JOB_TOKEN to a secret of your own, the same for all ranks"


def new_token(world: World) -> str:
    """The secret of a job whose rank 0 this process is."""
    return world.token or secrets.token_hex(16)


def publish_token(world: World, token: str) -> None:
    """Write the file, if the ranks share no secret yet. Raises UserError if it cannot be written."""
    if world.token is None:
        path = token_file(world)
        with os_errors_as_user_errors(path, REMEDY):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(token)


def read_token(world: World) -> str:
    """The secret that rank 0 has published. Raises OSError while its file is missing."""
    return token_file(world).read_text(encoding="utf-8") if world.token is None else world.token


def remove_token(world: World) -> None:
    """Remove the file, if there is one. Raises OSError."""
    if world.token is None:
        token_file(world).unlink(missing_ok=True)


def token_file(world: World) -> Path:
    """Named after the job and the place where its ranks meet, which are the same for all of them."""
    try:
        home = Path.home()
    except RuntimeError as error:
        raise UserError(f"this user has no home directory for the job's secret: {REMEDY}") from error
    name = "-".join(["job", world.address, str(world.port), *world.job.split()])
    return home / ".cache" / "mythos" / f"{name}.token"
