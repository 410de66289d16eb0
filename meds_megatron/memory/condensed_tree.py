"""HDBSCAN's flat clusters from a spanning tree, where they do not depend on the order of its edges.

The passes are those of HDBSCAN (Campello, Moulavi and Sander 2013; McInnes and Healy 2017): merge the points along the
edges from short to long (single linkage), condense that tree to the splits whose both sides are large enough, and
select the clusters with the most excess of mass. Density is lambda = 1 / length.
"""

import numpy as np

from meds_megatron.memory.spanning_tree import compiled

NOISE = -1
"""Label of a vector in no cluster."""
EQUAL_LENGTHS = 1e-12
"""Lengths of edges between unit vectors that differ by no more than this are a tie."""
EQUAL_STABILITY = 1e-5
"""Relative difference up to which rounding (the package sums in single precision) could decide between clusters."""


def flat_clusters(
    ends_M2: np.ndarray, lengths_M: np.ndarray, min_cluster_size: int, allow_single_cluster: bool
) -> np.ndarray | None:
    """Labels [M+1] int64 of the points (-1 is noise, clusters are numbered by their oldest point), M >= 1.

    None where two edges tie or a choice between clusters depends on rounding: the result of the hdbscan package then
    depends on the order of its edges, so only a fit by the package itself gives it.
    """
    order = np.argsort(lengths_M)
    lengths_M = lengths_M[order]
    if (lengths_M[1:] - lengths_M[:-1] <= EQUAL_LENGTHS).any():
        return None
    labels_N, certain = _select_clusters(ends_M2[order], lengths_M, min_cluster_size, allow_single_cluster)
    return labels_N if certain else None


@compiled
def _select_clusters(ends_M2, lengths_M, min_cluster_size, allow_single_cluster):
    """Labels of the points from the edges in ascending order, and whether no choice between clusters was close."""
    children, sizes = _single_linkage(ends_M2)
    parents, births, stability, cluster_of, left_at = _condense(lengths_M, children, sizes, min_cluster_size)
    chosen, certain = _most_stable(parents, stability, allow_single_cluster)
    return _label_points(parents, births, chosen, cluster_of, left_at), certain


@compiled
def _single_linkage(ends_M2):
    """Merge the points along the edges, shortest first: children [M, 2] of the merges and sizes [2M + 1] of all nodes.

    Point p is node p, merge i is node M + 1 + i.
    """
    merges = len(ends_M2)
    points = merges + 1
    children = np.empty((merges, 2), np.int64)
    sizes = np.ones(points + merges, np.int64)
    above = np.arange(points + merges)
    for merge in range(merges):
        node = points + merge
        for side in range(2):
            top = np.int64(ends_M2[merge, side])
            while above[top] != top:
                above[top] = above[above[top]]
                top = above[top]
            children[merge, side] = top
            above[top] = node
        sizes[node] = sizes[children[merge, 0]] + sizes[children[merge, 1]]
    return children, sizes


@compiled
def _condense(lengths, children, sizes, min_cluster_size):
    """The condensed tree: of the merges, from the last to the first, those that split a cluster in two.

    Returns for every cluster (0 is all points, a child comes after its parent) its parent, the lambda of its birth and
    its stability; and for every point the smallest cluster that holds it and the lambda at which it leaves that.
    """
    merges = len(lengths)
    points = merges + 1
    parents = np.full(points, -1, np.int64)
    births = np.zeros(points, np.float64)
    stability = np.zeros(points, np.float64)
    clusters = 1
    cluster_of = np.zeros(points + merges, np.int64)
    left_at = np.full(points + merges, -1.0)
    for merge in range(merges - 1, -1, -1):
        node = points + merge
        cluster = cluster_of[node]
        if left_at[node] >= 0.0:
            for side in range(2):
                cluster_of[children[merge, side]] = cluster
                left_at[children[merge, side]] = left_at[node]
            continue
        density = 1.0 / lengths[merge]
        splits = sizes[children[merge, 0]] >= min_cluster_size and sizes[children[merge, 1]] >= min_cluster_size
        for side in range(2):
            child = children[merge, side]
            cluster_of[child] = cluster
            if splits:
                stability[cluster] += (density - births[cluster]) * sizes[child]
                parents[clusters] = cluster
                births[clusters] = density
                cluster_of[child] = clusters
                clusters += 1
            elif sizes[child] < min_cluster_size:
                stability[cluster] += (density - births[cluster]) * sizes[child]
                left_at[child] = density
    return parents[:clusters], births[:clusters], stability[:clusters], cluster_of[:points], left_at[:points]


@compiled
def _most_stable(parents, stability, allow_single_cluster):
    """Choose, from the leaves up, each cluster whose stability its children together do not exceed; also whether no
    choice was close. A chosen cluster inside another chosen one is superseded by that."""
    clusters = len(parents)
    chosen = np.zeros(clusters, np.bool_)
    of_children = np.zeros(clusters, np.float32)
    has_children = np.zeros(clusters, np.bool_)
    certain = True
    for cluster in range(clusters - 1, -1, -1):
        if cluster > 0 or allow_single_cluster:
            own, below = stability[cluster], np.float64(of_children[cluster])
            if has_children[cluster] and np.isfinite(max(own, below)):
                certain = certain and abs(own - below) > EQUAL_STABILITY * max(own, below)
            chosen[cluster] = not below > own
            if below > own:
                stability[cluster] = below
        if cluster > 0:
            of_children[parents[cluster]] = np.float32(of_children[parents[cluster]] + stability[cluster])
            has_children[parents[cluster]] = True
    return chosen, certain


@compiled
def _label_points(parents, births, chosen, cluster_of, left_at):
    """Label every point with the topmost chosen cluster it is in, numbered by first appearance; noise is in none.

    When the cluster of all points is chosen, its members are those that stay until its first split (or its end).
    """
    points = len(cluster_of)
    topmost = np.full(len(parents), -1, np.int64)
    for cluster in range(len(parents)):
        if cluster > 0:
            topmost[cluster] = topmost[parents[cluster]]
        if topmost[cluster] < 0 and chosen[cluster]:
            topmost[cluster] = cluster
    least = 0.0
    if chosen[0]:
        for cluster in range(1, len(parents)):
            if parents[cluster] == 0:
                least = max(least, births[cluster])
        for point in range(points):
            if cluster_of[point] == 0:
                least = max(least, left_at[point])
    numbers = np.full(len(parents), -1, np.int64)
    labels = np.full(points, NOISE, np.int64)
    found = 0
    for point in range(points):
        cluster = topmost[cluster_of[point]]
        if cluster < 0 or (cluster == 0 and left_at[point] < least):
            continue
        if numbers[cluster] < 0:
            numbers[cluster] = found
            found += 1
        labels[point] = numbers[cluster]
    return labels
