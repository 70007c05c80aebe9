"""Networks, tensor to tensor: what stands inside a Conditional. No probability here."""

from pyrovae.nets.convolutional import ConvDecoder as ConvDecoder
from pyrovae.nets.convolutional import ConvEncoder as ConvEncoder
from pyrovae.nets.mlp import ACTIVATIONS as ACTIVATIONS
from pyrovae.nets.mlp import MLP as MLP
from pyrovae.nets.mlp import Activation as Activation
from pyrovae.nets.mlp import Constant as Constant
from pyrovae.nets.mlp import MaskedMLP as MaskedMLP
from pyrovae.nets.mlp import _activation as _activation
from pyrovae.nets.mlp import _check_hidden as _check_hidden
from pyrovae.nets.mlp import _check_image_shape as _check_image_shape
from pyrovae.nets.mlp import _check_input as _check_input
from pyrovae.nets.mlp import _check_sequence as _check_sequence
from pyrovae.nets.mlp import _check_sizes as _check_sizes
from pyrovae.nets.mlp import _glorot as _glorot
from pyrovae.nets.sequences import BackwardRNN as BackwardRNN
from pyrovae.nets.sequences import Cell as Cell
from pyrovae.nets.sequences import Combiner as Combiner
from pyrovae.nets.sequences import GatedTransition as GatedTransition
