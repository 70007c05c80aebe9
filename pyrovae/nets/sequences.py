"""Networks of state-space models: over one step, and backwards over a whole sequence."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrovae.arguments import check_one_of
from pyrovae.nets.mlp import MLP, _check_input, _check_sizes, _glorot

Cell = Literal["relu", "tanh", "gru"]
LINEAR_BELOW = -15.0  # log softplus(s) = s to float32's last digit


class GatedTransition(nn.Module):
    """A step of a state: to stay linear, or to change by a perceptron, for each dimension by a gate.

        g = sigmoid(NN(z)),  h = NN(z),  mu = (1 - g) * (W z + b) + g * h,  sigma = softplus(V relu(h) + c)

    W begins as the identity, and sigma at 1.

    Args:
        z_dim: size of the state.
        hidden: units of the one hidden layer of gate and change.

    Raises:
        ValueError: for a size that is not positive.

    Source:
        Krishnan, Shalit and Sontag (2017), section 5.

    Example:
        >>> GatedTransition(10, 20)(torch.zeros(3, 10)).shape
        torch.Size([3, 20])
    """

    def __init__(self, z_dim: int, hidden: int = 200):
        super().__init__()
        _check_sizes(z_dim=z_dim, hidden=hidden)
        self.z_dim, self.hidden = z_dim, hidden
        self.gate = MLP(z_dim, z_dim, (hidden,), "relu")
        self.change = MLP(z_dim, z_dim, (hidden,), "relu")
        self.stay = nn.Linear(z_dim, z_dim)
        self.scale = nn.Linear(z_dim, z_dim)
        nn.init.eye_(self.stay.weight)
        nn.init.zeros_(self.stay.bias)
        nn.init.zeros_(self.scale.weight)
        nn.init.constant_(self.scale.bias, _inverse_softplus(1.0))

    def forward(self, z: Tensor) -> Tensor:
        """z `(*, z_dim)` to (mu, log sigma) `(*, 2 z_dim)`."""
        gate, change = torch.sigmoid(self.gate(z)), self.change(z)
        mu = (1 - gate) * self.stay(z) + gate * change
        return torch.cat([mu, _log_softplus(self.scale(torch.relu(change)))], -1)


class Combiner(nn.Module):
    """From a state and a summary of what is still to come: eta = W (tanh(V z + b) + h) / 2 + c.

    Args:
        z_dim: size of the state.
        hidden: size of the summary h, which comes behind the state in the input.
        out_dim: size of eta; its first z_dim numbers are the location, and all else begins at zero.

    Raises:
        ValueError: for a size that is not positive.

    Source:
        Krishnan, Shalit and Sontag (2017), section 4, the combiner function.

    Example:
        >>> Combiner(10, 50, 20)(torch.zeros(3, 60)).shape
        torch.Size([3, 20])
    """

    def __init__(self, z_dim: int, hidden: int, out_dim: int):
        super().__init__()
        _check_sizes(z_dim=z_dim, hidden=hidden, out_dim=out_dim)
        self.z_dim, self.hidden, self.out_dim = z_dim, hidden, out_dim
        self.state, self.out = nn.Linear(z_dim, hidden), nn.Linear(hidden, out_dim)
        _glorot(self)
        nn.init.zeros_(self.out.weight.data[z_dim:])

    def forward(self, parents: Tensor) -> Tensor:
        """z and h `(*, z_dim + hidden)` to eta `(*, out_dim)`."""
        _check_input(parents, self.z_dim + self.hidden, self)
        z, h = parents.split([self.z_dim, self.hidden], -1)
        return self.out((torch.tanh(self.state(z)) + h) / 2)


class BackwardRNN(nn.Module):
    """A recurrent network that reads each sequence from its end: h_t = RNN(x_t, h_{t+1}), of x_t ... x_T alone.

    A sequence's end is the end of its own length, at which the network has a state that is learned; what lies beyond
    is not seen.

    Args:
        x_dim: size of a step.
        hidden: units.
        cell: relu or tanh, a plain network, or gru.

    Raises:
        ValueError: for a size that is not positive or an unknown cell.

    Example:
        >>> BackwardRNN(88, 50)(torch.zeros(3, 20, 88), torch.tensor([20, 7, 1])).shape
        torch.Size([3, 20, 50])
    """

    def __init__(self, x_dim: int, hidden: int = 600, cell: Cell = "relu"):
        super().__init__()
        _check_sizes(x_dim=x_dim, hidden=hidden)
        check_one_of(get_args(Cell), cell=cell)
        self.x_dim, self.hidden, self.cell = x_dim, hidden, cell
        gru = cell == "gru"
        self.rnn: nn.RNNBase = (
            nn.GRU(x_dim, hidden, batch_first=True)
            if gru
            else nn.RNN(x_dim, hidden, nonlinearity=cell, batch_first=True)
        )
        self.end = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Sequences `(*, T, x_dim)` of lengths `(*)` to summaries of each step and all after it, `(*, T, hidden)`."""
        _check_input(x, self.x_dim, self)
        num_steps, rows = x.shape[-2], x.reshape(-1, *x.shape[-2:])
        step = torch.arange(num_steps, device=x.device)
        backwards = (lengths.expand(x.shape[:-2]).reshape(-1, 1) - 1 - step).clamp(min=0).unsqueeze(-1)
        h, _ = self.rnn(rows.take_along_dim(backwards, 1), self.end.expand(1, len(rows), self.hidden).contiguous())
        return h.take_along_dim(backwards, 1).reshape(*x.shape[:-1], self.hidden)


def _inverse_softplus(value: float) -> float:
    return torch.tensor(value, device="cpu").expm1().log().item()


def _log_softplus(s: Tensor) -> Tensor:
    """log log(1 + e^s), which is s itself where e^s is small."""
    return torch.where(s < LINEAR_BELOW, s, functional.softplus(s.clamp(min=LINEAR_BELOW)).log())
