"""The metrics are pyxclib's: worked by hand, and compared with scikit-learn where both define the same."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import ndcg_score, precision_score, recall_score

from raexmc_ray.memory.hits import Hits
from raexmc_ray.metrics import inverse_propensity, score_table
from raexmc_ray.predict import aggregate

ONES = np.ones(6)


def relevance(*rows: list[int]) -> sp.csr_matrix:
    matrix = np.zeros((len(rows), 6), np.float32)
    for i, labels in enumerate(rows):
        matrix[i, labels] = 1
    return sp.csr_matrix(matrix)


def table(predicted: list[list[int]], truth: sp.csr_matrix, weights: np.ndarray = ONES) -> dict[str, float]:
    return score_table(np.array(predicted), truth, weights, precision_at=(1, 3), recall_at=(2, 3))


def test_by_hand() -> None:
    got = table([[0, 1, 2], [3, 4, 5]], relevance([0, 2], [4]))
    assert got["P@1"] == pytest.approx(50)
    assert got["P@3"] == pytest.approx(100 * (2 / 3 + 1 / 3) / 2)
    assert got["R@2"] == pytest.approx(100 * (1 / 2 + 1) / 2)
    ideal = 1 + 1 / np.log2(3)
    assert got["nDCG@3"] == pytest.approx(100 * ((1 + 1 / np.log2(4)) / ideal + 1 / np.log2(3)) / 2)


def test_propensity_scores_are_a_ratio_of_means() -> None:
    weights = np.array([1.0, 2.0, 4.0, 8.0, 1.0, 1.0])
    got = table([[0, 1, 2], [4, 1, 0]], relevance([0, 3], [1]), weights)
    assert got["PSP@1"] == pytest.approx(100 * (1 + 0) / (8 + 2))
    assert got["PSP@3"] == pytest.approx(100 * (1 + 2) / (9 + 2))


def test_inverse_propensity_by_hand() -> None:
    truth = relevance([0, 1], [0], [0], [0])
    c = (np.log(4) - 1) * (1.5 + 1) ** 0.55
    expected = [1 + c * (n + 1.5) ** -0.55 for n in (4, 1, 0, 0, 0, 0)]
    assert inverse_propensity(truth, 0.55, 1.5) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_no_label_weighs_less_than_nothing_where_there_are_hardly_any_rows(rows: int) -> None:
    trained = relevance([0, 1], [0])[:rows]
    assert inverse_propensity(trained, 0.55, 1.5).tolist() == [1.0] * 6


def test_rows_without_labels_are_excluded_and_short_rows_padded() -> None:
    alone = table([[0, -1, -1]], relevance([0, 1, 2]))
    assert alone["P@3"] == pytest.approx(100 / 3)
    assert table([[0, -1, -1], [1, 2, 3]], relevance([0, 1, 2], [])) == alone
    with pytest.raises(ValueError, match="no row has a label"):
        table([[0, 1, 2]], relevance([]))
    with pytest.raises(ValueError, match="need as many predictions"):
        table([[0, 1]], relevance([0]))


def test_ndcg_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random((50, 30)) < 0.2).astype(np.float32)
    truth[:, 0] = 1
    scores = rng.random((50, 30))
    got = score_table(np.argsort(-scores, axis=1), sp.csr_matrix(truth), np.ones(30), (5,), (10,))
    assert got["nDCG@5"] == pytest.approx(100 * ndcg_score(truth, scores, k=5))


def test_a_label_without_a_training_instance_weighs_most_and_counts_as_any_other() -> None:
    trained = relevance([0], [0], [1], [0, 1])
    weights = inverse_propensity(trained, 0.55, 1.5)
    assert weights.argmax() == 2
    assert np.isfinite(weights).all()
    got = table([[2, 0, 1], [0, 2, -1]], relevance([2], [0, 2]), weights)
    assert got["P@1"] == 100
    assert got["PSP@1"] == pytest.approx(100 * (weights[2] + weights[0]) / (2 * weights[2]))
    assert got["PSP@3"] == pytest.approx(100)
    with pytest.raises(ValueError, match="propensity_b is 0"):
        inverse_propensity(trained, 0.55, 0.0)
    assert np.isfinite(inverse_propensity(trained[:, :2], 0.55, 0.0)).all(), "where every label has one"


def test_equal_scores_are_ranked_by_label_and_the_metrics_take_them_so() -> None:
    """Two instances with the same cosine vote for labels 4 and 1, and the labels' own keys tie, too."""
    hits = Hits(
        key_ids_Bb=np.array([[0, 1, 10, 13]]),
        scores_Bb=np.full((1, 4), 0.5, np.float32),
        is_label_Bb=np.array([[False, False, True, True]]),
        votes=np.array([4, 1, 0, 3], np.int32),
        vote_offsets=np.arange(5),
        snapshot="s",
    )
    found = aggregate(hits, lambda_=0.5, temperature=0.1, k=4)
    assert found.labels_Bk.tolist() == [[0, 1, 3, 4]]
    assert len(set(found.scores_Bk[0].tolist())) == 1
    for right, expected in (([0], 100), ([1], 0), ([4], 0)):
        assert table(found.labels_Bk.tolist(), relevance(right))["P@1"] == expected


def test_labels_of_equal_weight_make_one_best_ranking() -> None:
    """What the best ranking has does not depend on which of equally heavy labels comes first."""
    got = table([[0, 1, 2], [2, 1, 0]], relevance([0, 1, 2], [0, 1, 2]), np.full(6, 2.0))
    assert got["PSP@1"] == got["PSP@3"] == got["PSnDCG@3"] == pytest.approx(100)


def test_precision_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random((40, 12)) < 0.3
    truth[:, 0] = True
    order = np.argsort(-rng.random((40, 12)), axis=1)
    given = np.zeros_like(truth)
    np.put_along_axis(given, order[:, :3], True, axis=1)
    got = score_table(order, sp.csr_matrix(truth.astype(np.float32)), np.ones(12), (3,), (3,))
    assert got["P@3"] == pytest.approx(100 * precision_score(truth, given, average="samples"))
    assert got["R@3"] == pytest.approx(100 * recall_score(truth, given, average="samples"))
