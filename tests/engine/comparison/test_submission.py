"""compare.py --submit: workers through submitit, and one line where it is absent."""

import json
import sys
from pathlib import Path

import pytest

import compare
from engine.comparison import submission
from errors import UserError
from tests.engine.comparison import study_worker


def test_without_submitit_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    study_worker.write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--submit slurm needs the package 'submitit': pip install '\.\[submit\]'"):
        compare.main(["study.yaml", "--submit", "slurm"])
    assert not (tmp_path / "runs").exists()


def test_without_slurm_a_line_says_so_before_any_work(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    study_worker.write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compare, "make_plan", None)  # is not called
    with pytest.raises(UserError, match="argument --submit: found no srun here, expected a machine of a slurm cluster"):
        compare.main(["study.yaml", "--submit", "slurm"])
    assert not (tmp_path / "runs").exists()


def test_options_are_values_of_yaml():
    options = submission.read_options(
        ["timeout_min=600", "slurm_partition=gpu", "slurm_additional_parameters={qos: a}"]
    )
    assert options == {"timeout_min": 600, "slurm_partition": "gpu", "slurm_additional_parameters": {"qos": "a"}}


def test_workers_of_a_machine_share_its_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [submission.device_of(worker, 2) for worker in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [submission.device_of(worker, 2) for worker in range(3)] == ["4", "7", "4"]
    assert submission.device_of(0, 0) is None


def test_workers_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(submission.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [submission.environment(0, workers)["OMP_NUM_THREADS"] for workers in (1, 3, 9)] == ["8", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert submission.environment(0, 3)["OMP_NUM_THREADS"] == "5"


def test_a_log_is_read_by_whole_lines(tmp_path):
    log = tmp_path / "log"
    assert submission.new_lines(log, 0) == ([], 0)
    log.write_bytes("é one\ntw".encode())
    lines, place = submission.new_lines(log, 0)
    assert (lines, place) == (["é one"], 7)
    log.write_bytes("é one\ntwo\nthree\n".encode())
    assert submission.new_lines(log, place) == (["two", "three"], 17)
    assert submission.new_lines(log, 17) == ([], 17)


@pytest.mark.parametrize(
    ("cluster", "options", "message"),
    [("local", {"spped": 1}, "spped"), ("slurm", {}, "slurm cluster"), ("local", {"nodes": 2}, "only one node")],
)
def test_what_submitit_refuses_is_one_line(tmp_path, monkeypatch, cluster, options, message):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"argument --submit: .*{message}"):
        submission.run_workers(cluster, ["true"], workers=1, options=options, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_local_workers_train_a_study(tmp_path, monkeypatch, capsys, one_plot):
    """Two real processes, each a run; the next test has them start compare.py itself."""
    pytest.importorskip("submitit")
    pytest.importorskip("matplotlib")
    study_worker.write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "__file__", str(Path(study_worker.__file__).with_name("submitted.py")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    two = ["--submit", "local", "--workers", "2", "--submit-option", "timeout_min=15"]
    compare.main(["study.yaml", "epochs=1", "--rows", "baseline", *two])
    printed = capsys.readouterr().out
    assert "submitted: " in printed and "| baseline | yolov8_narrow |" in printed
    starts = {line[:9] for line in printed.splitlines() if "== baseline_seed" in line}
    assert starts and starts <= {"worker 1:", "worker 2:"}  # a quick worker may train both
    assert printed.count(": epoch 1/1") == 2
    tree = json.loads((tmp_path / "runs" / "study" / "comparison.json").read_text())
    assert [len(row["seeds"]) for row in tree["rows"] if row["name"] == "baseline"] == [2]
    assert not (tmp_path / "runs" / "study" / "jobs" / "%j").exists()
    logs = [path.read_text() for path in (tmp_path / "runs" / "study" / "jobs").rglob("*.out")]
    assert len(logs) == 2 and sum(log.count("== baseline_seed") for log in logs) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_error_of_a_worker_is_shown(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    pytest.importorskip("matplotlib")
    study_worker.write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "same_study", lambda arguments: ["study.yaml", "epochs=two"])
    expected = r"not made yet: baseline_seed0, baseline_seed1; a worker ended with: .*'epochs'.*two"
    with pytest.raises(UserError, match=expected):
        compare.main(["study.yaml", "--rows", "baseline", "--submit", "local", "--submit-option", "timeout_min=15"])


def test_the_last_error_of_many_lines():
    assert submission.last_error("Job 1 failed\nerror: a\nx.FailedJobError: error: b: no\n\nlogs: c\n") == "b: no"
    assert (
        submission.last_error("\nJob 1 has not produced any output\nlogs: c\n") == "Job 1 has not produced any output"
    )
