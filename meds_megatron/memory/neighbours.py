"""The vote of the nearest stored vectors."""

import numpy as np

from meds_megatron.memory.compiled import compiled

ROUNDING = 1e12
"""Cosine distances that agree to this many parts count as equal: rounding must not decide a vote."""


@compiled
def vote(queries_QF: np.ndarray, points_NF: np.ndarray, labels_N: np.ndarray, neighbours: int) -> np.ndarray:
    """Label [Q] int64 that most of each query's `neighbours` nearest points carry, by cosine distance.

    All vectors are of unit length or zero. Of equally near points the older (smaller index) is taken; a tied vote goes
    to the smallest label. With fewer points than `neighbours` all of them vote.
    """
    queries, features = queries_QF.shape
    points = points_NF.shape[0]
    voters = min(neighbours, points)
    nearest = np.empty(voters, np.float64)
    voter_labels = np.empty(voters, np.int64)
    winners = np.empty(queries, np.int64)
    for query in range(queries):
        nearest[:] = np.inf
        for point in range(points):
            cosine = 0.0
            for feature in range(features):
                cosine += queries_QF[query, feature] * points_NF[point, feature]
            distance = np.floor((1.0 - cosine) * ROUNDING + 0.5)
            if distance >= nearest[voters - 1]:
                continue
            place = voters - 1
            while place > 0 and nearest[place - 1] > distance:
                nearest[place] = nearest[place - 1]
                voter_labels[place] = voter_labels[place - 1]
                place -= 1
            nearest[place] = distance
            voter_labels[place] = labels_N[point]
        best_label, best_votes = voter_labels[0], 0
        for voter in range(voters):
            label, votes = voter_labels[voter], 0
            for other in range(voters):
                votes += voter_labels[other] == label
            if votes > best_votes or (votes == best_votes and label < best_label):
                best_label, best_votes = label, votes
        winners[query] = best_label
    return winners
