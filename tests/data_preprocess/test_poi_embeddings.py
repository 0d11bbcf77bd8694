"""Vectors of POIs: the truncated SVD against numpy's full one, what the vectors mean, the file, other models' files."""
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from threadpoolctl import threadpool_limits

from checkins import transitions
from ga_llm.base.cli import UserError

FOLDER = Path("datasets/city/preprocessed")
VECTORS, MADE_OF = FOLDER / "city_poi_embeddings.npy", FOLDER / "city_poi_embeddings.json"


def random_graph(size, edges, seed=0):
    random = np.random.default_rng(seed)
    rows, columns = random.integers(0, size, (2, edges))
    return sparse.csr_array((random.integers(1, 9, edges).astype(float), (rows, columns)), shape=(size, size))


def halves(weights):
    vectors = transitions.embed(sparse.csr_array(np.asarray(weights, dtype=float)))
    return vectors[:, :64], vectors[:, 64:]


def test_scaled_by_the_roots_of_both_sums():
    weights = [[0, 4., 0], [9, 0, 7], [0, 0, 0]]        # rows sum to 4, 16, 0; columns to 9, 4, 7
    expected = [[0, 4 / (2 * 2), 0], [9 / (4 * 3), 0, 7 / (4 * 7 ** .5)], [0, 0, 0]]
    np.testing.assert_allclose(transitions.scaled(sparse.csr_array(np.array(weights))).toarray(), expected)


def test_factors_against_the_best_of_a_low_rank():
    """No product of rank 5 is nearer to the matrix than the truncated SVD's (Eckart and Young); ours is as near."""
    matrix = transitions.scaled(random_graph(120, 700))
    goes, comes = transitions.factors(matrix, 5)
    best = np.linalg.norm(np.linalg.svd(matrix.toarray(), compute_uv=False)[5:])
    assert best <= np.linalg.norm(matrix.toarray() - goes @ comes.T) <= best * (1 + 1e-6)


@pytest.mark.parametrize("rank", [64, 120, 200])
def test_factors_against_the_full_svd(rank):
    """The product is that of numpy's SVD, cut at that rank; more than the matrix has is zeros."""
    matrix = transitions.scaled(random_graph(120, 700))
    left, strength, right = np.linalg.svd(matrix.toarray())
    expected = (left[:, :rank] * strength[:rank]) @ right[:rank]
    goes, comes = transitions.factors(matrix, rank)
    assert goes.shape == comes.shape == (120, rank)
    np.testing.assert_allclose(goes @ comes.T, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(goes, axis=0), np.sqrt(np.pad(strength, (0, 200)))[:rank], atol=1e-6)
    assert (goes[:, 120:] == 0).all() and (comes[:, 120:] == 0).all()


def test_the_lengths():
    """1; the root of a half where people only go or only come; 0 where nobody does."""
    weights = np.zeros((6, 6))
    weights[0, 1], weights[1, 2], weights[1, 4], weights[2, 4] = 3, 1, 1, 5
    vectors = transitions.embed(sparse.csr_array(weights))
    assert vectors.shape == (6, 128) and vectors.dtype == np.float32
    root = .5 ** .5
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [root, 1, 1, 0, root, 0], atol=1e-6)
    assert not vectors[[3, 5]].any() and not vectors[0, 64:].any() and not vectors[4, :64].any()
    assert not transitions.embed(sparse.csr_array((6, 6))).any()


def test_places_with_the_same_neighbours_have_the_same_vector():
    """Places 7 and 8, if twice as popular; and, but for one visit in fifty, 9. Others differ."""
    weights = random_graph(40, 300).toarray() * 10
    weights[[7, 8, 9]] = 0
    weights[:, [7, 8, 9]] = 0
    weights[7, [1, 2, 3]], weights[[4, 5, 6], 7] = (20, 20, 10), (30, 10, 10)
    for other, times in ((8, 2), (9, 1)):
        weights[other], weights[:, other] = weights[7] * times, weights[:, 7] * times
    weights[9, 30] = weights[31, 9] = 1
    vectors = transitions.embed(sparse.csr_array(weights))
    alike = vectors @ vectors[7]
    assert alike[8] == pytest.approx(1, abs=1e-5) and alike[9] > .95
    assert np.delete(alike, [7, 8, 9]).max() < .7


def test_a_product_of_halves_says_where_people_go():
    """Along two circles, one each way: from each place the next one, and no other, is the best."""
    size = 30
    weights = np.zeros((2 * size, 2 * size))
    following = np.concatenate([(np.arange(size) + 1) % size, size + (np.arange(size) - 1) % size])
    weights[np.arange(2 * size), following] = np.arange(2 * size) % 7 + 1
    goes, comes = halves(weights)
    assert (goes @ comes.T).argmax(axis=1).tolist() == following.tolist()


def test_near_places_give_a_place_without_visits_a_vector():
    """Place 3, next to 2, where all people go from 0."""
    weights = np.zeros((4, 4))
    weights[0, 2], weights[1, 0] = 20, 20
    assert not np.any(halves(weights)[1][3])
    weights[2, 3] = weights[3, 2] = transitions.NEIGHBOUR_WEIGHT
    goes, comes = halves(weights)
    assert np.linalg.norm(goes[3]) == pytest.approx(.5 ** .5) == np.linalg.norm(comes[3])


def test_the_same_bits_whatever_the_threads_and_the_order_of_edges():
    graph = random_graph(2000, 20_000)
    first = transitions.embed(graph)
    order = np.random.default_rng(1).permutation(graph.nnz)
    entries = graph.tocoo()
    with threadpool_limits(2):
        again = transitions.embed(sparse.csr_array((entries.data[order], (entries.row[order], entries.col[order])),
                                                   shape=graph.shape))
    assert first.tobytes() == again.tobytes()


@pytest.fixture
def city(settings, script):
    """Two people and POIs 1 to 4 as in `small_city`, beside POI 5, which nobody goes to from anywhere or leaves.

    Returns the function that makes its samples, ids from `first_id`.
    """
    def make(first_id=1):
        rows = ["user,poi,category,lat,lon,time"]
        for day in range(1, 21):
            rows += [f"{user},{poi},{'food' if poi in 'ac' else 'shop'},{40 + 'abcd'.index(poi) ** 2},-73.5,"
                     f"2024-01-{day:02d} {hour + 2 * 'abcd'.index(poi):02d}:00:00"
                     for poi in "abcd" for user, hour in (("ann", 8), ("bob", 9))]
        rows.insert(1, "eve,e,shop,41.5,-73.5,2024-01-01 00:00:00")
        Path("raw.csv").write_text("\n".join(rows) + "\n")
        script("run.py", "-f", str(settings("csv", first_id=first_id, session_time_interval=600)))
    return make


@pytest.mark.parametrize("first_id", [0, 1])
def test_the_files(city, script, first_id):
    """Of 160 check-ins and eve's in train, in order of time, int(161 · 0.8) = 128 are train's: 16 days but one visit.

    That makes 32 trajectories of four places, one of them cut: 3 · 32 - 1 transitions. Eve's only visit makes no
    trajectory, so all that is known of its place is where it lies.
    """
    city(first_id)
    alone, alike = ("-geo_neighbours", "0"), ("-category_neighbours", "1")
    for flags, without in (((), 0), (alone, 1), ((*alone, *alike), 1)):
        script("poi_embeddings.py", "-dataset_name", "city", *flags)
        vectors = np.load(VECTORS, allow_pickle=False)
        assert vectors.dtype == np.float32 and vectors.shape == (first_id + 5, 128)
        lengths = np.linalg.norm(vectors, axis=1)[first_id:]
        assert not vectors[:first_id].any() and (lengths[:4] > .7).all() and (lengths[4] == 0) == without
        made_of = json.loads(MADE_OF.read_text())
        assert made_of == {
            "dataset": "city", "pois": 5, "source": "transitions", "geo_neighbours": 5 if not flags else 0,
            "category_neighbours": 1 if len(flags) == 4 else 0, "neighbour_weight": transitions.NEIGHBOUR_WEIGHT,
            "seed": 0, "transitions": 95, "distinct_transitions": 3, "pois_without_successor": 2,
            "pois_without_predecessor": 2, "pois_without_vector": without}
    script("poi_embeddings.py", "-dataset_name", "city", "-geo_neighbours", "0")
    goes, comes = np.split(np.load(VECTORS)[first_id:], 2, axis=1)
    assert (goes[:3] @ comes.T).argmax(axis=1).tolist() == [1, 2, 3]


def test_what_follows_train_changes_nothing(city, script):
    city()
    script("poi_embeddings.py", "-dataset_name", "city")
    first = VECTORS.read_bytes()
    for name in ("sample.csv", "validate_sample.csv", "test_sample.csv", "label_encoding.json", "stats.json"):
        (FOLDER / name).unlink()
    VECTORS.unlink()
    script("poi_embeddings.py", "-dataset_name", "city")
    assert VECTORS.read_bytes() == first


RIGHT = np.random.default_rng(0).normal(size=(6, 128))


@pytest.mark.parametrize("rows", [
    RIGHT, RIGHT.astype(np.float16), np.asfortranarray(RIGHT.astype(np.float32)), RIGHT.astype(">f8"),
    (RIGHT * 100).astype(np.int64), np.vstack([RIGHT, RIGHT])], ids=lambda rows: f"{rows.dtype} {len(rows)}")
def test_another_models_vectors(city, script, rows):
    """As float32, without rows beyond the last id."""
    city()
    np.save("other.npy", rows)
    script("poi_embeddings.py", "-dataset_name", "city", "-from", "other.npy")
    found = np.load(VECTORS)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, rows[:6].astype(np.float32))
    made_of = json.loads(MADE_OF.read_text())
    assert made_of["source"] == "other.npy" and made_of["transitions"] == 95 and "geo_neighbours" not in made_of


def test_vectors_taken_from_the_file_that_they_go_to(city, script):
    city()
    np.save(VECTORS, RIGHT)
    script("poi_embeddings.py", "-dataset_name", "city", "-from", str(VECTORS))
    np.testing.assert_array_equal(np.load(VECTORS), RIGHT.astype(np.float32))


def npy(array, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, RIGHT)
    return file.getvalue()


def header(text) -> bytes:
    text = text.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def with_value(value):
    rows = RIGHT.copy()
    rows[4, 100] = value
    return rows


WRONG = {       # contents of the file, words of the refusal
    "empty": (b"", "not a .npy file"),
    "text": (b"0.1 0.2\n", "not a .npy file"), "a pickle": (pickle.dumps(RIGHT), "not a .npy file"),
    "objects": (npy(RIGHT.astype(object), allow_pickle=True), "not a .npy file of numbers", "Python objects"),
    "an archive": (npz(), "not a .npy file"), "cut off": (npy(RIGHT)[:-1], "not a .npy file"),
    "cut off in its header": (npy(RIGHT)[:40], "not a .npy file"),
    "a huge shape": (header("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000, 128), }\n"),
                     "not a .npy file"),
    "a negative shape": (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 128), }\n"), "not a .npy file"),
    "no dictionary": (header("__import__('os').getcwd()\n"), "not a .npy file"),
    "nested": (header("(" * 9000 + "\n"), "not a .npy file"),
    "text values": (npy(RIGHT.astype("U5")), "6 × 128 values of type <U5"),
    "records": (npy(np.zeros(6, dtype=[("a", "f4"), ("b", "f4")])), "6 values of type"),
    "booleans": (npy(RIGHT > 0), "6 × 128 values of type bool"),
    "complex": (npy(RIGHT.astype(complex)), "6 × 128 values of type complex128"),
    "dates": (npy(RIGHT.astype("M8[s]")), "datetime64"),
    "one dimension": (npy(RIGHT[0]), "128 values of type float64"), "no dimension": (npy(RIGHT[0, 0]), "no values"),
    "three dimensions": (npy(RIGHT[None]), "1 × 6 × 128 values"),
    "too narrow": (npy(RIGHT[:, :64]), "6 × 64 values", "128 columns"),
    "on its side": (npy(RIGHT.T), "128 × 6 values", "128 columns"),
    "one row too few": (npy(RIGHT[1:]), "5 rows, but ids begin at 1", "put a row of zeros in front"),
    "two rows too few": (npy(RIGHT[2:]), "4 rows, and none for POI 5"),
    "no rows": (npy(RIGHT[:0]), "given.npy"),
    "NaN": (npy(with_value(np.nan)), "row 4", "not finite"), "infinity": (npy(with_value(-np.inf)), "row 4"),
    "too large for float32": (npy(with_value(1e39)), "row 4", "not finite"),
}


@pytest.mark.parametrize("contents, words", [(contents, words) for contents, *words in WRONG.values()], ids=WRONG)
def test_another_models_vectors_that_are_wrong(tmp_path, contents, words):
    path = tmp_path / "given.npy"
    path.write_bytes(contents)
    with pytest.raises(UserError) as error:
        transitions.read_external(path, pd.DataFrame({"Latitude": 40.}, index=range(1, 6)))
    message = str(error.value)
    assert message.startswith(str(path)) and "; " in message and len(message) - len(str(path)) < 400
    assert all(word in message for word in words), message


def test_one_row_too_few_where_ids_begin_at_0(city, error_of):
    """A line of the script; and what was there is still there."""
    city(first_id=0)
    np.save("given.npy", RIGHT[:4])
    VECTORS.write_bytes(b"as before")
    message = error_of("poi_embeddings.py", "-dataset_name", "city", "-from", "given.npy")
    assert "given.npy: 4 rows, and none for POI 4" in message and "front" not in message
    assert VECTORS.read_bytes() == b"as before" and not MADE_OF.exists()
