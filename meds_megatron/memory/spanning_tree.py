"""The minimum spanning tree of a growing set of points, exact at every size."""

import numpy as np

from meds_megatron.memory.compiled import compiled


@compiled
def grow_spanning_tree(points_NF: np.ndarray, ends_M2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimum spanning tree of all N points from that of the first M + 1, given by its M edges.

    Returns the ends [N-1, 2] int32 and the lengths [N-1] float64 (euclidean) of its edges, in no particular order.
    Edges that leave a tree can never come back when points are added, so each new point only competes with the edges
    of the tree so far: O(N) a point besides its N distances. N >= 1.
    """
    points = points_NF.shape[0]
    columns_FN = points_NF.T.copy()
    if ends_M2.shape[0] == 0:
        return _plant(columns_FN)
    ends = np.empty((points - 1, 2), np.int32)
    lengths = np.empty(points - 1, np.float64)
    for edge in range(ends_M2.shape[0]):
        one, other = ends_M2[edge, 0], ends_M2[edge, 1]
        ends[edge, 0], ends[edge, 1] = one, other
        lengths[edge] = _distance(points_NF, one, other)
    to_new = np.empty(points, np.float64)
    for new in range(ends_M2.shape[0] + 1, points):
        _distances(columns_FN, new, to_new)
        _add_point(ends, lengths, to_new, new)
    return ends, lengths


@compiled
def _distance(points_NF, one, other):
    total = 0.0
    for feature in range(points_NF.shape[1]):
        difference = points_NF[one, feature] - points_NF[other, feature]
        total += difference * difference
    return np.sqrt(total)


@compiled
def _distances(columns_FN, point, distances_N):
    """Distances of all points to one, bit for bit those of `_distance`, but several at once: columns lie together."""
    features, points = columns_FN.shape
    for other in range(points):
        distances_N[other] = 0.0
    for feature in range(features):
        here = columns_FN[feature, point]
        for other in range(points):
            difference = columns_FN[feature, other] - here
            distances_N[other] += difference * difference
    for other in range(points):
        distances_N[other] = np.sqrt(distances_N[other])


@compiled
def _plant(columns_FN):
    """The tree of points that have none yet: always the nearest point outside joins."""
    points = columns_FN.shape[1]
    ends = np.empty((points - 1, 2), np.int32)
    lengths = np.empty(points - 1, np.float64)
    outside = np.arange(1, points)
    nearest = np.full(points, np.inf)
    nearest_end = np.zeros(points, np.int32)
    distances = np.empty(points, np.float64)
    last = 0
    for edge in range(points - 1):
        _distances(columns_FN, last, distances)
        best = 0
        for place in range(points - 1 - edge):
            point = outside[place]
            if distances[point] < nearest[point]:
                nearest[point] = distances[point]
                nearest_end[point] = last
            if nearest[point] < nearest[outside[best]]:
                best = place
        last = outside[best]
        outside[best] = outside[points - 2 - edge]
        ends[edge, 0], ends[edge, 1], lengths[edge] = nearest_end[last], last, nearest[last]
    return ends, lengths


@compiled
def _add_point(ends, lengths, to_new, new):
    """Turn the tree over points 0..new-1 into the one over 0..new; `to_new` holds the new point's distances.

    From the leaves up, every vertex passes on the edge by which its subtree reaches the new point most cheaply (as
    measured by the longest edge on the way). Where that edge meets the one to the parent, the longer of the two goes
    on upwards as a candidate and the shorter stays for good.
    """
    order, parents, parent_edges = _walk(ends, new)
    reach_length = to_new[:new].copy()
    reach_end = np.arange(new).astype(np.int32)
    reach_other = np.full(new, new, np.int32)
    for place in range(new - 1, 0, -1):
        vertex = order[place]
        parent, edge = parents[vertex], parent_edges[vertex]
        length, end, other = reach_length[vertex], reach_end[vertex], reach_other[vertex]
        if length <= lengths[edge]:
            length, lengths[edge] = lengths[edge], length
            end, ends[edge, 0] = ends[edge, 0], end
            other, ends[edge, 1] = ends[edge, 1], other
        if length < reach_length[parent]:
            reach_length[parent], reach_end[parent], reach_other[parent] = length, end, other
    lengths[new - 1] = reach_length[0]
    ends[new - 1, 0] = reach_end[0]
    ends[new - 1, 1] = reach_other[0]


@compiled
def _walk(ends, vertices):
    """Vertices of a tree from vertex 0, each after its parent; each one's parent and the edge that leads to it."""
    first = np.zeros(vertices + 1, np.int32)
    for edge in range(vertices - 1):
        first[ends[edge, 0] + 1] += 1
        first[ends[edge, 1] + 1] += 1
    for vertex in range(vertices):
        first[vertex + 1] += first[vertex]
    filled = first[:vertices].copy()
    incident = np.empty(max(2 * (vertices - 1), 0), np.int32)
    for edge in range(vertices - 1):
        for side in range(2):
            end = ends[edge, side]
            incident[filled[end]] = edge
            filled[end] += 1
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
