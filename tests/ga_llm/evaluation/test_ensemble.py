"""The mean of several evaluations, by hand, and tables that are of other pairs."""
import numpy as np
import pytest

from ga_llm.base.cli import UserError
from ga_llm.evaluation import ensemble

ONE, OTHER = np.array([[0.1, 0.2, 0.1], [0.4, 0.4, 0.2]]), np.array([[0.6, 0.2, 0.2], [0.25, 0.25, 0.5]])


@pytest.fixture
def test_prompts(make_prompt):
    return [make_prompt(0, 1, [8], 7), make_prompt(2, 1, [8], 404)]


def test_mean_by_hand():
    """Each model's probabilities are normalised over the candidates first."""
    found = np.exp(ensemble.average([np.log(ONE), np.log(OTHER)]))
    np.testing.assert_allclose(found, [[(0.25 + 0.6) / 2, (0.5 + 0.2) / 2, (0.25 + 0.2) / 2],
                                       [(0.4 + 0.25) / 2, (0.4 + 0.25) / 2, (0.2 + 0.5) / 2]])


def test_ranks(test_prompts):
    """The most probable first; a tie counts against the target; what is no candidate has no rank."""
    first, second = ensemble.rank(np.log(ONE), test_prompts, [5, 6, 7])
    assert first.rank == 3 and second.rank is None
    assert [poi for poi, _ in first.top] == [6, 5, 7] and [poi for poi, _ in second.top] == [5, 6, 7]
    np.testing.assert_allclose([p for _, p in first.top], np.log([0.2, 0.1, 0.1]))


def test_rows_of_the_pairs(tmp_path, test_prompts):
    """A table has a row for every line of the test file; those that the protocol leaves out are NaN."""
    np.save(tmp_path / "t.npy", np.stack([ONE[0], np.full(3, np.nan), ONE[1]]))
    np.testing.assert_array_equal(ensemble.read(tmp_path / "t.npy", test_prompts, [5, 6, 7]), ONE)


@pytest.mark.parametrize("table, message", [
    (np.full((3, 3), np.nan), "lacks pairs of these"),
    (np.zeros((2, 3)), "not of these pairs and 3 POIs"),
    (np.zeros((3, 4)), "not of these pairs and 3 POIs"),
    (np.zeros((3, 3), dtype=int), "not of these pairs and 3 POIs"),
    (np.array([[{}]]), "no table of numpy"),
])
def test_tables_of_others_are_one_line(tmp_path, test_prompts, table, message):
    np.save(tmp_path / "t.npy", table)
    with pytest.raises(UserError, match=message):
        ensemble.read(tmp_path / "t.npy", test_prompts, [5, 6, 7])


def test_a_missing_table(tmp_path, test_prompts):
    with pytest.raises(UserError, match="none.npy.*full_table True"):
        ensemble.read(tmp_path / "none.npy", test_prompts, [5, 6, 7])
