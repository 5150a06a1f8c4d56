"""Progress for steps that take minutes: what runs, for how long, and the last thing it said (stdlib only)."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TTY_PERIOD = 0.2  # seconds between redraws of the status line
LOG_PERIOD = 15.0  # seconds between lines where stdout is a file or a CI log
SPINNER = "|/-\\"
CLEAR = "\r\x1b[K"  # back to the start of the line, and empty it


class StepError(Exception):
    """A step failed; the message is one sentence for the user, `log` the file that tells more."""

    def __init__(self, message: str, log: Path | None = None):
        super().__init__(message)
        self.log = log


def say(text: str) -> None:
    """Write to stdout at once; do nothing if it is gone, because work such as stopping a server must still go on."""
    with contextlib.suppress(OSError):
        sys.stdout.write(text)
        sys.stdout.flush()


class Status:
    """A status line for one step: redrawn in place on a terminal, a line now and then elsewhere.

    Parameters
    ----------
    label : str
        What is being done, e.g. ``"installing 148 packages"``.
    detail : callable, optional
        Gives the last thing that the step said; shown behind the elapsed seconds.

    Notes
    -----
    Use as a context manager. Leaving it without an exception prints the label and the seconds taken.
    """

    def __init__(self, label: str, detail: Callable[[], str] | None = None):
        self.label = label
        self.detail = detail or (lambda: "")
        self.tty = sys.stdout.isatty()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Status:
        self._start = time.monotonic()
        if not self.tty:
            say(f"{self.label} ...\n")
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self._done.set()
        self._thread.join()
        outcome = "done in" if kind is None else "stopped after"
        say(f"{CLEAR if self.tty else ''}{self.label}: {outcome} {self.elapsed:.0f} s\n")

    @property
    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._start

    def _run(self) -> None:
        count = 0
        while not self._done.wait(TTY_PERIOD if self.tty else LOG_PERIOD):
            count += 1
            mark = SPINNER[count % len(SPINNER)] if self.tty else " "
            line = f"{mark} {self.label}  {self.elapsed:.0f} s  {self.detail()}"
            if self.tty:
                width = shutil.get_terminal_size().columns - 1
                say(f"{CLEAR}{line[:width]}")
            else:
                say(f"{line[:160].rstrip()}\n")


def tail(path: Path, count: int = 30) -> list[str]:
    """Last lines of a text file, without blank ones.

    Parameters
    ----------
    path : Path
        The file; one that does not exist counts as empty.
    count : int
        How many lines at most.

    Returns
    -------
    list of str
        The lines, oldest first.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:  # server logs grow: read only the end
        file.seek(max(0, path.stat().st_size - 400 * count))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return [line for line in lines if line.strip()][-count:]


def run_logged(label: str, command: Sequence[str], log: Path, **options) -> None:
    """Run a command behind a status line, with its output appended to a log file.

    Parameters
    ----------
    label : str
        What the status line says.
    command : sequence of str
        Program and arguments.
    log : Path
        File that takes stdout and stderr.
    **options
        Further arguments of `subprocess.run`, e.g. ``cwd`` or ``env``.

    Raises
    ------
    StepError
        If the command ends with another status than 0.
    """

    def last_line() -> str:
        lines = [line.strip() for line in tail(log) if not line.startswith("WARNING")]
        return "" if not lines or lines[-1].startswith("$ ") else lines[-1]

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        out.write(f"\n$ {' '.join(command)}\n")
        out.flush()
        with Status(label, last_line):
            done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False, **options)
            if done.returncode:
                raise StepError(f"{label} failed (exit status {done.returncode}).", log)


def fetch_wheel(package: str, size: str, folder: Path, log: Path) -> Path:
    """Download one wheel from the package index with the pip of this Python.

    Parameters
    ----------
    package : str
        Requirement, e.g. ``"name==1.0"``. Only a wheel will do, because getting one runs no code of the package.
    size : str
        How much that is, for the status line.
    folder : Path
        Where to put it.
    log : Path
        File that takes pip's output.

    Returns
    -------
    Path
        The wheel.
    """
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    options = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), package]
    run_logged(f"downloading {package} ({size})", [*pip, *options], log)
    return next(folder.glob("*.whl"))


def guarded(function: Callable, *arguments) -> int:
    """Call a script's work and turn what users should see into a sentence and an exit status.

    Parameters
    ----------
    function : callable
        The work.
    *arguments
        Its arguments.

    Returns
    -------
    int
        0, 1 after a `StepError` (the end of its log is printed before its sentence), 130 after Ctrl-C.
    """
    try:
        function(*arguments)
    except StepError as error:
        if error.log is not None:
            lines = "\n".join(tail(error.log))
            print(f"--- last lines of {error.log}\n{lines}\n---", file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
