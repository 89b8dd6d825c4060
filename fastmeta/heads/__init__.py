"""Classifiers of stored features: all tasks at once, from support ``[T, S, D]`` to logits."""

from fastmeta.heads.base import Head
from fastmeta.heads.logistic import Logistic
from fastmeta.heads.nearest import NearestCentroid, SimpleShot
from fastmeta.heads.ridge import Ridge
from fastmeta.heads.soft_kmeans import SoftKMeans

__all__ = [
    "Head",
    "Logistic",
    "NearestCentroid",
    "Ridge",
    "SimpleShot",
    "SoftKMeans",
]
