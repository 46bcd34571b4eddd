"""How near a set of pictures is to another, in the features of whatever judges them.

All metrics take features as rows, `n` of the pictures that are judged and `m` real ones, and know nothing of where they
come from: a classifier trained on the data, a CLIP, or, for photographs, an Inception network.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cond_diffusion.errors import UserError


def frechet_distance(samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> float:
    """Return the Fréchet distance of Gaussians with the features' means and covariances (Heusel et al. 2017, eq. 6).

    It is larger for fewer pictures: compare with that of as many real ones.
    """
    # Of the extra `eval`: imported where it is used, so that training and drawing do without.
    from torchmetrics.image.fid import FrechetInceptionDistance

    as_they_are = nn.Identity()
    as_they_are.num_features = samples.shape[1]  # what torchmetrics asks a network for  # pyright: ignore
    metric = FrechetInceptionDistance(feature=as_they_are).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(samples.double(), real=False)
    return metric.compute().item()


@dataclass(frozen=True)
class Manifolds:
    """How two sets of features overlap, each widened to the balls that reach to its k-th nearest neighbours.

    precision, recall: the share of samples in a ball of a real picture, and the other way round (Kynkäänniemi et al.
    2019). density, coverage: in how many balls of real pictures a sample lies, over k; the share of real pictures whose
    ball holds a sample (Naeem et al. 2020). All are 1 for sets that cannot be told apart, but recall and precision,
    which come out lower.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifolds(samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = 5) -> Manifolds:
    """Compare two sets of features; raise UserError if one has no more than k."""
    if min(len(samples), len(real)) <= k:
        raise UserError(f"precision and recall need more than {k} pictures of both kinds; draw more samples")
    samples, real = samples.double(), real.double()
    radius_of_sample, radius_of_real = _distance_to_neighbour(samples, k), _distance_to_neighbour(real, k)
    distance = torch.cdist(samples, real)
    in_ball_of_real = distance < radius_of_real
    return Manifolds(
        precision=in_ball_of_real.any(1).double().mean().item(),
        recall=(distance < radius_of_sample[:, None]).any(0).double().mean().item(),
        density=in_ball_of_real.double().sum(1).mean().item() / k,
        coverage=in_ball_of_real.any(0).double().mean().item(),
    )


def _distance_to_neighbour(features: Float[Tensor, "n d"], k: int) -> Float[Tensor, " n"]:
    """Return how far each row's k-th nearest other one is."""
    return torch.cdist(features, features).kthvalue(k + 1, dim=1).values  # the nearest of all is the row itself


def nearest(
    samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int
) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """Return for each sample the distances to the k nearest real pictures, and which these are."""
    real = real.double()  # in fp32 a copy would lie at a distance from itself
    found = [torch.cdist(rows.double(), real).topk(k, dim=1, largest=False) for rows in samples.split(250)]
    return torch.cat([near.values for near in found]), torch.cat([near.indices for near in found])
