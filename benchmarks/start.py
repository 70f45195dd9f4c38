"""The seconds from the start of Python to the end of train.py's first step, part by part, in a new process.

    python benchmarks/start.py configs/bccd_yolov8n.yaml [key=value ...] [--seconds 3]

Exit code 1: it took longer than --seconds. Files should be warm: run it twice. A run writes nothing before its first
step but its folder, which is left out here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def measure(source: str, overrides: list[str]) -> dict[str, float]:
    """Seconds of each part, in the order of a run, of this process."""
    seconds, began = {}, time.perf_counter()

    def end(part: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[part], began = now - began, now

    import torch

    end("import torch")
    import train
    from config import load_config
    from engine.runtime.processes import Processes
    from engine.runtime.run_folder import RunFolder
    from engine.training.building import build, with_published_settings
    from engine.training.state import TrainingState

    end("import train")
    config = with_published_settings(load_config(source, overrides))
    setup = build(config, Processes(config.device), None, lambda line: None)
    end("read the set, build the models")
    setup.learner.train()
    batches = [next(iter(setup.loader.epoch(0)))]
    end("first batch")
    with tempfile.TemporaryDirectory() as folder:
        train.train_step(setup, batches, TrainingState(), RunFolder(Path(folder)))
    end(f"first step, {torch.get_num_threads()} threads")
    return seconds


def main(argv: list[str]) -> int:
    from errors import ArgumentParser

    parser = ArgumentParser(Path(__file__).name, __doc__)
    parser.add_argument("config", help="a YAML file of train.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the config")
    parser.add_argument("--seconds", type=float, default=3.0, help="the limit (%(default)s)")
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    if args.began is not None:
        started = time.time() - args.began
        parts = {"start Python": started} | measure(args.config, args.overrides)
        print(json.dumps({"parts": parts, "compiler": "torch._dynamo" in sys.modules}))
        return 0
    command = [sys.executable, __file__, args.config, *args.overrides, "--began", str(time.time())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    found = json.loads(done.stdout.splitlines()[-1])
    for part, seconds in found["parts"].items():
        print(f"{part:<32}{seconds:>7.2f} s")
    total = sum(found["parts"].values())
    print(f"{'together':<32}{total:>7.2f} s, {'with' if found['compiler'] else 'without'} torch's compiler")
    return 0 if total <= args.seconds else 1


if __name__ == "__main__":
    from errors import run_script

    run_script(main)
