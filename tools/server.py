"""One `vllm serve` process for the demo: start it, wait for it, ask it for numbers, stop all of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import progress

START_LIMIT = 420.0  # seconds; the first start on 2 cores takes about 100
STOP_LIMIT = 8.0  # a serving one ends in 1 second, one that still loads its model does not listen
LOG_PREFIX = re.compile(r"^(\(.*?\) )?([A-Z]+ \S+ \S+ \[\S+\] )?")  # "(EngineCore pid=7) INFO 01-31 12:00:00 [a.py:1] "


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(kind: str) -> dict[str, str]:
    """Environment variables for vLLM without a network, on a machine with or without a GPU.

    Parameters
    ----------
    kind : str
        ``"cpu"`` or ``"cuda"``.

    Returns
    -------
    dict of str to str
        The variables of this process and those that vLLM needs.
    """
    env = dict(os.environ)
    env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    env |= {"NO_COLOR": "1", "VLLM_LOGGING_LEVEL": "INFO"}  # the log is read by this program
    if kind == "cpu":
        # All cores, threads not pinned: vLLM's own choice is the cores of one NUMA node, which can be half of a small
        # machine, and pinned threads wait for each other whenever something else runs on one of their cores.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return env


class Server:
    """A `vllm serve` process and its children.

    Parameters
    ----------
    command : list of str
        ``vllm serve`` with its arguments, without host and port.
    env : dict of str to str
        Its environment.
    log : Path
        File that takes what it prints; begun anew.
    """

    def __init__(self, command: list[str], env: dict[str, str], log: Path):
        self.log = log
        self.url = f"http://127.0.0.1:{free_port()}"
        host, port = self.url.removeprefix("http://").split(":")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as out:
            # A session of its own: Ctrl-C reaches only us, and one signal to the group reaches all of its children.
            self.process = subprocess.Popen(
                [*command, "--host", host, "--port", port],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def last_line(self) -> str:
        """The last thing that the server said, without time and place."""
        lines = progress.tail(self.log, 1)
        return LOG_PREFIX.sub("", lines[0].strip()) if lines else ""

    def check(self) -> None:
        """Raise `progress.StepError` if the server has ended."""
        code = self.process.poll()
        if code is not None:
            raise progress.StepError(f"The server ended by itself (exit status {code}).", self.log)

    def get(self, path: str) -> str:
        """Body of one of the server's pages."""
        # No proxy: the address is this machine's own.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=10) as answer:
            return answer.read().decode()

    def wait(self) -> None:
        """Return when the server answers; raise `progress.StepError` if it ends or takes too long."""
        begin = time.monotonic()
        while time.monotonic() - begin < START_LIMIT:
            self.check()
            with contextlib.suppress(urllib.error.URLError, OSError):
                self.get("/health")
                return
            time.sleep(0.5)
        raise progress.StepError(f"The server was not ready after {START_LIMIT:.0f} s.", self.log)

    def blocks(self) -> tuple[float, int]:
        """Blocks of the KV cache that requests hold now, and blocks in the pool.

        Returns
        -------
        tuple of float and int
            Held and all. One block of the pool is vLLM's null block, which no request can hold and which its
            usage figure leaves out.
        """
        page = self.get("/metrics")
        usage = re.search(r"^vllm:kv_cache_usage_perc\{.*?\} (\S+)$", page, re.MULTILINE)
        pool = re.search(r'^vllm:cache_config_info\{.*?\bnum_gpu_blocks="(\d+)"', page, re.MULTILINE)
        if usage is None or pool is None:
            raise progress.StepError("The server's /metrics do not tell how full the KV cache is.", self.log)
        return float(usage[1]) * (int(pool[1]) - 1), int(pool[1])

    def find(self, pattern: str) -> list[re.Match[str]]:
        """All matches of a pattern in the log so far."""
        return list(re.finditer(pattern, self.log.read_text(encoding="utf-8", errors="replace")))

    def stop(self) -> None:
        """End the server and its children: first politely, then by force."""
        try:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=STOP_LIMIT)
        finally:  # also when a second Ctrl-C interrupts the waiting
            self._signal(signal.SIGKILL)  # what is left of the group
            self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
