"""Families of p(a | parents), whatever their role."""

from pyrovae.conditionals.conditional import Conditional as Conditional
from pyrovae.conditionals.discrete import Bernoulli as Bernoulli
from pyrovae.conditionals.discrete import OneHotCategorical as OneHotCategorical
from pyrovae.conditionals.discrete import one_hot as one_hot
from pyrovae.conditionals.normal import DiagonalNormal as DiagonalNormal
from pyrovae.conditionals.normal import FullNormal as FullNormal
from pyrovae.conditionals.normal import StandardNormal as StandardNormal
from pyrovae.conditionals.normal import UnitNormal as UnitNormal
