"""Metrics of the similarity of two sets of images, as features: n rows of samples and m rows of real images.

The features come from any network: a classifier of the data, a CLIP, or an Inception network for photographs.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cond_diffusion.errors import UserError


def frechet_distance(samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> float:
    """Return the Fréchet distance of Gaussians with the features' means and covariances (Heusel et al. 2017, eq. 6).

    Fewer images give larger values: compare with the value of equally many real images.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # of the extra `eval`

    identity = nn.Identity()
    identity.num_features = samples.shape[1]  # torchmetrics reads this from the network  # pyright: ignore
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(samples.double(), real=False)
    return metric.compute().item()


def prdc(samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = 5) -> dict[str, float]:
    """Return precision, recall, density and coverage: how two sets of features overlap, each widened to the balls that
    reach to the k-th nearest neighbor of each row.

    precision, recall: the fraction of samples in a ball of a real image, and vice versa (Kynkäänniemi et al. 2019).
    density, coverage: the number of balls of real images around a sample, over k; the fraction of real images whose
    ball contains a sample (Naeem et al. 2020). For equal distributions the latter two are 1 or close to it, and the
    former two lower.

    Raises UserError if a set has no more than k rows.
    """
    if min(len(samples), len(real)) <= k:
        raise UserError(f"precision and recall need more than {k} images of both kinds; use more samples")
    samples, real = samples.double(), real.double()
    radius_of_sample, radius_of_real = _distance_to_neighbor(samples, k), _distance_to_neighbor(real, k)
    distance = torch.cdist(samples, real)
    in_ball_of_real = distance < radius_of_real
    return {
        "precision": in_ball_of_real.any(1).double().mean().item(),
        "recall": (distance < radius_of_sample[:, None]).any(0).double().mean().item(),
        "density": in_ball_of_real.double().sum(1).mean().item() / k,
        "coverage": in_ball_of_real.any(0).double().mean().item(),
    }


def _distance_to_neighbor(features: Float[Tensor, "n d"], k: int) -> Float[Tensor, " n"]:
    """Return the distance from each row to its k-th nearest neighbor among the others."""
    return torch.cdist(features, features).kthvalue(k + 1, dim=1).values  # the nearest row is the row itself


def nearest(
    samples: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int
) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """Return the distances from each sample to the k nearest real images, and the indices of these."""
    real = real.double()  # in fp32 a copy would lie at a distance from itself
    found = [torch.cdist(rows.double(), real).topk(k, dim=1, largest=False) for rows in samples.split(250)]
    return torch.cat([near.values for near in found]), torch.cat([near.indices for near in found])
