"""Claims: one holder, whoever comes at once; the dead lose theirs, the living and the slow do no harm."""

import json
import os
import signal
import threading
import time

import pytest

import train
from engine.runtime import claims
from errors import DISK_EXIT_CODE, UserError
from tests.tiny_training import tiny_config

ELSEWHERE = {"host": "node7", "pid": 4242, "machine": "another boot", "started": 1}


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs" / "tiny"


def leave_claim(path, *, seconds_ago=0.0, **holder):
    """The claim of a process that is gone or elsewhere; returns its number."""
    claims.take(path).release()
    number = claims.newest(path)
    file = claims.file_of(path, number)
    now = claims.now_there(path)
    text = {**json.loads(file.read_text()), "claimed": now - seconds_ago - 60, **holder}
    file.write_text(json.dumps(text))
    os.utime(file, (now - seconds_ago, now - seconds_ago))
    return number


def is_held(path):
    """Whether nobody else can take it."""
    try:
        claims.take(path).release()
    except claims.Claimed:
        return True
    return False


def test_one_holder_at_a_time(run):
    with claims.take(run) as claim:
        with pytest.raises(claims.Claimed, match=rf"tiny: process {os.getpid()} on host \S+ is at work on it, for 0 s"):
            claims.take(run)
        claim.check()
        assert not is_held(run.with_name("tiny2")) and not is_held(run.with_name("tin"))
    assert not is_held(run)
    with pytest.raises(ZeroDivisionError), claims.take(run):
        raise ZeroDivisionError
    assert not is_held(run) and not run.exists()
    assert len(claims.numbers(run)) == 1, "older claims are removed"


def test_names_with_dots_are_different_folders(run):
    claims.take(run.with_name("tiny.3")).release()
    assert claims.newest(run) == 0 and claims.newest(run.with_name("tiny.3")) == 1


def test_a_killed_process_loses_its_claim_at_once(run):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        claims.take(run)
        os.write(told, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    assert is_held(run)
    os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 10  # it is not waited for: a process that has ended counts as gone
    while is_held(run):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.waitpid(child, 0)
    assert not is_held(run)


def test_a_number_that_another_process_has_now_is_no_holder(run):
    leave_claim(run)
    assert is_held(run)  # this process, which lives
    leave_claim(run.with_name("other"), started=claims.start_of(os.getpid()) + 1)
    assert not is_held(run.with_name("other"))


def test_a_holder_elsewhere_is_judged_by_its_heartbeat(run, monkeypatch):
    leave_claim(run, **ELSEWHERE, seconds_ago=claims.STALE_S - 30)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # our clock says nothing
    with pytest.raises(claims.Claimed, match=r"process 4242 on host node7 is at work on it, for 330 s, .* 270 s ago"):
        claims.take(run)
    leave_claim(run.with_name("old"), **ELSEWHERE, seconds_ago=claims.STALE_S + 30)
    assert not is_held(run.with_name("old"))


def test_without_proc_the_heartbeat_decides(run, monkeypatch):
    monkeypatch.setattr(claims, "this_machine", lambda: "")
    number = leave_claim(run, pid=2**22 + 1)  # no process has that number
    assert is_held(run)
    old = time.time() - claims.STALE_S - 30
    os.utime(claims.file_of(run, number), (old, old))
    assert not is_held(run)


def test_a_claim_without_a_name_yet_is_held_for_a_while(run):
    number = leave_claim(run)
    claims.file_of(run, number).write_text("")
    with pytest.raises(claims.Claimed, match="just beginning"):
        claims.take(run)
    os.utime(claims.file_of(run, number), (2e9, time.time() - claims.STALE_S - 30))
    assert not is_held(run)


def test_the_heart_beats_until_the_release(run, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_S", 0.01)
    with claims.take(run) as claim:
        file = claims.file_of(run, claim.number)
        os.utime(file, (2e9, 1.5e9))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime < 1.6e9:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    time.sleep(0.05)
    assert file.stat().st_mtime == 0


def test_who_was_taken_over_must_not_write(run):
    slow = claims.take(run)
    file = claims.file_of(run, slow.number)
    file.write_text(json.dumps({**json.loads(file.read_text()), **ELSEWHERE}))
    os.utime(file, (1.5e9, 1.5e9))
    other = claims.take(run)
    other.check()
    with pytest.raises(UserError, match="tiny: taken over by another process"):
        slow.check()
    slow.release()  # of a claim that is not its own any more
    assert is_held(run)
    other.release()


@pytest.mark.parametrize("dead", [False, True], ids=["free", "of a dead process"])
def test_of_many_at_once_one_wins(run, dead):
    """Eight threads take the same claim at the same moment, twenty times."""
    barrier, winners = threading.Barrier(8), []

    def compete():
        barrier.wait()
        try:
            winners.append(claims.take(run))
        except claims.Claimed:
            pass

    for number in range(20):
        if dead:
            leave_claim(run, pid=2**22 + 1)
        threads = [threading.Thread(target=compete) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1, f"round {number}"
        winners.pop().release()


def test_of_many_processes_one_holds_it_at_any_time(run):
    """Four processes take, note, and release; one of them is killed while it holds the claim, every time."""
    log = run.parent / "log"
    log.parent.mkdir()

    def work(number):
        while True:
            try:
                claim = claims.take(run)
            except claims.Claimed:
                time.sleep(0.001)
                continue
            with open(log, "a") as file:
                file.write(f"+{number}\n")
                file.flush()
                time.sleep(0.001)
                if number == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                file.write(f"-{number}\n")
            claim.release()
            return

    for _ in range(5):
        children = []
        for number in range(4):
            child = os.fork()
            if child == 0:
                work(number)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
    lines = log.read_text().split()
    assert lines.count("+0") == 5 and len(lines) == 5 * 7
    while lines:
        first = lines.pop(0)
        assert first[0] == "+"
        assert first == "+0" or lines.pop(0) == f"-{first[1:]}", "two held it at once"


@pytest.mark.parametrize("others", [1, 2, 3])
def test_a_slow_one_takes_nothing_from_the_living(run, monkeypatch, others):
    """It finds the claim free, and stops; others take it and release it, and the last holds it. Then it goes on."""
    leave_claim(run, pid=2**22 + 1)
    looked, go_on, result = threading.Event(), threading.Event(), []
    create = claims.create

    def slowly(file):
        if threading.current_thread().name == "slow" and not looked.is_set():
            looked.set()
            go_on.wait(10)
        return create(file)

    monkeypatch.setattr(claims, "create", slowly)

    def compete():
        try:
            result.append(claims.take(run))
        except claims.Claimed as error:
            result.append(error)

    slow = threading.Thread(target=compete, name="slow")
    slow.start()
    assert looked.wait(10)
    for _ in range(others - 1):
        claims.take(run).release()
    with claims.take(run) as holder:
        go_on.set()
        slow.join()
        assert isinstance(result[0], claims.Claimed)
        holder.check()
    assert not is_held(run)


def test_a_full_disk_leaves_it_free(run, monkeypatch):
    number = leave_claim(run, pid=2**22 + 1)
    with monkeypatch.context() as patch:
        patch.setattr(claims.json, "dumps", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match=r"tiny: could not be claimed: .*No space left") as raised:
            claims.take(run)
    assert raised.value.exit_code == DISK_EXIT_CODE
    assert claims.newest(run) == number + 1 and not is_held(run)


# ---------------------------------------------------------------- train.py


def test_a_run_has_one_trainer(tiny_data, tmp_path, monkeypatch):
    """A second process that resumes it is refused; one that was taken over ends without saving."""
    config = tiny_config(tiny_data, tmp_path / "runs", student={"arch": "yolov8_narrow"}, epochs=1)
    path = tmp_path / "runs" / "tiny"
    seen = []

    def on_epoch(row):
        with pytest.raises(claims.Claimed, match=rf"tiny: process {os.getpid()} on host"):
            train.run(config, resume=True, quiet=True)
        before = (path / "weights" / "last.pt").read_bytes()
        leave = claims.file_of(path, claims.newest(path) + 1)
        leave.write_text(json.dumps(ELSEWHERE | {"claimed": 0.0}))
        seen.append(before)

    with pytest.raises(UserError, match="tiny: taken over by another process"):
        train.run(config, quiet=True, on_epoch=on_epoch)
    assert (path / "weights" / "last.pt").read_bytes() == seen[0] and not (path / "report.json").exists()
    with pytest.raises(claims.Claimed, match="process 4242 on host node7"):
        train.run(config, resume=True, quiet=True)
    claims.file_of(path, claims.newest(path)).write_text(json.dumps(ELSEWHERE | {"claimed": 0.0}))
    os.utime(claims.file_of(path, claims.newest(path)), (1.5e9, 1.5e9))
    assert train.run(config, resume=True, quiet=True)["epochs"] == 1
    assert not is_held(path)
