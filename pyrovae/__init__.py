"""Deep latent-variable models as Pyro programs, trained by SVI, with a log-likelihood that can be trusted."""

from pyrovae import conditionals as conditionals
from pyrovae import data as data
from pyrovae import plots as plots
from pyrovae import reference as reference
from pyrovae.checkpoint import load as load
from pyrovae.checkpoint import save as save
from pyrovae.compiled import Compiled as Compiled
from pyrovae.compiled import CompileError as CompileError
from pyrovae.evaluate import Comparison as Comparison
from pyrovae.evaluate import Evaluation as Evaluation
from pyrovae.evaluate import compare as compare
from pyrovae.evaluate import evaluate as evaluate
from pyrovae.fit import fit as fit
from pyrovae.models import VAE as VAE
from pyrovae.models import LinearGaussian as LinearGaussian
from pyrovae.nets import MLP as MLP
from pyrovae.nets import ConvDecoder as ConvDecoder
from pyrovae.nets import ConvEncoder as ConvEncoder
from pyrovae.objectives import CompiledTrace_ELBO as CompiledTrace_ELBO
from pyrovae.objectives import CompiledTraceEnum_ELBO as CompiledTraceEnum_ELBO
from pyrovae.objectives import CompiledTraceMeanField_ELBO as CompiledTraceMeanField_ELBO
from pyrovae.program import LatentModel as LatentModel
from pyrovae.program import as_program as as_program
from pyrovae.program import data_plate as data_plate
from pyrovae.survey import log_weights as log_weights
