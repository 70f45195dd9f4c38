"""Search the widths and depths of a YOLOv8 under a limit of FLOPs, on short trainings.

    python -m engine.search CONFIG [key=value ...]

Example:

    python -m engine.search configs/search/bccd.yaml 'search.on=[labels]'

engine/search/config.py describes the file. Random search and regularised evolution train as many shapes for as many
epochs (engine/search/methods.py), each `decide.seeds` times; beside them stands `scaled`, the architecture with all
widths reduced alike. Some random shapes are trained in full, and Kendall's tau says how well their order is
foretold by synflow, the norm of the gradient, parameters, FLOPs and short trainings.

<runs>/<name>/ gets

    search.md, search.json      the tables; rewritten as the search goes on
    found_<teaching>.yaml       the widths and depths of the best shape: `student: {arch: ..., widths: FILE}` trains it
                                like any model, alone, with teachers, in a study of several seeds
    shapes/, runs/              the shapes as files of widths, and the run of each training

Each training is an ordinary run, made once. Stop the command at any time and give it again: finished runs are read, an
interrupted one is continued, and the search makes the same choices. A training with a loss that is not finite scores 0,
and is not made again: its folder has the reason in failed.txt. Remove the folder to train it once more.

Exit codes: 0 done, 2 a mistake in the arguments or the data, 4 out of memory, 5 a file that could not be written,
130 after Ctrl-C, 143 after SIGTERM.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import train
from config import Config, only_config
from datasets.index import DatasetIndex
from datasets.loader import Loader
from datasets.open import open_dataset
from engine.comparison.decision import rule_origin
from engine.comparison.table import METRICS
from engine.comparison.work import refuse_other
from engine.runtime import claims, run_folder
from engine.search import proxies, table
from engine.search.config import SearchFile, Teaching, load_search
from engine.search.methods import evolve, halve, random_shapes
from engine.search.space import Shape, space_of
from engine.search.table import Found, Ranked, Results
from engine.training.building import count_parameters
from engine.training.checks import check_config
from engine.training.inputs import KnownInputs
from engine.training.student import build_student
from errors import NOT_FINITE_EXIT_CODE, ArgumentParser, UserError, run_script


class Search:
    """A search and its trainings. reports: of finished runs, by their names."""

    def __init__(self, file: SearchFile, origin: str) -> None:
        self.file, self.origin = file, origin
        self.index: DatasetIndex = open_dataset(*file.data.train_place, classes=file.data.classes)
        self.space = space_of(file.student.arch, len(self.index.names), file.image_size, file.search)
        self.results: dict[Teaching, Results] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.inputs = KnownInputs()

    def run(self) -> None:
        """Rank the shapes under every teaching, then search, and write after each part.

        The shapes that are ranked are the first of random search.
        """
        for draw in range(self.file.decide.seeds):  # a space that is too narrow is found before any training
            random_shapes(self.space, self.file.search.shapes, seed=self.file.seed + draw)
        for teaching in self.file.teachings:  # no shape has a file yet
            config = self.config_of(teaching, self.space.scaled(), self.file.epochs)
            check_config(dataclasses.replace(config, student=self.file.student))
        for teaching in self.file.teachings:
            result = self.results[teaching] = Results()
            result.found["scaled"] = [self.train_rungs(teaching, [self.space.scaled()], (self.file.epochs,))]
            self.rank(teaching)
            self.write()
        for teaching, result in self.results.items():
            for draw in range(self.file.decide.seeds):
                for method in ("random", "evolution"):
                    shapes = self.choose_shapes(teaching, method, self.file.seed + draw)
                    found = self.train_rungs(teaching, shapes, self.file.rungs)
                    result.found.setdefault(method, []).append(found)
                self.write()

    def choose_shapes(self, teaching: Teaching, method: str, seed: int) -> list[Shape]:
        """The shapes that a method trains at the first rung."""
        settings = self.file.search
        if method == "random":
            return random_shapes(self.space, settings.shapes, seed=seed)
        return evolve(
            self.space,
            settings.shapes,
            lambda shape: self.score(teaching, shape, self.file.rungs[0]),
            seed=seed,
            population=settings.population,
            tournament=settings.tournament,
        )

    def train_rungs(self, teaching: Teaching, shapes: list[Shape], rungs: tuple[int, ...]) -> Found:
        keep = self.file.search.keep
        scored = halve(shapes, lambda shape, epochs: self.score(teaching, shape, epochs), rungs, keep=keep)
        names = [self.config_of(teaching, s, epochs).name for rung, epochs in zip(scored, rungs) for s, _ in rung]
        return Found(scored, sum(self.reports.get(name, {}).get("seconds", 0.0) for name in names) / 60)

    def rank(self, teaching: Teaching) -> None:
        """Train the first random shapes in full, one draw after the other."""
        file = self.file
        draws = (random_shapes(self.space, file.search.shapes, seed=file.seed + i) for i in range(file.decide.seeds))
        shapes = list(dict.fromkeys(shape for draw in draws for shape in draw))[: file.search.ranked]
        for shape in shapes:
            scores = {epochs: self.score(teaching, shape, epochs) for epochs in (file.rungs[0], file.epochs)}
            again = self.score(teaching, shape, file.epochs, file.seed + 1) if file.search.ranked_again else None
            self.results[teaching].ranked.append(Ranked(shape, scores, self.proxies(shape), again))

    def proxies(self, shape: Shape) -> dict[str, float]:
        """What is known of a shape before its training."""
        model = build_student(
            self.config_of("labels", shape, self.file.epochs), self.index.names, say=lambda line: None
        )
        loader = Loader(
            self.index, image_size=self.file.image_size, batch_size=self.file.batch_size, seed=0, shuffle=False
        )
        batch = next(iter(loader.epoch(0)))
        return {
            "synflow (log10)": math.log10(proxies.synflow(model, self.file.image_size)),
            "gradient norm": proxies.gradient_norm(model, batch.images.float() / 255, batch.targets),
            "parameters (M)": count_parameters(model) / 1e6,
            "GFLOPs": self.space.flops(shape) / 1e9,
        }

    def config_of(self, teaching: Teaching, shape: Shape, epochs: int, seed: int | None = None) -> Config:
        """The config of a training; seed: the file's if None."""
        shared = only_config(self.file)
        if teaching == "labels":
            shared = dataclasses.replace(shared, teachers=(), terms=())
        return dataclasses.replace(
            shared,
            name=f"{teaching}_{shape.name}_{epochs}" + ("" if seed is None else f"_seed{seed}"),
            runs=str(self.file.folder / "runs"),
            epochs=epochs,
            seed=shared.seed if seed is None else seed,
            student=dataclasses.replace(shared.student, widths=str(self.widths_of(shape))),
        )

    def widths_of(self, shape: Shape) -> Path:
        """Its file of widths, which its first training writes."""
        return self.file.folder / "shapes" / f"{shape.name}.yaml"

    def score(self, teaching: Teaching, shape: Shape, epochs: int, seed: int | None = None) -> float:
        """The score of a shape after these epochs, read from its run or trained now; 0 if that failed."""
        config, failures = self.config_of(teaching, shape, epochs, seed), self.results[teaching].failures
        metric = self.file.decide.metric
        if config.name in failures:
            return 0.0
        if config.name in self.reports:
            return self.reports[config.name]["test"][METRICS[metric]] or 0.0
        widths = self.widths_of(shape)
        if not widths.is_file():
            run_folder.make_folder(widths.parent)
            run_folder.write_text(widths, self.space.widths_text(shape))
        try:
            report = train_once(config)
        except UserError as error:
            if error.exit_code != NOT_FINITE_EXIT_CODE:
                raise
            print(f"{config.name}: failed: {error}", flush=True)
            failures[config.name] = str(error)
            return 0.0
        self.inputs.add(Path(config.runs) / config.name, report.get("inputs", {}))
        self.reports[config.name] = report
        score = report["test"][METRICS[metric]] or 0.0
        print(f"{config.name}: {metric} {score:.3f}, {report['seconds'] / 60:.1f} min", flush=True)
        return score

    def write(self) -> None:
        """The tables and the best shapes so far."""
        folder, environment = self.file.folder, run_folder.environment()
        shown = next(iter(self.reports.values()), {})
        facts: dict[str, Any] = {key: shown[key] for key in ("device", "precision", "threads", "torch") if key in shown}
        machine = f"Trained on {', '.join(f'{key} {value}' for key, value in facts.items())}."
        text = table.markdown(self.file, self.space, self.results, self.origin, machine)
        run_folder.write_text(folder / "search.md", text)
        facts["commits"] = sorted({str(report.get("commit")) for report in self.reports.values()})  # of the trainings
        text = table.as_json(self.file, self.space, self.results, self.origin, environment | facts)
        run_folder.write_text(folder / "search.json", text)
        for teaching, result in self.results.items():
            shape, _ = result.best()
            run_folder.write_text(folder / f"found_{teaching}.yaml", self.space.widths_text(shape))


def train_once(config: Config) -> dict[str, Any]:
    """The report of a run: read if it is finished, else trained, from its checkpoint if there is one.

    UserError for a training that failed, now or before.
    """
    folder = run_folder.RunFolder(Path(config.runs) / config.name)
    refuse_other(folder, config)
    failure = folder.path / "failed.txt"
    if failure.is_file():
        raise UserError(failure.read_text(encoding="utf-8"), NOT_FINITE_EXIT_CODE)
    if not folder.report.is_file():
        run_folder.make_folder(folder.path.parent)
        with claims.take(folder.path) as claim:
            try:
                train.start_or_continue(config, claim, quiet=True)
            except UserError as error:
                if error.exit_code == NOT_FINITE_EXIT_CODE:
                    run_folder.make_folder(folder.path)
                    run_folder.write_text(failure, str(error))
                raise
    return json.loads(folder.report.read_text(encoding="utf-8"))


def main(argv: list[str]) -> None:
    parser = ArgumentParser("python -m engine.search", __doc__)
    parser.add_argument("config", help="a YAML file with a section `search`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the file")
    arguments = parser.parse_intermixed_args(argv)
    file = load_search(arguments.config, arguments.overrides)
    search = Search(file, rule_origin(arguments.config, arguments.overrides))
    search.run()
    print((file.folder / "search.md").read_text(encoding="utf-8"))
    found = ", ".join(str(file.folder / f"found_{teaching}.yaml") for teaching in file.teachings)
    print(f"written: {file.folder / 'search.md'}, {file.folder / 'search.json'}, {found}")


if __name__ == "__main__":
    run_script(main)
