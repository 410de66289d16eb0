"""The minimum spanning tree of a growing set of points, exact at every size."""

import numba
import numpy as np

ROUNDING = 2.0**13 + 1.0
"""Rounds away the last 13 bits of a length, and with them the rounding of its coordinates."""


def compiled(function):
    """Compile a loop over plain arrays with numba, once per machine.

    Division follows numpy (1 / 0 is infinite) and sums keep their order, so results are the same in every process.
    The interpreter lock is released, so a lookup and a recluster can run side by side.
    """
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written: compile in every process.
        return numba.njit(nogil=True, error_model="numpy")(function)


@compiled
def grow_spanning_tree(points_NF: np.ndarray, ends_M2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimum spanning tree of all N >= 1 points [N, F], from that of the first M + 1, given by its M edges.

    Returns the ends [N-1, 2] int32 and the lengths [N-1] float64 (euclidean) of its edges, in no particular order. Of
    edges of equal length the one whose newer end is older counts as shorter, then the one whose older end is older. So
    no two edges tie, and the tree does not depend on how it grew.

    An edge that is not in the tree of some points is in no tree of more points either, so each new point is compared
    with the edges of the tree so far only: O(N) a point besides its N distances. A point equal to an earlier one only
    adds the edge between them, since every other edge of its own is longer than that point's.
    """
    points = points_NF.shape[0]
    columns_FN = points_NF.T.copy()
    if ends_M2.shape[0] == 0:
        return _prim(columns_FN)
    ends = np.empty((points - 1, 2), np.int32)
    lengths = np.empty(points - 1, np.float64)
    for edge in range(ends_M2.shape[0]):
        one, other = ends_M2[edge, 0], ends_M2[edge, 1]
        ends[edge, 0], ends[edge, 1] = one, other
        lengths[edge] = distance(points_NF[one], points_NF[other])
    to_new = np.empty(points, np.float64)
    for new in range(ends_M2.shape[0] + 1, points):
        _distances(columns_FN, new, to_new)
        equal = 0
        while to_new[equal] > 0.0:
            equal += 1
        if equal < new:
            ends[new - 1, 0], ends[new - 1, 1], lengths[new - 1] = equal, new, 0.0
        else:
            _add_point(ends, lengths, to_new, new)
    return ends, lengths


@compiled
def _rounded(length):
    """A length to 40 significant bits (Veltkamp's splitting), so that rounding does not decide between lengths."""
    multiple = ROUNDING * length
    return multiple - (multiple - length)


@compiled
def distance(one_F, other_F):
    """Euclidean distance, rounded."""
    total = 0.0
    for feature in range(len(one_F)):
        difference = one_F[feature] - other_F[feature]
        total += difference * difference
    return _rounded(np.sqrt(total))


@compiled
def _distances(columns_FN, point, distances_N):
    """Distances of all points to one, bit for bit those of `distance`, but vectorised (a row is one feature)."""
    features, points = columns_FN.shape
    for other in range(points):
        distances_N[other] = 0.0
    for feature in range(features):
        here = columns_FN[feature, point]
        for other in range(points):
            difference = columns_FN[feature, other] - here
            distances_N[other] += difference * difference
    for other in range(points):
        distances_N[other] = _rounded(np.sqrt(distances_N[other]))


@compiled
def _shorter(length, end, other, than_length, than_end, than_other):
    """Whether an edge is shorter than another one, equal lengths in the order that `grow_spanning_tree` states."""
    if length != than_length:
        return length < than_length
    newer, than_newer = max(end, other), max(than_end, than_other)
    if newer != than_newer:
        return newer < than_newer
    return min(end, other) < min(than_end, than_other)


@compiled
def _prim(columns_FN):
    """Minimum spanning tree by Prim's algorithm: the point nearest to the tree joins it, until none is left."""
    points = columns_FN.shape[1]
    ends = np.empty((points - 1, 2), np.int32)
    lengths = np.empty(points - 1, np.float64)
    outside = np.arange(1, points)
    nearest = np.full(points, np.inf)
    nearest_end = np.zeros(points, np.int64)
    distances = np.empty(points, np.float64)
    last = 0
    for edge in range(points - 1):
        _distances(columns_FN, last, distances)
        best = 0
        for place in range(points - 1 - edge):
            point = outside[place]
            if _shorter(distances[point], last, point, nearest[point], nearest_end[point], point):
                nearest[point] = distances[point]
                nearest_end[point] = last
            top = outside[best]
            if _shorter(nearest[point], nearest_end[point], point, nearest[top], nearest_end[top], top):
                best = place
        last = outside[best]
        outside[best] = outside[points - 2 - edge]
        ends[edge, 0], ends[edge, 1], lengths[edge] = nearest_end[last], last, nearest[last]
    return ends, lengths


@compiled
def _add_point(ends, lengths, to_new, new):
    """Update the tree over points 0..new-1 in place to the one over 0..new; `to_new` holds the new point's distances.

    From the leaves up, every vertex has one candidate: the edge that connects its subtree to the new point, at first
    the direct one. Of the candidate and the edge to the parent the shorter stays in the tree; the longer becomes a
    candidate of the parent, which keeps its shortest one.
    """
    order, parents, parent_edges = _breadth_first(ends, new)
    candidate_length = to_new[:new].copy()
    candidate_end = np.arange(new).astype(np.int32)
    candidate_other = np.full(new, new, np.int32)
    for place in range(new - 1, 0, -1):
        vertex = order[place]
        parent, edge = parents[vertex], parent_edges[vertex]
        length, end, other = candidate_length[vertex], candidate_end[vertex], candidate_other[vertex]
        if _shorter(length, end, other, lengths[edge], ends[edge, 0], ends[edge, 1]):
            length, lengths[edge] = lengths[edge], length
            end, ends[edge, 0] = ends[edge, 0], end
            other, ends[edge, 1] = ends[edge, 1], other
        if _shorter(length, end, other, candidate_length[parent], candidate_end[parent], candidate_other[parent]):
            candidate_length[parent], candidate_end[parent], candidate_other[parent] = length, end, other
    lengths[new - 1] = candidate_length[0]
    ends[new - 1, 0] = candidate_end[0]
    ends[new - 1, 1] = candidate_other[0]


@compiled
def _breadth_first(ends, vertices):
    """Vertices of a tree from vertex 0, each after its parent; each one's parent and the edge to that parent."""
    first = np.zeros(vertices + 1, np.int32)
    for edge in range(vertices - 1):
        first[ends[edge, 0] + 1] += 1
        first[ends[edge, 1] + 1] += 1
    for vertex in range(vertices):
        first[vertex + 1] += first[vertex]
    end_of = first[:vertices].copy()
    incident = np.empty(max(2 * (vertices - 1), 0), np.int32)
    for edge in range(vertices - 1):
        for side in range(2):
            end = ends[edge, side]
            incident[end_of[end]] = edge
            end_of[end] += 1
    order = np.zeros(vertices, np.int32)
    parents = np.full(vertices, -1, np.int32)
    parent_edges = np.full(vertices, -1, np.int32)
    found = 1
    for place in range(vertices):
        vertex = order[place]
        for slot in range(first[vertex], first[vertex + 1]):
            edge = incident[slot]
            if edge == parent_edges[vertex]:
                continue
            neighbour = ends[edge, 0] + ends[edge, 1] - vertex
            parents[neighbour] = vertex
            parent_edges[neighbour] = edge
            order[found] = neighbour
            found += 1
    return order, parents, parent_edges
