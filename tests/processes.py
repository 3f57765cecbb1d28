"""Trainers as processes of their own: one alone, or several over loopback as Slurm starts them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Processes:
    """Programs that run until the `with` ends, at the latest.

    Attributes:
        ranks: the processes.
        logs: a file each, with what it printed.
    """

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path) -> None:
        """Args:
        commands: arguments of Python for each process; more than one join each other.
        folder: for the logs, which grow from start to start.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"log-{rank}.txt" for rank in range(len(commands))]
        shared = os.environ | {"XLA_FLAGS": ""}  # one device each
        if len(commands) > 1:
            shared |= _slurm(len(commands))
        self.ranks = []
        for rank, (command, log) in enumerate(zip(commands, self.logs)):
            env = shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"}
            with log.open("ab") as file:
                self.ranks.append(
                    subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env,
                                     stdout=file, stderr=subprocess.STDOUT)
                )  # fmt: skip

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        for rank in self.ranks:
            rank.wait()

    def send(self, number: int, *ranks: int) -> None:
        """A signal to these, or to all."""
        for rank in ranks or range(len(self.ranks)):
            self.ranks[rank].send_signal(number)

    def until(self, condition: Callable[[], object], seconds: float = 200) -> None:
        """Waits for something to come true while all processes run."""
        end = time.monotonic() + seconds
        while not condition():
            assert all(rank.poll() is None for rank in self.ranks), self.printed()
            assert time.monotonic() < end, f"not within {seconds} s: {self.printed()}"
            time.sleep(0.005)

    def ended(self, seconds: float = 200) -> list[int]:
        """Waits for all to end by themselves; their statuses."""
        end = time.monotonic() + seconds
        try:
            return [rank.wait(max(0.1, end - time.monotonic())) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended within {seconds} s: {self.printed()}") from None

    def printed(self) -> str:
        return "\n\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in self.logs)


def _slurm(count: int) -> Mapping[str, str]:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    return {
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_PORT": str(port),
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
    }
