"""Families of p(a | parents), whatever their role."""

from pyrovae.conditionals.conditional import Conditional as Conditional
from pyrovae.conditionals.discrete import Bernoulli as Bernoulli
from pyrovae.conditionals.discrete import OneHotCategorical as OneHotCategorical
from pyrovae.conditionals.discrete import one_hot as one_hot
from pyrovae.conditionals.flows import InverseAutoregressiveFlow as InverseAutoregressiveFlow
from pyrovae.conditionals.flows import MaskedAutoregressiveFlow as MaskedAutoregressiveFlow
from pyrovae.conditionals.flows import NeuralSplineFlow as NeuralSplineFlow
from pyrovae.conditionals.flows import RealNVP as RealNVP
from pyrovae.conditionals.normal import DiagonalNormal as DiagonalNormal
from pyrovae.conditionals.normal import FullNormal as FullNormal
from pyrovae.conditionals.normal import StandardNormal as StandardNormal
from pyrovae.conditionals.normal import UnitNormal as UnitNormal
from pyrovae.conditionals.planar import HouseholderFlow as HouseholderFlow
from pyrovae.conditionals.planar import PlanarFlow as PlanarFlow
