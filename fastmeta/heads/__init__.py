"""Classifiers of stored features: all tasks at once, from support ``[T, S, D]`` to logits."""

from fastmeta.heads.base import Head
from fastmeta.heads.bd_cspn import BDCSPN
from fastmeta.heads.feat import FEAT
from fastmeta.heads.laplacian_shot import LaplacianShot
from fastmeta.heads.logistic import Logistic
from fastmeta.heads.nearest import NearestCentroid, SimpleShot
from fastmeta.heads.pt_map import PTMAP
from fastmeta.heads.ridge import Ridge
from fastmeta.heads.soft_kmeans import SoftKMeans
from fastmeta.heads.tim import TIM
from fastmeta.heads.transductive_finetuning import TransductiveFinetuning

__all__ = [
    "BDCSPN",
    "FEAT",
    "PTMAP",
    "TIM",
    "Head",
    "LaplacianShot",
    "Logistic",
    "NearestCentroid",
    "Ridge",
    "SimpleShot",
    "SoftKMeans",
    "TransductiveFinetuning",
]
