"""docs/losses.md is what the docstrings say today, and the page says of each loss what its docstring says."""

import pytest

from distill import document
from distill.losses.features import channel_wise_kl, feature_mse
from distill.losses.mgd import MGD
from distill.terms import LOSSES, Term
from errors import UserError


def test_the_committed_page_is_up_to_date():
    document.main(["--check"])


def test_a_stale_page_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(document, "PAGE", tmp_path / "docs" / "losses.md")
    with pytest.raises(UserError, match=r"losses.md: differs from the docstrings"):
        document.main(["--check"])
    document.main([])
    document.main(["--check"])
    document.PAGE.write_text(document.PAGE.read_text().replace("T^2", "T"))
    with pytest.raises(UserError, match="differs"):
        document.main(["--check"])


def test_every_loss_has_a_row_of_equally_many_cells():
    rows = [line for line in document.page().splitlines() if line.startswith("|")]
    assert [line.split("`")[1] for line in rows[2:]] == list(LOSSES)
    bars = [line.replace("\\|", "").count("|") for line in rows]
    assert set(bars) == {10}


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_holds_equation_and_parameters(name):
    entry = LOSSES[name]
    lines = document.equation(entry.loss)
    assert lines[0].startswith("L") and "=" in lines[0] and all(lines)
    assert list(document.defaults(entry)) == list(entry.parameters())


def test_what_the_study_measured_is_told_as_it_is():
    difference = {"mAP_mean": -0.0123, "mAP_std": 0.0045, "seeds": [0, 1, 2], "verdict": "worse"}
    study = {"rows": [{"name": "mse", "cost_per_step": 1.234, "differences": [difference]}]}
    assert document.measured("mse", study) == ("1.23x", "-0.012 ± 0.004 (3 seeds): worse")
    assert document.measured("cwd", study) == ("-", "-")
    difference |= {"mAP_std": None, "seeds": [0], "verdict": "one seed: not decided"}
    assert document.measured("mse", study)[1] == "-0.012 (1 seed): one seed: not decided"


def test_published_gains_belong_to_losses():
    assert set(document.PUBLISHED) <= set(LOSSES)


def test_what_is_taken_from_a_docstring():
    assert document.equation(feature_mse) == ["L = 1 / (B C H W) * sum_{bchw} (s - t)^2"]
    assert len(document.equation(channel_wise_kl)) == 2  # the second line defines what the first one uses
    assert document.papers(channel_wise_kl) == ["[arXiv:2011.13256](https://arxiv.org/abs/2011.13256)"]
    assert document.equation(MGD) == ["L = 1/B sum_bcp (t_bcp - G(M * s)_bcp)^2"]  # of a function of its file
    assert document.summary(MGD).startswith("Masked generative distillation (MGD)")
    needs = {name: document.needs(name, LOSSES[name]) for name in ("mgd", "mse", "crosskd_classes")}
    assert needs["mgd"].endswith("trained parts") and "trained" not in needs["mse"]
    assert "class scores" in needs["crosskd_classes"]


def test_a_loss_without_an_equation_is_refused():
    def silent(*, s_map, t_map, strength):
        """Says nothing.

        Args:
            strength: how much.
        """

    with pytest.raises(UserError, match="no docstring with an equation"):
        document.row("silent", Term(silent, silent), {"rows": []})
    assert document.defaults(Term(silent, silent)) == {"s_map": ..., "t_map": ..., "strength": ...}
