"""One file for one graph."""

from pyrovae.models.auxiliary import AuxiliaryVAE as AuxiliaryVAE
from pyrovae.models.conditional_vae import ConditionalVAE as ConditionalVAE
from pyrovae.models.draw import DRAW as DRAW
from pyrovae.models.hidden_markov import HiddenMarkovModel as HiddenMarkovModel
from pyrovae.models.hierarchical import HierarchicalVAE as HierarchicalVAE
from pyrovae.models.linear_state_space import LinearGaussianStateSpace as LinearGaussianStateSpace
from pyrovae.models.markov import DeepMarkovModel as DeepMarkovModel
from pyrovae.models.mixture import GaussianMixture as GaussianMixture
from pyrovae.models.mixture_vae import GaussianMixtureVAE as GaussianMixtureVAE
from pyrovae.models.semisupervised import SemiSupervisedVAE as SemiSupervisedVAE
from pyrovae.models.vae import VAE as VAE
from pyrovae.models.vae import LinearGaussian as LinearGaussian
