"""The report's mistakes against planted ones, the hdbscan package and scikit-learn."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import normalize

from meds_megatron.config import MemoryConfig
from meds_megatron.report.contents import chosen_texts, run_contents
from meds_megatron.report.mistakes import NO_ANSWER, NO_FINGERPRINT, find_mistakes, letters, principal_components
from meds_megatron.report.responses import read_responses
from meds_megatron.run.reader import read_run
from tests.report.planted_run import HABITS, write_planted_run


@pytest.fixture(scope="module")
def rows(planted) -> list[dict]:
    files = sorted((planted / "rollouts").iterdir())
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def responses(planted):
    return read_responses(read_run(planted).rollouts)


def is_clustered(mistake) -> bool:
    return mistake.name not in (NO_ANSWER, NO_FINGERPRINT)


def test_every_wrong_response_is_in_one_mistake(rows, responses):
    found = list(find_mistakes(responses.wrong, MemoryConfig()))
    placed = np.concatenate([mistake.rows for problem in found for mistake in problem.mistakes])
    assert sorted(placed.tolist()) == list(range(sum(not row["correct"] for row in rows)))


def test_clusters_are_those_of_the_hdbscan_package_and_of_the_habits(rows, responses):
    for problem in find_mistakes(responses.wrong, MemoryConfig()):
        question = responses.problems[problem.problem].question
        wrong = [row for row in rows if row["prompt"] == question and not row["correct"] and row["fingerprint"]]
        units = normalize(np.array([row["fingerprint"] for row in wrong], dtype=np.float32).astype(float))
        import hdbscan

        model = hdbscan.HDBSCAN(min_cluster_size=2, min_samples=1, approx_min_span_tree=False)
        expected = Counter(model.fit(units).labels_.tolist())
        clusters = [mistake for mistake in problem.mistakes if is_clustered(mistake)]
        assert sorted(len(mistake.rows) for mistake in clusters) == sorted(expected.values())
        labels = {row: number for number, mistake in enumerate(clusters) for row in mistake.rows.tolist()}
        habits = {row: responses.wrong.answers_W[row] for row in labels}
        assert adjusted_rand_score(list(habits.values()), list(labels.values())) > 0.9


def test_a_mistake_has_its_answers_steps_and_penalty(planted, rows):
    contents = run_contents(read_run(planted), text_bytes=2**20).mistakes
    mistakes, problems = contents["mistakes"], contents["problems"]
    first = problems["question"][mistakes["problem"][0]]
    answer = str(int(problems["answer"][mistakes["problem"][0]]) + HABITS[0][1])
    made = [row for row in rows if row["prompt"] == first and row["response"].endswith(f"\\boxed{{{answer}}}")]
    assert mistakes["answers"][0] == [[answer, len(made)]]
    assert mistakes["times"][0] == len(made)
    assert (mistakes["first"][0], mistakes["last"][0]) == (made[0]["step"], made[-1]["step"])
    assert mistakes["steps"][0] == len({row["step"] for row in made})
    assert mistakes["penalty"][0] == pytest.approx(made[-1]["penalty"], rel=1e-3)
    assert sum(mistakes["timeline"][0]) == len(made)
    assert mistakes["times"] == sorted(mistakes["times"], reverse=True)


def test_without_fingerprints_an_answer_given_twice_is_a_mistake(tmp_path):
    run = write_planted_run(tmp_path / "run", steps=1, problems=1, prompts_per_step=1)
    path = run / "rollouts" / "step_000001.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        row["fingerprint"] = None
        if number in (4, 5):
            row["response"] = f"\\boxed{{only {number}}}"
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    wrong = read_responses([path]).wrong
    (problem,) = find_mistakes(wrong, MemoryConfig())
    found = {frozenset(wrong.answers_W[row] for row in mistake.rows): mistake for mistake in problem.mistakes}
    # One of HOSTILE has a box of its own, where the response has no other.
    once = frozenset({"only 4", "only 5", "<b>1</b>"})
    assert set(found) == {frozenset({"4"}), frozenset({"8"}), once, frozenset({None})}
    assert {mistake.name for mistake in found.values()} == {"no fingerprint", "no answer"}
    assert np.isnan(problem.positions_N2).all()


def test_with_answers_as_clusters_they_are_answers_in_any_spelling(responses):
    wrong = responses.wrong
    spelled = [
        f"{answer}.0" if row % 2 and answer is not None and answer.isdigit() else answer
        for row, answer in enumerate(wrong.answers_W)
    ]
    found = list(find_mistakes(replace(wrong, answers_W=spelled), MemoryConfig(method="answer")))
    for problem in found:
        for mistake in problem.mistakes:
            assert len({wrong.answers_W[row] for row in mistake.rows}) == 1
    assert {mistake.name for problem in found for mistake in problem.mistakes} == {"A", "B", "C", NO_ANSWER}
    # One point a fingerprint, clustered or not.
    points = sum(int(np.isfinite(problem.positions_N2[:, 0]).sum()) for problem in found)
    assert points == int(np.isfinite(wrong.fingerprints_WL[:, 0]).sum())


@pytest.mark.parametrize("rows_and_features", [(40, 14), (3, 14), (5, 2), (2, 1), (1, 6)])
def test_positions_are_principal_components(rows_and_features):
    vectors = np.random.default_rng(0).normal(size=rows_and_features)
    positions, shares = principal_components(vectors)
    axes = min(2, *rows_and_features)
    if len(vectors) == 1:
        assert positions.tolist() == [[0.0, 0.0]] and shares == (0.0, 0.0)
        return
    expected = PCA(n_components=axes, svd_solver="full").fit(vectors)
    np.testing.assert_allclose(np.abs(positions[:, :axes]), np.abs(expected.transform(vectors)), atol=1e-9)
    np.testing.assert_allclose(shares[:axes], expected.explained_variance_ratio_, atol=1e-9)


def test_equal_vectors_are_one_point():
    positions, shares = principal_components(np.full((4, 3), 0.3))
    assert not positions.any() and shares == (0.0, 0.0)


def test_the_first_response_of_a_cluster_is_the_nearest_to_its_mean(responses):
    for problem in find_mistakes(responses.wrong, MemoryConfig()):
        for mistake in problem.mistakes:
            if not is_clustered(mistake):
                continue
            units = normalize(responses.wrong.fingerprints_WL[mistake.rows].astype(float))
            distances = np.linalg.norm(units - units.mean(axis=0), axis=1)
            assert distances[0] == distances.min()


def test_texts_go_to_the_typical_responses_of_all_mistakes_first(responses):
    found = list(find_mistakes(responses.wrong, MemoryConfig()))
    firsts = {int(mistake.rows[0]) for problem in found for mistake in problem.mistakes}
    size = int(responses.wrong.bytes_W[list(firsts)].sum())
    assert chosen_texts(found, responses.wrong.bytes_W, size) == firsts
    assert chosen_texts(found, responses.wrong.bytes_W, 0) == set()
    assert len(chosen_texts(found, responses.wrong.bytes_W, 2**30)) == len(responses.wrong.bytes_W)


def test_names_go_on_after_z():
    assert [letters(number) for number in (0, 25, 26, 51, 52, 701, 702)] == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]
