"""results.png, confusion_matrix.png, pr_curve.png: what they say, read from the figure itself."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from engine.drawing import plots
from engine.drawing.style import STRONG
from engine.runtime.run_folder import AP_COLUMNS
from tests.engine.drawing.figures import Kept, check, legend_of, overlap


@pytest.fixture
def kept(monkeypatch):
    return Kept(monkeypatch, plots)


def metrics_csv(folder, epochs: int, *, evaluated_every: int = 1, terms=("cwd_t",)):
    scores = ("metrics/precision", "metrics/recall", "metrics/mAP50", "metrics/mAP50-95", *AP_COLUMNS)
    lines = [",".join(("epoch", "time", "train/box", *(f"train/{term}" for term in terms), *scores, "lr"))]
    for epoch in range(1, epochs + 1):
        is_evaluated = epoch % evaluated_every == 0
        values = [f"{0.9 - 0.05 * place}" if is_evaluated else "" for place in range(len(scores))]
        lines.append(",".join([str(epoch), "1.0", f"{1 / epoch}", *("0.5" for _ in terms), *values, "0.01"]))
    path = folder / "run" / "metrics.csv"
    path.parent.mkdir()
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("epochs", [1, 40])
def test_results(kept, tmp_path, epochs):
    plots.draw_results(metrics_csv(tmp_path, epochs), tmp_path / "results.png")
    check(kept.figure)
    titles = [axis.get_title(loc="left") for axis in kept.axes]
    assert titles == ["box", "cwd_t", "precision and recall", "mAP", "AP at each IoU", "learning rate"]
    assert kept.figure.get_suptitle() == "run"
    for axis in kept.axes:
        assert axis.get_xlabel() == "epoch" and axis.get_ylabel()
        assert all(line.get_marker() in (("o",) if epochs < 30 else ("None", None)) for line in axis.lines)
        low, high = axis.get_xlim()
        assert all(tick == round(tick) for tick in axis.get_xticks() if low <= tick <= high)
    assert legend_of(kept.axes[2]) == ["precision", "recall"] and legend_of(kept.axes[3]) == ["mAP50-95", "mAP50"]
    assert [text.get_text() for text in kept.axes[4].texts] == ["IoU 0.50", "0.95"] and len(kept.axes[4].lines) == 10


def test_titles_of_long_names_stay_apart_and_whole(kept, tmp_path):
    """A term is called after its loss and its teacher."""
    terms = ("localization_similarity_of_the_teacher", "soft_class_shapes_teacher", "cwd_" + 30 * "n")
    plots.draw_results(metrics_csv(tmp_path, 3, terms=terms), tmp_path / "results.png")
    check(kept.figure)
    titles = [axis._left_title for axis in kept.axes]
    assert [title.get_text().replace("\n", "") for title in titles[1:4]] == list(terms)
    assert titles[2].get_text() == "soft_class_shapes_\nteacher"
    boxes = [title.get_window_extent(kept.figure.canvas.get_renderer()) for title in titles]
    assert not any(overlap(a, b) for number, a in enumerate(boxes) for b in boxes[:number])


def test_results_leave_out_what_was_not_measured(kept, tmp_path):
    plots.draw_results(metrics_csv(tmp_path, 6, evaluated_every=10), tmp_path / "results.png")
    check(kept.figure)
    assert [axis.get_title(loc="left") for axis in kept.axes] == ["box", "cwd_t", "learning rate"]


def test_values_of_some_epochs_have_points_though_others_have_none(kept, tmp_path):
    plots.draw_results(metrics_csv(tmp_path, 60, evaluated_every=20), tmp_path / "results.png")
    assert kept.axes[0].lines[0].get_marker() == "None"
    line = kept.axes[3].lines[0]
    assert line.get_marker() == "o" and list(line.get_xdata()) == [20, 40, 60]


def test_no_results_without_epochs(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,time,lr\n")
    plots.draw_results(path, tmp_path / "results.png")
    assert not (tmp_path / "results.png").exists()


def report_of(num_classes: int) -> SimpleNamespace:
    """What the plots read of a report: class k has k objects: k // 2 found, one called class 0, others missed."""
    objects = np.arange(num_classes)
    confusion = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    confusion[objects, objects] = objects // 2
    confusion[0, 2:num_classes] += 1
    confusion[-1, :-1] = objects - confusion[:, :-1].sum(0)
    confusion[0, -1] = 7
    recalls = np.linspace(0, 1, 101)
    precision = (objects[:, None] / num_classes) * (1 - recalls)  # (K, 101)
    precision[0] = np.nan  # without objects
    return SimpleNamespace(
        names=tuple(f"class {k}" for k in range(num_classes)),
        confusion=confusion,
        iou_threshold=0.5,
        given=SimpleNamespace(score_threshold=0.25),
        recalls=recalls,
        pr_precision=precision,
    )


@pytest.mark.parametrize("num_classes", [1, 20])
def test_counts_and_fractions_of_the_confusion_matrix_stand_apart(kept, tmp_path, num_classes):
    report = report_of(num_classes)
    plots.draw_confusion(report, tmp_path / "confusion.png")
    check(kept.figure)
    assert [axis.get_title(loc="left") for axis in kept.axes] == ["number of objects", "fraction of the true class"]
    assert "IoU 0.5" in kept.figure.get_suptitle() and "0.25" in kept.figure.get_suptitle()
    counts, fractions = ({t.get_position(): t.get_text() for t in axis.texts} for axis in kept.axes)
    expected = {(column, row): str(n) for (row, column), n in np.ndenumerate(report.confusion) if n}
    assert counts == expected and counts[(num_classes, 0)] == "7"
    totals = report.confusion.sum(0)
    assert fractions == {
        (c, r): f"{n / totals[c]:.2f}" for (r, c), n in np.ndenumerate(report.confusion) if n and c < num_classes
    }
    for axis in kept.axes:
        assert [label.get_text() for label in axis.get_yticklabels()] == [*report.names, "missed"]
    assert kept.axes[0].get_xticklabels()[-1].get_text() == "no object"


def test_many_classes_have_colors_and_a_scale_instead_of_numbers(kept, tmp_path):
    plots.draw_confusion(report_of(40), tmp_path / "confusion.png")
    check(kept.figure)
    assert len(kept.axes) == 4 and not any(axis.texts for axis in kept.axes)


@pytest.mark.parametrize("num_classes", [3, 15])
def test_the_mean_of_the_pr_curves_stands_out(kept, tmp_path, num_classes):
    plots.draw_pr_curve(report_of(num_classes), tmp_path / "pr.png")
    check(kept.figure)
    (axis,) = kept.axes
    mean = next(line for line in axis.lines if line.get_color() == STRONG)
    others = [line for line in axis.lines if line.get_color() not in (STRONG, "white")]
    assert len(others) == num_classes - 1 and all(line.get_color() != STRONG for line in others)
    assert mean.get_linewidth() > 2 * max(line.get_linewidth() for line in others)
    assert mean.get_zorder() > max(line.get_zorder() for line in others)
    expected = np.arange(1, num_classes).mean() / num_classes / 2
    names = legend_of(kept.figure)
    assert names[0] == f"all {num_classes - 1} classes  {expected:.3f}"
    assert names[1].startswith(f"class {num_classes - 1} ") and len(names) == num_classes  # the best class first
    assert axis.get_xlabel() == "recall" and axis.get_ylabel() == "precision"


def test_one_class_is_its_own_mean(kept, tmp_path):
    plots.draw_pr_curve(report_of(2), tmp_path / "pr.png")
    assert legend_of(kept.figure) == ["class 1  0.250"]


def test_of_many_classes_the_legend_names_the_mean_alone(kept, tmp_path):
    plots.draw_pr_curve(report_of(40), tmp_path / "pr.png")
    check(kept.figure)
    assert len(legend_of(kept.figure)) == 1 and len(kept.axes[0].lines) == 41


def test_no_class_with_objects(kept, tmp_path):
    plots.draw_pr_curve(report_of(1), tmp_path / "pr.png")
    assert not kept.axes[0].lines and not kept.figure.legends
