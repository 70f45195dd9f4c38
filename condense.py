"""Dataset distillation: make a few pictures from a real training set, to train a detector on instead.

    python condense.py CONFIG [--output FOLDER] [key=value ...]    the set of a config with a section `condense`
    python condense.py STUDY --row NAME [--seed N]                 the set that a row of a study trains on

Examples:

    python condense.py configs/bccd_yolov8n.yaml condense.method=random condense.pictures=5
    python condense.py configs/studies/bccd_condense.yaml --row random_5 --seed 1

engine/condensing/config.py lists the methods and all keys of `condense`. The result is a YOLO dataset
(engine/condensing/set_files.py), by default in the folder where compare.py expects it:
<runs>/<name>/sets/<method>_<pictures>_seed<seed>_<hash of the settings>. A finished set is not made again; it is
refused if the labels or the trained network that it is from have changed.

Methods that learn pixels (gradient_matching, linear_head) draw them in <folder>.part/steps as they change. Stop one
with Ctrl-C and give the same command again to continue; the result has the same bytes as that of a run without a stop.

Exit codes: 0 made, or finished before, 2 a mistake in the arguments or the data, 4 out of memory,
5 a file that could not be written, 130 after Ctrl-C, 143 after SIGTERM.
"""

import dataclasses
import io
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import checkpoint
import models
from config import Config, from_tree, read_tree
from datasets.augment import draw_siamese
from distill.condense.gradient_matching import GradientMatching
from distill.condense.head_matching import HeadMatching
from distill.condense.mean_gradient import matched_parameters
from distill.condense.synthetic import SyntheticSet
from engine.comparison.study import StudyFile, load_study, sets_folder, task_of
from engine.condensing.config import Task
from engine.condensing.frozen_backbone import FrozenBackbone
from engine.condensing.methods import Layout, check_classes, first_layout, load_network
from engine.condensing.real_pictures import RealPictures, open_source
from engine.condensing.set_files import (
    DECODED,
    STORED,
    Picture,
    draw_set,
    part_folder,
    read_manifest,
    to_picture,
    write_set,
)
from engine.runtime import claims, run_folder
from engine.runtime.interruption import StopRequested, StopSignals
from engine.runtime.peak_memory import peak_gigabytes, reset_peak
from engine.runtime.processes import choose_device
from engine.runtime.progress import Progress
from engine.training.batch_norms import norm_of_one_value
from engine.training.exits import is_out_of_memory
from engine.training.inputs import Inputs, weights_named
from errors import MEMORY_EXIT_CODE, ArgumentParser, UserError, counted, naming, run_script, shortened
from random_streams import Stream, seeded_generator
from structures import Targets


def main(argv: list[str]) -> None:
    parser = ArgumentParser("condense.py", __doc__)
    parser.add_argument("config", help="a YAML file: a training config, or a study")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the file")
    parser.add_argument("--row", metavar="NAME", help="make the set of this row of a study")
    parser.add_argument("--seed", type=int, help="with --row: the set of its run with this seed (default: the first)")
    parser.add_argument("--output", metavar="FOLDER", help="folder of the set (default: as above)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.row is not None:
        config, task = task_of_row(arguments.config, arguments.overrides, arguments.row, arguments.seed)
    elif arguments.seed is not None:
        raise UserError("argument --seed: expected --row with it; condense.seed=N is the seed of one set")
    else:
        config, task = task_of_file(arguments.config, arguments.overrides)
    folder = Path(arguments.output) if arguments.output else task.folder(sets_folder(config))
    condense(task, folder, device=config.device)


def task_of_row(path: str, overrides: list[str], name: str, seed: int | None) -> tuple[Config, Task]:
    """The set that a row of a study trains on, and the config of the study. seed: None is the first of the row."""
    study = load_study(path, overrides)
    tasks = {row.name: row.task.with_seed(row.seeds[0] if seed is None else seed) for row in study.rows if row.task}
    if name not in tasks:
        expected = ", ".join(tasks) or "a study with rows that condense"
        raise UserError(f"argument --row: found {name!r}, expected {expected}")
    return study.config, tasks[name]


def task_of_file(path: str, overrides: list[str]) -> tuple[Config, Task]:
    """The set of the section `condense` of a file, and the file."""
    file = from_tree(StudyFile, read_tree(path, overrides), source=path)
    if "method" in file.condense:
        return file, task_of(file, file.condense, path).with_seed(file.seed)
    advice = "condense.method=NAME"
    if file.rows:
        advice += f", or --row NAME, one of {shortened(file.rows)}"
    elif not file.condense:
        advice += f" (train.py {path} trains a config without it)"
    raise UserError(f"{path}: key 'condense.method' is missing, expected {advice}")


def condense(task: Task, folder: Path, *, device: str = "auto", quiet: bool = False) -> dict[str, Any]:
    """Make the set of a task in `folder`, continue an unfinished one, or leave a finished one; return its manifest.

    UserError, before any work, for wrong settings and for a folder that holds something else; claims.Claimed if another
    process makes the set. SystemExit after a signal, once everything is saved.
    """
    progress = Progress(quiet=quiet)
    task.check()
    manifest = read_manifest(folder)
    if manifest is not None:
        refuse_other(manifest["settings"], task, folder)
        refuse_changed(manifest.get("inputs"), open_source(task.data)[1] | weights_of(task), folder)
        progress.say(f"made before: {folder}")
        return manifest
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds no finished set, expected a new folder")
    part = part_folder(folder)
    if (part / "settings.json").is_file():
        refuse_other(json.loads((part / "settings.json").read_text(encoding="utf-8")), task, part)
    where = choose_device(device)
    models.check_arch(task.arch)
    network, own_names = load_network(task, where) or (None, ())
    real = RealPictures(task.data, task.image_size)
    if network is not None:
        check_classes(task, own_names, real.index.names)
    inputs = real.inputs | weights_of(task)
    with claims.take(folder) as claim, StopSignals() as stop:
        try:
            if (manifest := read_manifest(folder)) is not None:
                progress.say(f"made by another process: {folder}")
                return manifest
            return make(Job(task, folder, real, network, inputs, where, progress, stop, claim))
        except StopRequested:
            print(f"stopped, saved in {part}; give the same command to continue", flush=True)
            raise SystemExit(stop.exit_code) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            advice = "use a smaller image_size, fewer pictures, or matching networks of another arch"
            raise UserError(f"out of memory: {str(error).split(chr(10))[0]}; {advice}", MEMORY_EXIT_CODE) from None


def refuse_other(settings: dict[str, Any], task: Task, folder: Path) -> None:
    """UserError if a folder holds a set of other settings. It is not changed."""
    ours = json.loads(json.dumps(task.settings()))
    if settings != ours:
        key = next(key for key in [*settings, *ours] if settings.get(key) != ours.get(key))
        found = f"{folder}: holds a set with {key} {settings.get(key)!r}, not {ours.get(key)!r}"
        raise UserError(f"{found}; give another --output or name, or remove it")


def weights_of(task: Task) -> Inputs:
    """The digest of the trained network's file, if the set needs one."""
    return weights_named([task.condense.network.weights]) if task.needs_network else {}


def refuse_changed(before: Inputs | None, now: Inputs, folder: Path) -> None:
    """UserError if labels or weights are not those that a set was begun with, wherever they lie.

    before: None for a set that is older than these digests.
    """
    for name, digest in now.items():
        if before is not None and digest not in before.values():
            raise UserError(
                f"{folder}: the {name} are not those of this set; give another --output or name, or remove it"
            )


@dataclass(frozen=True)
class Job:
    """A set in the making. network: the trained one, if its method needs one. claim: on the folder."""

    task: Task
    folder: Path
    real: RealPictures
    network: nn.Module | None
    inputs: Inputs
    device: torch.device
    progress: Progress
    stop: StopSignals
    claim: claims.Claim

    @property
    def names(self) -> tuple[str, ...]:
        return self.real.index.names


def make(job: Job) -> dict[str, Any]:
    """Make the pictures of the set, learn them if its method does, then write its files; return the manifest."""
    task, real, cost = job.task, job.real, Cost(job.device)
    job.stop.may_raise = True  # nothing is lost
    layout = first_layout(task, real, job.network)
    job.stop.may_raise = False
    holds_several = task.formation != (1, 1)  # real pictures in a stored one
    if task.is_learnt or holds_several:
        synthetic = to_synthetic(task, layout, job.device)
        if task.is_learnt:
            learn(job, build_learner(job, synthetic), layout, cost)
        splits = {STORED: stored_pictures(synthetic, layout)}
        if holds_several:
            images, targets = synthetic.decode(torch.arange(len(synthetic)))
            splits[DECODED] = as_pictures(images.detach().cpu(), targets.to("cpu"), layout.content_xyxy)
    else:
        splits = {STORED: as_pictures(layout.images, layout.targets, layout.content_xyxy)}
    count = task.condense.pictures
    manifest = {
        "method": task.condense.method,
        "pictures": count,  # stored ones
        "formation": list(task.formation),
        "decoded": task.decoded,
        "objects": len(layout.targets),
        "ratio": count / len(real),
        "seed": task.seed,
        "image_size": task.image_size,
        "source": {"format": real.place[0], "root": real.place[1], "split": real.place[2], "pictures": len(real)},
        "source_pictures": list(layout.sources),
        "ignored_objects_left_out": real.ignored,
        "inputs": job.inputs,
        "seconds": cost.seconds,
        "peak_gigabytes": cost.gigabytes,
        "device": str(job.device),
        "settings": task.settings(),
        **run_folder.environment(),
    }
    job.claim.check()
    write_set(job.folder, splits, job.names, manifest)
    made = f"{counted(count, 'picture')} with {counted(len(layout.targets), 'object')}"
    job.progress.say(f"written: {job.folder}, {made}")
    return manifest


class Cost:
    """Time and peak memory of making a set, over all the runs that continued it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._began, self._before, self._highest = device, time.perf_counter(), 0.0, 0.0
        reset_peak(device)

    def add(self, seconds: float, gigabytes: float) -> None:
        """Add the cost of earlier runs."""
        self._before, self._highest = seconds, gigabytes

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._began

    @property
    def gigabytes(self) -> float:
        return max(self._highest, peak_gigabytes(self._device) or 0.0)


def to_synthetic(task: Task, layout: Layout, device: torch.device) -> SyntheticSet:
    """The stored pictures: the layout's images, or noise under their boxes, packed in formation."""
    c, targets, formation = task.condense, layout.targets, task.formation
    if task.is_learnt and c.init == "noise":
        made = SyntheticSet.from_noise(
            targets,
            count=c.pictures,
            image_size=task.image_size,
            formation=formation,
            content_xyxy=layout.content_xyxy,
            generator=seeded_generator(Stream.NOISE, task.seed),
        )
    else:
        made = SyntheticSet.from_pictures(layout.images.float() / 255, targets, formation, layout.content_xyxy)
    return SyntheticSet(made.pixels.to(device), made.targets, formation, layout.content_xyxy)


def build_learner(job: Job, synthetic: SyntheticSet) -> GradientMatching | HeadMatching:
    """The optimisation of the pixels. UserError for settings that it refuses."""
    task, real, c = job.task, job.real, job.task.condense
    if c.method == "linear_head":
        assert job.network is not None  # task.needs_network
        backbone = FrozenBackbone(job.network, synthetic.image_size, len(job.names))
        data = backbone.data_of(real)
        with naming("key 'condense.head'", ValueError):
            return HeadMatching(synthetic, settings=c.head, features=backbone.features, grid=backbone.grid, real=data)

    def draw_augmentation(generator: torch.Generator):
        return draw_siamese(generator=generator, settings=c.augment)

    def build_network(seed: int) -> nn.Module:
        """A fresh detector for every call; distill.condense.network_pool seeds torch around it."""
        return models.build(task.arch, len(job.names))

    with naming("key 'condense.matching'", ValueError):
        draw_augmentation(torch.Generator())
        network = build_network(0)
        matched_parameters(network, c.matching.layers)
        if min(c.real_batch, len(real)) == 1 and c.matching.pool.normalization == "batch":
            refuse_one_value(task, network)
        return GradientMatching(
            synthetic,
            settings=dataclasses.replace(c.matching, seed=task.seed),
            build_network=build_network,
            draw_real=real.draw(c.real_batch),
            draw_augmentation=draw_augmentation,
        )


def refuse_one_value(task: Task, network: nn.Module) -> None:
    """UserError if a single real picture gives a BatchNorm one value per channel."""
    norm = norm_of_one_value(network, task.image_size)
    if norm is not None:
        found = f"key 'condense.real_batch': one picture of {task.image_size} px gives BatchNorm ({norm}) one value"
        raise UserError(f"{found} per channel, expected at least 2: more pictures, or a larger image_size")


def learn(job: Job, learner: GradientMatching | HeadMatching, layout: Layout, cost: Cost) -> None:
    """Run all remaining steps and save the state in <folder>.part. After a signal: save, then StopRequested."""
    c, progress, stop, part = job.task.condense, job.progress, job.stop, part_folder(job.folder)
    state_file, rows = part / "state.pt", []
    (part / "steps").mkdir(parents=True, exist_ok=True)
    run_folder.write_text(part / "settings.json", json.dumps(job.task.settings()))

    def draw(step: int) -> None:
        """Write steps/000500.png: all stored pictures as they are now."""
        out = io.BytesIO()
        draw_set(stored_pictures(learner.synthetic, layout), job.names).save(out, "PNG")
        run_folder.write_bytes(part / "steps" / f"{step:06}.png", out.getvalue())

    if state_file.is_file():
        state = checkpoint.load_newest(state_file, progress.say)
        refuse_changed(state.get("inputs"), job.inputs, part)
        learner.load_state_dict(state["learner"])
        rows = state["rows"]
        cost.add(state["seconds"], state["gigabytes"])
    else:
        draw(0)

    def save() -> None:
        job.claim.check()
        state = {"step": learner.steps_done, "learner": learner.state_dict(), "rows": rows, "inputs": job.inputs}
        state |= {"seconds": cost.seconds, "gigabytes": cost.gigabytes}
        checkpoint.save(state_file, state, keep_previous=True)

    def on_step(done: int, report: Any) -> None:
        row = dataclasses.asdict(report)
        rows.append(row)
        progress.advance({name: value for name, value in row.items() if name != "step"})
        if stop.received is not None or (c.save_every_steps and done % c.save_every_steps == 0):
            save()
        if c.picture_every_steps and done % c.picture_every_steps == 0:
            draw(done)
        if stop.received is not None:
            raise StopRequested

    progress.start(c.method, learner.settings.steps, learner.steps_done)
    try:
        learner.run(on_step)
    except UserError:
        if learner.steps_done == 0:
            shutil.rmtree(part)  # its settings were refused: nothing to continue
        raise
    finally:
        progress.finish()
    if rows:
        lines = [",".join(rows[0]), *(",".join(f"{value:.6g}" for value in row.values()) for row in rows)]
        run_folder.write_text(part / "steps.csv", "\n".join(lines) + "\n")


def stored_pictures(synthetic: SyntheticSet, layout: Layout) -> list[Picture]:
    """The stored pictures; without padding if each holds one real picture."""
    content = layout.content_xyxy if synthetic.tiles == 1 else None
    return as_pictures(synthetic.pixels.detach().cpu(), synthetic.stored_targets().to("cpu"), content)


def as_pictures(images: Tensor, targets: Targets, content_xyxy: Tensor | None) -> list[Picture]:
    found = []
    for row, image in enumerate(images):
        objects = targets[targets.image == row]
        content = None if content_xyxy is None else content_xyxy[row]
        found.append(to_picture(image, objects.boxes_xyxy, objects.labels, content))
    return found


if __name__ == "__main__":
    run_script(main)
