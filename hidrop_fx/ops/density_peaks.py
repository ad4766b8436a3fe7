"""Clusters by density peaks (DPC-KNN), as Chat-UniVi and PPE merge vision tokens by them.

    places, rows, members = merged_by_density(features, keep, ratio=0.45, copies=8)

A token's density is that of its nearest neighbours; centres are dense tokens far from any denser one, and each token goes to the
nearest centre.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

_NEIGHBOURS = 5
# What the released code adds to the number of a cluster's tokens.
_EPSILON = 1e-6


def merged_by_density(
    features: Tensor, keep: int, *, ratio: float = 0.45, copies: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the tokens [E, n, D] of each image to `keep` clusters, each their mean.

    Rows are in the order of their centres' scores, highest first, and take the first places. `ratio` is what `keep` was
    made from.

    Returns:
        places int64 [E, keep], rows [E, keep, D], and members int64 [E, keep, copies]: places of a cluster's tokens, the last
        first, going down; from the last again where there are fewer.
    """
    cluster = density_clusters(features, keep)
    member = one_hot(cluster, keep)
    counts = member.sum(dim=1)
    weight = member.to(features.dtype).transpose(1, 2)
    rows = weight @ features / (counts[:, :, None] + _EPSILON).to(features.dtype)
    places = torch.arange(keep, device=features.device).expand(len(features), -1)
    return places, rows, _last_members(cluster, counts, copies)


@torch.no_grad()
def density_clusters(features: Tensor, clusters: int) -> Tensor:
    """Return the cluster of each token, int64 [E, n], numbered by their centres' scores, highest first.

    Distances are Euclidean over sqrt(D), density is exp(-mean of the squares to the k nearest, a token itself among them), k = 5
    or, of fewer clusters, min(3, max(clusters // 2, 1)). A centre's score is density times the distance to the nearest denser
    token (the largest of all for the densest). Of equal densities and scores the lower place counts as more.
    """
    entries, count, width = features.shape
    states = features.float()
    distance = torch.cdist(states, states) / width**0.5
    near = _NEIGHBOURS if clusters >= _NEIGHBOURS else min(3, max(clusters // 2, 1))
    nearest = distance.topk(near, dim=2, largest=False).values
    density = (-nearest.square().mean(dim=2)).exp()
    place = torch.arange(count, device=features.device)
    other, own = density[:, None], density[:, :, None]
    denser = (other > own) | ((other == own) & (place < place[:, None]))
    farthest = distance.flatten(1).amax(dim=1)[:, None, None]
    score = torch.where(denser, distance, farthest).amin(dim=2) * density
    centres = score.argsort(dim=1, descending=True, stable=True)[:, :clusters]
    to_centre = distance.gather(1, centres[:, :, None].expand(-1, -1, count))
    cluster = to_centre.argmin(dim=1)
    own_number = torch.arange(clusters, device=features.device).expand(entries, -1)
    return cluster.scatter(1, centres, own_number)


def _last_members(cluster: Tensor, counts: Tensor, copies: int) -> Tensor:
    """Return places [E, m, copies] of each cluster's tokens, the last first, over again where they end."""
    order = cluster.argsort(dim=1, stable=True)  # cluster after cluster, each in order
    ends = counts.cumsum(dim=1)[:, :, None] - 1
    back = torch.arange(copies, device=cluster.device) % counts[:, :, None]
    wanted = (ends - back).flatten(1)
    return order.gather(1, wanted).view(*counts.shape, copies)
