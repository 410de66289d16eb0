"""HDBSCAN's flat clusters from a spanning tree whose edges have a strict order.

The passes are those of HDBSCAN (Campello, Moulavi and Sander 2013; McInnes and Healy 2017): merge the points along the
edges from short to long (single linkage), condense that tree to the splits whose both sides are large enough, and
select the clusters with the most excess of mass. Density is lambda = 1 / length.

Equal vectors are one point with their number as its weight: no density separates them. The hdbscan package does split
them, at infinite density, which matters only where the vectors of a key never split at a finite one: then it returns
several clusters of equal vectors, or none, by the order of edges of length 0. Elsewhere it depends on the order of
edges only where lengths above 0 tie, which it sorts with an unstable sort.
"""

import numpy as np

from meds_megatron.memory.spanning_tree import compiled

NOISE = -1
"""Label of a vector in no cluster."""
EQUAL_VECTORS = 1e-12
"""Unit vectors no farther apart than this are equal: parallel vectors differ by rounding."""
EQUAL_STABILITY = 1e-6
"""Relative difference up to which a cluster and its children are equally stable (the package sums in single precision);
the cluster is then selected."""


def flat_clusters(
    ends_M2: np.ndarray, lengths_M: np.ndarray, min_cluster_size: int, allow_single_cluster: bool
) -> np.ndarray:
    """Labels [M+1] int64 of the points, M >= 1: -1 is noise, and clusters are numbered as by the hdbscan package.

    Edges of equal length are merged in the order in which the spanning tree ranks them.
    """
    one_M, other_M = ends_M2.T
    order = np.lexsort((np.minimum(one_M, other_M), np.maximum(one_M, other_M), lengths_M))
    lengths_M = np.where(lengths_M > EQUAL_VECTORS, lengths_M, 0.0)[order]
    return _select_clusters(_from_source(ends_M2[order]), lengths_M, min_cluster_size, allow_single_cluster)


@compiled
def _select_clusters(ends_M2, lengths_M, min_cluster_size, allow_single_cluster):
    """Labels of the points from the edges in ascending order."""
    children, sizes = _single_linkage(ends_M2)
    parents, births, stability, cluster_of, left_at = _condense(lengths_M, children, sizes, min_cluster_size)
    chosen = _most_stable(parents, stability, allow_single_cluster)
    return _label_points(parents, births, chosen, cluster_of, left_at)


@compiled
def _from_source(ends_M2):
    """The edges, given in ascending order, each from the end whose component took it in the package's Boruvka search.

    In every round each component, in the order of their representatives, takes its shortest edge to another one, unless
    that one took it first. The ends decide which child of a merge comes first, and so only the numbers of clusters.
    """
    edges = len(ends_M2)
    points = edges + 1
    directed = np.empty((edges, 2), np.int64)
    above = np.arange(points)
    rank = np.zeros(points, np.int64)
    component = np.arange(points)
    shortest = np.empty(points, np.int64)
    left = np.arange(edges)
    while len(left):
        shortest[:] = edges
        for edge in left:
            for side in range(2):
                own = component[ends_M2[edge, side]]
                shortest[own] = min(shortest[own], edge)
        for own in range(points):
            edge = shortest[own]
            if edge == edges:
                continue
            source, sink = ends_M2[edge]
            if component[source] != own:
                source, sink = sink, source
            top, other = _top(above, source), _top(above, sink)
            if top == other:
                continue
            directed[edge] = source, sink
            if rank[top] < rank[other]:
                above[top] = other
            else:
                rank[top] += rank[top] == rank[other]
                above[other] = top
        for point in range(points):
            component[point] = _top(above, point)
        left = np.array([edge for edge in left if component[ends_M2[edge, 0]] != component[ends_M2[edge, 1]]], np.int64)
    return directed


@compiled
def _top(above, node):
    """The last node of the chain above a node, which is shortened on the way."""
    while above[node] != node:
        above[node] = above[above[node]]
        node = above[node]
    return node


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
            top = _top(above, ends_M2[merge, side])
            children[merge, side] = top
            above[top] = node
        sizes[node] = sizes[children[merge, 0]] + sizes[children[merge, 1]]
    return children, sizes


@compiled
def _condense(lengths, children, sizes, min_cluster_size):
    """The condensed tree: of the merges, level by level from the last, those that split a cluster in two.

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
    levels = np.empty(merges, np.int64)
    levels[0] = points + merges - 1
    found = 1
    for place in range(merges):
        node = levels[place]
        merge = node - points
        cluster = cluster_of[node]
        density = 1.0 / lengths[merge]
        gone = left_at[node] >= 0.0
        equal = lengths[merge] == 0.0
        one, other = children[merge]
        splits = not gone and not equal and min(sizes[one], sizes[other]) >= min_cluster_size
        for child in (one, other):
            cluster_of[child] = cluster
            if gone:
                left_at[child] = left_at[node]
            elif splits:
                stability[cluster] += (density - births[cluster]) * sizes[child]
                parents[clusters] = cluster
                births[clusters] = density
                cluster_of[child] = clusters
                clusters += 1
            elif equal or sizes[child] < min_cluster_size:
                stability[cluster] += (density - births[cluster]) * sizes[child]
                left_at[child] = density
            if child >= points:
                levels[found] = child
                found += 1
    return parents[:clusters], births[:clusters], stability[:clusters], cluster_of[:points], left_at[:points]


@compiled
def _most_stable(parents, stability, allow_single_cluster):
    """Choose, from the leaves up, each cluster whose stability its children together do not exceed. A chosen cluster
    inside another chosen one is superseded by that."""
    clusters = len(parents)
    chosen = np.zeros(clusters, np.bool_)
    of_children = np.zeros(clusters, np.float64)
    for cluster in range(clusters - 1, -1, -1):
        if cluster > 0 or allow_single_cluster:
            chosen[cluster] = not of_children[cluster] > stability[cluster] * (1.0 + EQUAL_STABILITY)
            if not chosen[cluster]:
                stability[cluster] = of_children[cluster]
        if cluster > 0:
            of_children[parents[cluster]] += stability[cluster]
    return chosen


@compiled
def _label_points(parents, births, chosen, cluster_of, left_at):
    """Label every point with the topmost chosen cluster it is in, numbered in the order of clusters; noise is in none.

    When the cluster of all points is chosen, its members are those that stay until its first split (or its end).
    """
    points = len(cluster_of)
    topmost = np.full(len(parents), -1, np.int64)
    numbers = np.full(len(parents), -1, np.int64)
    found = 0
    for cluster in range(len(parents)):
        if cluster > 0:
            topmost[cluster] = topmost[parents[cluster]]
        if topmost[cluster] < 0 and chosen[cluster]:
            topmost[cluster] = cluster
            numbers[cluster] = found
            found += 1
    least = 0.0
    if chosen[0]:
        for cluster in range(1, len(parents)):
            if parents[cluster] == 0:
                least = max(least, births[cluster])
        for point in range(points):
            if cluster_of[point] == 0:
                least = max(least, left_at[point])
    labels = np.full(points, NOISE, np.int64)
    for point in range(points):
        cluster = topmost[cluster_of[point]]
        if cluster > 0 or (cluster == 0 and left_at[point] >= least):
            labels[point] = numbers[cluster]
    return labels
