"""A lease on a workdir: one run at a time, and the second is told who has it.

`WORKDIR/lease.json` names the holder, which touches it every few seconds. Whoever finds it asks
whether the holder lives: on the same machine by its process, from elsewhere by watching the file
for longer than a living holder would leave it alone. Only the watcher's own clock counts, and only
whether the file changes: clocks of two machines are never compared. The file is created, taken
over, renewed and released under a lock on `lease.lock`, which the kernel lets go with its process,
so a kill at any moment leaves nothing that stays closed.
"""

import contextlib
import errno
import fcntl
import getpass
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

log = logging.getLogger(__name__)

FILE, LOCK = "lease.json", "lease.lock"
INTERVAL = 10.0  # seconds between two renewals
EXPIRY = 60.0  # seconds of silence after which a holder elsewhere counts as dead
LOST = 3  # exit status of a process whose lease another run has taken over

_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "RAY_JOB_ID")
# What a file system says that has no locks; there the last writer wins, and the other one finds out
# when it renews.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class LeaseError(ValueError):
    """Another run holds the workdir; the message names it."""


def _read(path: str) -> str:
    """A file of the kernel's, or nothing where this is no Linux."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def process_started(pid: int) -> str:
    """When a process of this machine began, in ticks since its boot; empty where it has ended.
    Numbers of processes are given out again, these two together are not."""
    # The name before it stands in brackets and may hold any character.
    state, *values = _read(f"/proc/{pid}/stat").rpartition(")")[2].split() or [""]
    return "" if state in ("", "Z", "X") else values[18]


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        token: random, of this lease alone.
        process: `process_started` of `pid`.
        machine: identity of the machine's boot and of the namespace that `pid` counts in; empty
            where they can't be known.
    """

    token: str
    host: str
    pid: int
    process: str
    user: str
    job: str
    since: str
    machine: str

    @classmethod
    def here(cls) -> "Holder":
        """This process, with a new token."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user may have a number alone
            user = str(os.getuid())
        boot = _read("/proc/sys/kernel/random/boot_id")
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            process=process_started(os.getpid()),
            user=user,
            job=next((os.environ[name] for name in _JOB_VARIABLES if name in os.environ), ""),
            since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            machine=f"{boot} {os.readlink('/proc/self/ns/pid')}" if boot else "",
        )

    @property
    def on_this_machine(self) -> bool:
        return bool(self.machine) and self.machine == Holder.here().machine

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} of {self.user} on {self.host}{job}, since {self.since}"


_UNREADABLE = Holder("", "an unknown host", 0, "", "an unknown user", "", "?", "")


class Lease:
    """Holds a workdir while its `with` lasts."""

    def __init__(
        self,
        workdir: str | Path,
        on_lost: Callable[[str], None] | None = None,
        interval: float = INTERVAL,
        expiry: float = EXPIRY,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """Args:
        on_lost: called, from the thread that renews, when another run has taken over, with a
            message; it must end the process at once. By default the message goes to stderr and the
            process ends with status 3.
        interval: seconds between renewals.
        expiry: seconds of silence after which a holder elsewhere is taken for dead.
        clock, wait: the clock of a watch, and how it passes the time.
        """
        self.path = Path(workdir).absolute() / FILE
        self.holder = Holder.here()
        self.interval, self.expiry = interval, expiry
        self._on_lost = on_lost or _end_process
        self._clock, self._wait = clock, wait
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_always, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Raises:
        LeaseError: a living run holds the workdir.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while (found := self._take(None)) is not None:
            if self._is_dead(*found) and self._take(found[0].token) is None:
                log.warning("took the workdir over from %s, which has ended", found[0])
                break
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with self._locked():
            found = self._look()
            if found and found[0] == self.holder:
                self.path.unlink()

    def check(self) -> None:
        """Renews the lease, and calls `on_lost` where it is another's."""
        with self._locked():
            found = self._look()
            if found and found[0] == self.holder:
                os.utime(self.path)
                return
        who = f"taken over by {found[0]}" if found else "removed"
        self._on_lost(f"{self.path} was {who}: this run no longer holds the workdir, and ends")

    def _renew_always(self) -> None:
        while not self._ended.wait(self.interval):
            try:
                self.check()
            except OSError as e:  # who can't write can't be seen to have lost it either
                log.warning("%s could not be renewed: %s", self.path, e)

    def _take(self, dead: str | None) -> tuple[Holder, int] | None:
        """Writes this run's lease where there is none, or over that of the dead holder with this
        token. Returns what else is there, None where the lease is ours."""
        with self._locked():
            found = self._look()
            if found and found[0].token != dead:
                return found
            # Complete before it has its name, so that nobody ever reads half of it.
            partial = self.path.with_name(f"{FILE}.new")
            partial.write_text(json.dumps(asdict(self.holder), indent=1))
            if found:
                partial.replace(self.path)
            else:
                # Where a lock does not reach other machines, a link still fails for the second.
                with contextlib.suppress(FileExistsError):
                    os.link(partial, self.path)
                partial.unlink()
            now = self._look()
        return None if now and now[0] == self.holder else now

    def _look(self) -> tuple[Holder, int] | None:
        """The holder and the time of its last renewal, None where there is no lease."""
        try:
            # Opened, not only asked for: NFS shows another machine's changes at that moment.
            with self.path.open() as file:
                changed = os.fstat(file.fileno()).st_mtime_ns
                stored = json.load(file)
            return Holder(**{f.name: stored[f.name] for f in fields(Holder)}), changed
        except FileNotFoundError:
            return None
        except (json.JSONDecodeError, KeyError, TypeError):
            return _UNREADABLE, changed

    def _is_dead(self, holder: Holder, changed: int) -> bool:
        """Whether the holder has ended; False too where its lease has gone or is another's now.

        Raises:
            LeaseError: it lives.
        """
        busy = f"{self.path.parent} is in use by {holder}: end that run, or use another --workdir"
        if holder.on_this_machine:
            if process_started(holder.pid) == holder.process:
                raise LeaseError(busy)
            return True
        log.warning("%s was left by %s: watching for %.0f s whether it lives", self.path, holder,
                    self.expiry)  # fmt: skip
        began = self._clock()
        while self._clock() - began < self.expiry:
            self._wait(min(self.interval, self.expiry) / 5)
            found = self._look()
            if found is None or found[0] != holder:
                return False
            if found[1] != changed:
                raise LeaseError(f"{busy}. Its last sign of life came while this one watched")
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self.path.with_name(LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as e:
                if e.errno not in _NO_LOCKS:
                    raise
            yield


def _end_process(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(LOST)
