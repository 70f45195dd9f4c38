"""compare.py as test_submission.py submits it: a process of its own, which draws nothing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import compare
from errors import run_script
from tests.engine.comparison import study_worker

if __name__ == "__main__":
    study_worker.draw_nothing()
    run_script(compare.main)
