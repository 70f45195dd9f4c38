"""Claims: of all processes that want to work on a folder, also from other machines over a network, one does.

    with take(folder) as claim:     # Claimed, a UserError, if somebody else holds it
        ...
        claim.check()               # before writing: UserError if it was taken over meanwhile

The claim on runs/NAME is the file runs/.claims/NAME.<n> with the highest n. It names its holder; its modification time
is the holder's heartbeat, renewed every HEARTBEAT_S seconds. It is free

    - once released: its modification time is then 0,
    - if its holder is a process of this machine that is gone: no process has that number and began at that time,
    - if its holder is elsewhere and the last heartbeat is more than STALE_S seconds ago.

To take a free claim n is to create the file n + 1 with O_EXCL, which succeeds for one process alone. The file with the
highest number is never removed, so numbers only grow. A process that looked at claim n long ago, and then was slow, can
only create n + 1. If that number has been used since, there is a higher one now, and the process steps back. A single
file that is removed and made again would not do: the slow process would remove the new claim instead of the old one.

The age of a heartbeat is the difference of two modification times of the same file system, so no machine's clock
matters. A process that was stopped, or cut off from the network, for more than STALE_S seconds may lose its claim to
another machine. It learns that from `check`, and has to end.

On Linux, "this machine" is one boot of one kernel and one namespace of process numbers: two containers are two
machines, and so is a machine after its restart. Elsewhere heartbeats alone decide.
"""

import contextlib
import functools
import json
import os
import re
import socket
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from errors import DISK_EXIT_CODE, UserError

FOLDER = ".claims"
HEARTBEAT_S = 15.0
STALE_S = 300.0  # a network file system may show times that are a minute old
RELEASED_BEFORE = 1e9  # seconds since 1970: no claim is that old, and some file systems cannot hold a time of 0


class Claimed(UserError):
    """Another process holds the claim. The message names its host, its number and the age of its claim."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a claim, as its file names it.

    machine, started: of_this_machine and start_of; claimed: when, by the clock of the file system.
    """

    host: str
    pid: int
    machine: str
    started: int | None
    claimed: float


class Claim:
    """A claim that this process holds, until the end of the context or `release`."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number
        self._file = file_of(path, number)
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others take it. A second call does nothing."""
        if self._over.is_set():
            return
        self._over.set()
        self._heart.join()
        with contextlib.suppress(OSError):  # gone: it was taken over
            os.utime(self._file, (0, 0))

    def check(self) -> None:
        """UserError if another process has taken the claim over; this one must not write to the folder any more."""
        if newest(self.path) > self.number:
            silent = f"this one gave no sign for {STALE_S:.0f} s"
            raise UserError(
                f"{self.path}: taken over by another process, as {silent}; it saved nothing since, and ends"
            )

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # the network is away: the next one may arrive
                os.utime(self._file)


def take(path: Path) -> Claim:
    """The claim on a folder, which need not exist. Claimed if another process holds it, exit code 5 for the disk."""
    try:
        number = newest(path)
        while True:
            try:
                if number and (line := describe_holder(path, number)):
                    raise Claimed(f"{path}: {line}; wait for it, or stop it")
            except FileNotFoundError:  # removed, because there is a newer one
                number = newest(path)
                continue
            number += 1
            if not create(file_of(path, number)):
                continue  # another process was faster: is its claim free?
            if (highest := newest(path)) == number:
                break
            file_of(path, number).unlink(missing_ok=True)  # the number had been in use, long ago
            number = highest
        for older in numbers(path) - {number}:
            with contextlib.suppress(OSError):  # another user's, in a folder that protects it
                file_of(path, older).unlink()
    except OSError as error:
        raise UserError(f"{path}: could not be claimed: {error.filename}: {error.strerror}", DISK_EXIT_CODE) from None
    return Claim(path, number)


def wait_for(path: Path, *, every_s: float = 0.5) -> Claim:
    """The claim on a folder, as soon as nobody else holds it."""
    while True:
        try:
            return take(path)
        except Claimed:
            time.sleep(every_s)


def file_of(path: Path, number: int) -> Path:
    return path.parent / FOLDER / f"{path.name}.{number}"


def numbers(path: Path) -> set[int]:
    """Of all claims on a folder that have a file."""
    pattern = re.compile(re.escape(path.name) + r"\.(\d+)")
    try:
        matches = map(pattern.fullmatch, os.listdir(path.parent / FOLDER))
    except FileNotFoundError:
        return set()
    return {int(match[1]) for match in matches if match}


def newest(path: Path) -> int:
    """The number of the claim that counts; 0 if there was none yet."""
    return max(numbers(path), default=0)


def create(file: Path) -> bool:
    """Write a claim of this process; False if the file is there already."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
        pid, now = os.getpid(), os.fstat(descriptor).st_mtime
        try:
            opened.write(json.dumps(asdict(Holder(socket.gethostname(), pid, this_machine(), start_of(pid), now))))
            opened.flush()
        except OSError:
            os.utime(file, (0, 0))  # a full disk: nobody holds it
            raise
    return True


def describe_holder(path: Path, number: int) -> str | None:
    """What to say of the holder of a claim; None if it is free. FileNotFoundError if there is no such claim."""
    with open(file_of(path, number), encoding="utf-8") as file:
        beat, text = os.fstat(file.fileno()).st_mtime, file.read()
    if beat < RELEASED_BEFORE:
        return None
    silence = max(0.0, now_there(path) - beat)
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):  # it is being written, or its process was killed in between
        return None if silence > STALE_S else "a process is just beginning to work on it"
    is_here = bool(holder.machine) and holder.machine == this_machine()
    if not is_alive(holder.pid, holder.started) if is_here else silence > STALE_S:
        return None
    age = max(0.0, beat + silence - holder.claimed)
    who = f"process {holder.pid} on host {holder.host}"
    return f"{who} is at work on it, for {age:.0f} s, and gave a sign {silence:.0f} s ago"


def now_there(path: Path) -> float:
    """The present time by the clock that stamps the claims: that of a server, if they are on one."""
    with tempfile.TemporaryFile(dir=path.parent / FOLDER) as file:
        return os.fstat(file.fileno()).st_mtime


@functools.cache
def this_machine() -> str:
    """Names where a process number means one process: the boot and the namespace. "" where the system has no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_of(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the machine did; None if it has ended or is not shown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])  # ended, but its parent has not asked how


def is_alive(pid: int, started: int | None) -> bool:
    """Whether the process of this machine with that number is still the one that began at that time."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, of whom /proc may show nothing
        return start_of(pid) in (None, started)
    return start_of(pid) == started
