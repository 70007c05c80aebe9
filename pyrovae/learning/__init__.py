"""Ways to learn beside amortised SVI: wake-sleep, priors on weights, variational EM, Monte Carlo EM."""

from pyrovae.learning.chains import posterior_draws as posterior_draws
from pyrovae.learning.em import fit_guide as fit_guide
from pyrovae.learning.em import mcmc_em as mcmc_em
from pyrovae.learning.em import variational_em as variational_em
from pyrovae.learning.local import LocalGuide as LocalGuide
from pyrovae.learning.local import indexed as indexed
from pyrovae.learning.map import fit_map as fit_map
from pyrovae.learning.wake_sleep import WakeSleep_ELBO as WakeSleep_ELBO
