"""The mixture with the user's history, by hand."""
import numpy as np
import pandas as pd
import pytest

from ga_llm.base.cli import UserError
from ga_llm.evaluation import history

NOW = np.datetime64("2012-04-06T18:00:00")      # a Friday


def test_weights_by_hand():
    times = np.array(["2012-04-06T16:30:00", "2012-04-05T18:00:00", "2012-04-01T18:00:00", "2012-03-07T06:00:00"],
                     dtype="datetime64[s]")
    near = np.exp(-0.5)
    expected = [np.exp(-1.5 / 24 / 60) * (0.2 + near) * 1.5,      # an hour and a half ago
                np.exp(-1 / 60) * 1.2 * 1.5,                      # at this hour, yesterday
                np.exp(-5 / 60) * 1.2 * 0.5,                      # on a Sunday
                np.exp(-30.5 / 60) * (0.2 + np.exp(-32)) * 1.5]   # at the other end of the day
    np.testing.assert_allclose(history.visit_weights(times, NOW), expected, rtol=1e-6)


def test_hours_meet_at_midnight():
    times = np.array(["2012-04-05T23:45:00", "2012-04-05T00:15:00"], dtype="datetime64[s]")
    before, after = history.visit_weights(times, np.datetime64("2012-04-06T00:00:00"))
    assert before / np.exp(-0.25 / 24 / 60) == pytest.approx(after / np.exp(-23.75 / 24 / 60))


@pytest.fixture
def sample_csv(tmp_path):
    """User 1: two train check-ins, a test trajectory of three whose last is the target; another trajectory, later."""
    rows = [(1, 5, 0, "2012-04-01 18:00:00", "train"), (1, 6, 0, "2012-04-02 18:00:00", "train"),
            (2, 7, 1, "2012-04-02 18:00:00", "train"), (1, 8, 2, "2012-04-06 09:00:00", "test"),
            (1, 99, 2, "2012-04-06 10:00:00", "test"), (1, 6, 2, "2012-04-06 18:00:00", "test"),
            (1, 7, 3, "2012-04-05 18:00:00", "test"), (1, 5, 4, "2012-04-07 18:00:00", "train")]
    path = tmp_path / "sample.csv"
    pd.DataFrame(rows, columns=["UserId", "PoiId", "TrajectoryId", "LocalTime", "Split"]).to_csv(path, index=False)
    return path


def test_shares_of_what_the_prompt_may_show(sample_csv, make_prompt):
    """Neither another test trajectory, nor another user, nor what comes later, nor a POI that is no candidate."""
    prompts = [make_prompt(0, 1, [8], 6, time="2012-04-06 18:00:00"), make_prompt(1, 3, [8], 6)]
    found = history.probabilities(sample_csv, prompts, [5, 6, 7, 8])
    five, six, eight = history.visit_weights(np.array(["2012-04-01T18:00:00", "2012-04-02T18:00:00",
                                                       "2012-04-06T09:00:00"], dtype="datetime64[s]"), NOW)
    np.testing.assert_allclose(found[0], np.array([five, six, 0, eight]) / (five + six + eight), rtol=1e-5)
    assert found[1].tolist() == [0, 0, 0, 0]


def test_prompts_of_strangers(sample_csv, foreign_prompt):
    with pytest.raises(UserError, match="line 1 of the test file names no user or no time"):
        history.probabilities(sample_csv, [foreign_prompt], [5, 6])


def test_mixture_by_hand():
    """The model's probabilities are normalised over the candidates."""
    log_probs = np.log(np.array([[0.1, 0.2, 0.1]], dtype=np.float32))
    shares = np.array([[0.0, 0.0, 1.0]], dtype=np.float32)
    np.testing.assert_allclose(np.exp(history.mix(log_probs, shares, 0.5)), [[0.125, 0.25, 0.125 + 0.5]], rtol=1e-5)
    np.testing.assert_allclose(np.exp(history.mix(log_probs, 0 * shares, 0.0)), [[0.25, 0.5, 0.25]], rtol=1e-5)
