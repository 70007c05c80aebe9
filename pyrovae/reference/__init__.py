"""The ELBOs by hand: plain torch, no Pyro, nothing else of pyrovae. What the programs are held against.

Notation: data x `(*, X)`, latents z `(*, D)`, noise eps `(*, D)`; a result has shape `*`, in nats, for each datum.
Equation numbers are those of Kingma and Welling, An Introduction to Variational Autoencoders (2019). The tables
LIKELIHOODS, PRIORS and POSTERIORS have the functions by the names of the families.
"""

from pyrovae.reference.bounds import auxiliary_elbo as auxiliary_elbo
from pyrovae.reference.bounds import dreg_value as dreg_value
from pyrovae.reference.bounds import free_bits_bound as free_bits_bound
from pyrovae.reference.bounds import importance_bound as importance_bound
from pyrovae.reference.bounds import labeled_elbo as labeled_elbo
from pyrovae.reference.bounds import semi_supervised_objective as semi_supervised_objective
from pyrovae.reference.bounds import unlabeled_elbo as unlabeled_elbo
from pyrovae.reference.bounds import vae_elbo as vae_elbo
from pyrovae.reference.closed_forms import kl_diagonal_standard as kl_diagonal_standard
from pyrovae.reference.closed_forms import kl_full_standard as kl_full_standard
from pyrovae.reference.closed_forms import linear_gaussian_elbo as linear_gaussian_elbo
from pyrovae.reference.closed_forms import linear_gaussian_log_prob as linear_gaussian_log_prob
from pyrovae.reference.closed_forms import linear_gaussian_posterior as linear_gaussian_posterior
from pyrovae.reference.densities import LIKELIHOODS as LIKELIHOODS
from pyrovae.reference.densities import Density as Density
from pyrovae.reference.densities import Net as Net
from pyrovae.reference.densities import Posterior as Posterior
from pyrovae.reference.densities import full_normal_noise as full_normal_noise
from pyrovae.reference.densities import full_parameters as full_parameters
from pyrovae.reference.densities import log_autoregressive_normal as log_autoregressive_normal
from pyrovae.reference.densities import log_bernoulli as log_bernoulli
from pyrovae.reference.densities import log_categorical as log_categorical
from pyrovae.reference.densities import log_continuous_bernoulli as log_continuous_bernoulli
from pyrovae.reference.densities import log_diagonal_normal as log_diagonal_normal
from pyrovae.reference.densities import log_discretized_logistics as log_discretized_logistics
from pyrovae.reference.densities import log_energy as log_energy
from pyrovae.reference.densities import log_floor_normal as log_floor_normal
from pyrovae.reference.densities import log_full_normal as log_full_normal
from pyrovae.reference.densities import log_mixture_of_normals as log_mixture_of_normals
from pyrovae.reference.densities import log_one_hot as log_one_hot
from pyrovae.reference.densities import log_pixels as log_pixels
from pyrovae.reference.densities import log_standard_normal as log_standard_normal
from pyrovae.reference.densities import log_unit_normal as log_unit_normal
from pyrovae.reference.densities import log_vamp as log_vamp
from pyrovae.reference.draw import draw_elbo as draw_elbo
from pyrovae.reference.flows import POSTERIORS as POSTERIORS
from pyrovae.reference.flows import PRIORS as PRIORS
from pyrovae.reference.gaussians import diagonal_normal as diagonal_normal
from pyrovae.reference.gaussians import diagonal_normal_noise as diagonal_normal_noise
from pyrovae.reference.gaussians import full_normal as full_normal
from pyrovae.reference.gaussians import unit_normal as unit_normal
from pyrovae.reference.gaussians import unit_normal_noise as unit_normal_noise
from pyrovae.reference.mixtures import gaussian_mixture_log_joint as gaussian_mixture_log_joint
from pyrovae.reference.mixtures import gaussian_mixture_log_prob as gaussian_mixture_log_prob
from pyrovae.reference.mixtures import gaussian_mixture_posterior as gaussian_mixture_posterior
from pyrovae.reference.mixtures import mixture_vae_elbo as mixture_vae_elbo
from pyrovae.reference.state_space import backward_algorithm as backward_algorithm
from pyrovae.reference.state_space import deep_markov_elbo as deep_markov_elbo
from pyrovae.reference.state_space import forward_algorithm as forward_algorithm
from pyrovae.reference.state_space import hidden_markov_log_joint as hidden_markov_log_joint
from pyrovae.reference.state_space import kalman_filter as kalman_filter
from pyrovae.reference.state_space import kalman_smoother as kalman_smoother
from pyrovae.reference.structures import conditional_vae_elbo as conditional_vae_elbo
from pyrovae.reference.structures import hierarchical_elbo as hierarchical_elbo
from pyrovae.reference.structures import product_of_normals as product_of_normals
