"""Families of p(a | parents), whatever their role."""

from pyrovae.conditionals.autoregressive import AutoregressivePrior as AutoregressivePrior
from pyrovae.conditionals.autoregressive import PixelCNN as PixelCNN
from pyrovae.conditionals.conditional import Conditional as Conditional
from pyrovae.conditionals.discrete import Bernoulli as Bernoulli
from pyrovae.conditionals.discrete import Categorical as Categorical
from pyrovae.conditionals.discrete import OneHotCategorical as OneHotCategorical
from pyrovae.conditionals.discrete import one_hot as one_hot
from pyrovae.conditionals.energy import EnergyPrior as EnergyPrior
from pyrovae.conditionals.flows import InverseAutoregressiveFlow as InverseAutoregressiveFlow
from pyrovae.conditionals.flows import MaskedAutoregressiveFlow as MaskedAutoregressiveFlow
from pyrovae.conditionals.flows import NeuralSplineFlow as NeuralSplineFlow
from pyrovae.conditionals.flows import RealNVP as RealNVP
from pyrovae.conditionals.images import ContinuousBernoulli as ContinuousBernoulli
from pyrovae.conditionals.images import DiscretizedLogisticMixture as DiscretizedLogisticMixture
from pyrovae.conditionals.normal import DiagonalNormal as DiagonalNormal
from pyrovae.conditionals.normal import FloorNormal as FloorNormal
from pyrovae.conditionals.normal import FullNormal as FullNormal
from pyrovae.conditionals.normal import StandardNormal as StandardNormal
from pyrovae.conditionals.normal import UnitNormal as UnitNormal
from pyrovae.conditionals.planar import HouseholderFlow as HouseholderFlow
from pyrovae.conditionals.planar import PlanarFlow as PlanarFlow
from pyrovae.conditionals.priors import MixtureOfNormals as MixtureOfNormals
from pyrovae.conditionals.priors import VampPrior as VampPrior
from pyrovae.conditionals.sequences import MarkovChain as MarkovChain
from pyrovae.conditionals.sequences import RecurrentPosterior as RecurrentPosterior
from pyrovae.conditionals.sequences import Steps as Steps
