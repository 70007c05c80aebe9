"""DRAW: a VAE that paints its image in several glimpses, with attention."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor, nn

from pyrovae import attention, reference
from pyrovae.conditionals import Bernoulli, DiagonalNormal, StandardNormal
from pyrovae.conditionals.conditional import network_autocast
from pyrovae.nets import _check_image_shape, _check_sizes
from pyrovae.program import LatentModel, data_plate, told
from pyrovae.traces import sample_sites

State = tuple[Tensor, Tensor]  # of an LSTM: its output h and its cell, each `(*, hidden)`


@dataclass(frozen=True)
class Drawing:
    """How n images come about in T glimpses.

    Attributes:
        images: E[x | c_t], the image as it would be were glimpse t the last one, `(T, n, D)`.
        writes: the rectangles that are written to: left, top, right, bottom, in pixels, `(T, n, 4)`.
        reads: the rectangles that are read, of images that are redrawn, `(T, n, 4)`; None where nothing is read.
    """

    images: Tensor
    writes: Tensor
    reads: Tensor | None = None


class DRAW(LatentModel):
    """A VAE of binary images with T latents, which adds to a canvas T times (Gregor et al. 2015).

        z_t ~ N(0, I),  h_t = LSTM_dec(h_{t-1}, z_t),  c_t = c_{t-1} + write(h_t),  x ~ Bernoulli(sigmoid(c_T))

    and the guide looks at the image and at what the canvas lacks of it:

        r_t = read(x, x - sigmoid(c_{t-1}), h_{t-1}),  g_t = LSTM_enc(g_{t-1}, [r_t, h_{t-1}]),  z_t ~ q(z_t | g_t)

    q is a diagonal Gaussian, its parameters linear in g_t. `read` and `write` see the image through grids of Gaussian
    filters, which linear maps of h_{t-1} and h_t place (`pyrovae.attention`); one grid serves all channels. The start
    of the canvas, c_0, and those of both LSTMs are learned. Model and guide both run the decoder.

    At first the grids tile the whole image, each filter half as wide as its part, and what a patch writes is about as
    large as the patch; the forget gates begin at a bias of 1. The paper says nothing of either. In bf16-mixed precision
    the linear maps are in bfloat16, the attention, the LSTMs' cells and the canvas are not.

    The sites are z_1, ..., z_T.

    Args:
        image_shape: (channels, height, width) of an image, which comes flattened to `(*, C * H * W)`.
        z_dim: size of each latent.
        num_glimpses: T.
        hidden: units of each LSTM.
        read_size: N of the grid that reads, N x N filters.
        write_size: N of the grid that writes.

    Raises:
        ValueError: for a size that is not positive, or an image_shape that is not three numbers; when run, for data of
            another size.

    Example:
        >>> DRAW((1, 28, 28), z_dim=10, num_glimpses=3, hidden=20).sample(2).shape
        torch.Size([2, 784])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        z_dim: int = 100,
        num_glimpses: int = 10,
        hidden: int = 256,
        read_size: int = 2,
        write_size: int = 5,
    ):
        super().__init__()
        _check_image_shape(image_shape)
        _check_sizes(z_dim=z_dim, num_glimpses=num_glimpses, hidden=hidden)
        _check_sizes(read_size=read_size, write_size=write_size)
        self.image_shape, self.z_dim, self.num_glimpses = tuple(image_shape), z_dim, num_glimpses
        self.hidden, self.read_size, self.write_size = hidden, read_size, write_size
        channels, height, width = image_shape
        self.prior, self.likelihood = StandardNormal(z_dim), Bernoulli(None)
        self.posterior = DiagonalNormal.mlp(hidden, z_dim, ())
        self.encoder = nn.Linear(2 * channels * read_size**2 + 2 * hidden, 4 * hidden)
        self.decoder = nn.Linear(z_dim + hidden, 4 * hidden)
        self.read_grid, self.write_grid = nn.Linear(hidden, 5), nn.Linear(hidden, 5)
        self.patch = nn.Linear(hidden, channels * write_size**2)
        self.canvas = nn.Parameter(torch.zeros(channels * height * width))
        self.encoder_start = nn.Parameter(torch.zeros(2, hidden))
        self.decoder_start = nn.Parameter(torch.zeros(2, hidden))
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        for gates in (self.encoder, self.decoder):
            gates.bias[self.hidden : 2 * self.hidden] = 1  # of the forget gate
        _, height, width = self.image_shape
        self.read_grid.bias.copy_(attention.tiles(height, width, self.read_size))
        self.write_grid.bias.copy_(attention.tiles(height, width, self.write_size))
        self.write_grid.bias[4] = -2 * math.log(max(height, width) / self.write_size)  # a tile's area

    @torch.no_grad()
    def start_at(self, mean: Tensor) -> Self:
        """Set the start of the canvas to the logits of this mean `(D,)`, kept within [0.001, 0.999].

        Raises:
            ValueError: for a mean of another size.
        """
        if not isinstance(mean, Tensor) or mean.shape != self.canvas.shape:
            found = tuple(mean.shape) if isinstance(mean, Tensor) else repr(mean)
            raise ValueError(f"Expected mean of shape {tuple(self.canvas.shape)}; got {found}")
        self.canvas.copy_(self.likelihood.eta_at(mean))
        return self

    def model(self, x: Tensor | None = None) -> Tensor:
        """p(z_1) ... p(z_T) p(x | z_1, ..., z_T)."""
        self._check(x)
        with data_plate(x):
            canvas, state = self.canvas, self._decoder_start()
            for name in self._sites():
                state = _lstm(self.decoder, state, pyro.sample(name, self.prior()))
                canvas = canvas + self.write(state[0])
            return pyro.sample("x", self.likelihood.distribution(canvas), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z_1 | x) q(z_2 | z_1, x) ... q(z_T | z_1, ..., z_{T-1}, x)."""
        self._check(x)
        with data_plate(x):
            self._look(x, lambda name, eta: pyro.sample(name, self.posterior.distribution(eta)))

    def _look(self, x: Tensor, latent: Callable[[str, Tensor], Tensor]) -> None:
        """Run the guide's networks; `latent` gives each site's value, told its name and eta of q."""
        canvas, state = self.canvas, self._decoder_start()
        encoder: State = self.encoder_start[0], self.encoder_start[1]
        for name in self._sites():
            encoder = _lstm(self.encoder, encoder, self.read(x, canvas, state[0]), state[0])
            state = _lstm(self.decoder, state, latent(name, self.posterior.eta(encoder[0])))
            canvas = canvas + self.write(state[0])

    def read(self, x: Tensor, canvas: Tensor, h: Tensor) -> Tensor:
        """read(x, x - sigmoid(c), h): both seen through the grid that h places.

        Args:
            x: images `(*, D)`.
            canvas: c `(*, D)`.
            h: the decoder's output `(*, hidden)`.

        Returns:
            `(*, 2 C N^2)`.
        """
        _, height, width = self.image_shape
        error = x - canvas.sigmoid()
        both = torch.stack([x.expand_as(error), error], -2).unflatten(-1, self.image_shape)
        by = attention.filters(_linear(self.read_grid, h), height, width, self.read_size)
        return attention.read(both.flatten(-4, -3), by).flatten(-3)

    def write(self, h: Tensor) -> Tensor:
        """What is added to the canvas, `(*, D)`, given the decoder's output h `(*, hidden)`."""
        channels, height, width = self.image_shape
        patch = _linear(self.patch, h).unflatten(-1, (channels, self.write_size, self.write_size))
        by = attention.filters(_linear(self.write_grid, h), height, width, self.write_size)
        return attention.write(patch, by).flatten(-3)

    def canvases(self, n: int) -> Drawing:
        """n images as they are drawn, z_t ~ p(z_t).

        Raises:
            ValueError: for n < 1.
        """
        _check_sizes(n=n)
        with self.inference():
            any_image = self.canvas.new_zeros(
                n, len(self.canvas)
            )  # opens the plate, and the latents know nothing of it
            return self._drawing(poutine.trace(self.model).get_trace(any_image))

    def canvases_of(self, x: Tensor) -> Drawing:
        """Images x `(n, D)` as they are drawn anew, z_t ~ q(z_t | z_1, ..., z_{t-1}, x)."""
        batch = self._on_device(x, self.guide)
        with self.inference(), told(batch):
            return self._drawing(poutine.trace(self.guide).get_trace(**batch), reads=True)

    def _drawing(self, trace: poutine.Trace, reads: bool = False) -> Drawing:
        """The canvases and windows of a trace of model or guide."""
        _, height, width = self.image_shape
        canvas, state = self.canvas, self._decoder_start()
        sites, images, looked, written = sample_sites(trace), [], [], []
        for name in self._sites():
            z = sites[name]["value"]
            at = self.read_grid(state[0]).expand(*z.shape[:-1], -1)
            looked.append(attention.window(at, height, width, self.read_size))
            state = _lstm(self.decoder, state, z)
            canvas = canvas + self.write(state[0])
            images.append(self.likelihood.distribution(canvas).mean)
            written.append(attention.window(self.write_grid(state[0]), height, width, self.write_size))
        return Drawing(torch.stack(images), torch.stack(written), torch.stack(looked) if reads else None)

    def _sites(self) -> list[str]:
        return [f"z_{t + 1}" for t in range(self.num_glimpses)]

    def _decoder_start(self) -> State:
        return self.decoder_start[0], self.decoder_start[1]

    def _check(self, x: Tensor | None) -> None:
        if x is not None and (x.dim() != 2 or x.shape[1] != len(self.canvas)):
            raise ValueError(
                f"Expected x to be images of shape (N, {len(self.canvas)}), flattened from {self.image_shape}; "
                f"got {tuple(x.shape)}"
            )

    def reference_elbo(self, x: Tensor, **z: Tensor) -> Tensor:
        """The hand-written one-draw ELBO `(*, N)` at the noise behind z_1, ..., z_T, each `(*, N, z_dim)`."""
        _, noise = self.posterior.by_hand(reference.POSTERIORS)
        with torch.no_grad():  # the noise is given: gradients flow through the latents alone
            eps: list[Tensor] = []

            def given(name: str, eta: Tensor) -> Tensor:
                eps.append(noise(z[name], eta.expand(*z[name].shape[:-1], -1)))
                return z[name]

            self._look(x, given)
        return reference.draw_elbo(
            x,
            eps,
            image_shape=self.image_shape,
            read_size=self.read_size,
            write_size=self.write_size,
            encoder=self.encoder,
            decoder=self.decoder,
            read_grid=self.read_grid,
            write_grid=self.write_grid,
            patch=self.patch,
            posterior_net=self.posterior.eta,
            canvas=self.canvas,
            encoder_start=(self.encoder_start[0], self.encoder_start[1]),
            decoder_start=self._decoder_start(),
        )


def _linear(net: nn.Linear, *parts: Tensor) -> Tensor:
    """A linear map of parts `(*, D_i)`, which are broadcast on `*` and joined, in the precision of the networks."""
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    joined = torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)
    with network_autocast(joined.device):
        return net(joined).to(joined.dtype)


def _lstm(gates: nn.Linear, state: State, *parts: Tensor) -> State:
    """One step of an LSTM, its inputs given in parts `(*, D_i)`; gates: input, forget, new values, output."""
    i, f, g, o = _linear(gates, *parts, state[0]).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell
