"""The forward pass over a pack, of every family that `checkpoint.families` describes.

What sets a family apart is decided when the encoder is built: by its operations, and by how its weights are arranged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F

from esmflow.checkpoint.families import EPSILON, Family
from esmflow.checkpoint.models import ModelDimensions
from esmflow.engine.attention import (
    Attention,
    Rotation,
    choose_attention,
    flash_available,
    rotate_of,
    sdpa_attention,
    triton_attention,
)
from esmflow.engine.packing import FRAME, Pack, pack_sequences
from esmflow.engine.weights import HeadWeights, LayerWeights, Linear, Matrix, Norm, Weights

log = logging.getLogger(__name__)

AnyOperations = TypeVar("AnyOperations", bound="Operations")


@dataclass(frozen=True)
class Operations:
    """What the forward pass is made of, chosen once for a device and a precision.

    normalise: `(x, weight, bias, offset, epsilon, dtype)`, the layer norm of `x + offset` `[T, D]`, computed in fp32.
    attend: see `esmflow.engine.attention`.
    activate: `(x, fc1)`, GELU of fc1's product, or what a family with a gate has instead.
    """

    normalise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, torch.dtype], torch.Tensor]
    attend: Attention
    activate: Callable[[torch.Tensor, Linear], torch.Tensor]

    def straight(self, x: torch.Tensor) -> torch.Tensor:
        """The stream in the model's own coordinates."""
        return x

    def mix(
        self, x: torch.Tensor, layer: LayerWeights, rotation: Rotation, pack: Pack, attend: Attention
    ) -> torch.Tensor:
        """Attention over the stream `x` `[T, D]`, before its output projection. attend: `self.attend`, or contacts'."""
        qkv = F.linear(self.normalise(x, *layer.attention_norm, EPSILON, x.dtype), layer.qkv)
        return attend(qkv.unflatten(1, (3, -1, 2 * rotation.cos.shape[1])), layer.qk, rotation, pack)

    def feed(self, x: torch.Tensor, norm: Norm, fc1: Matrix) -> torch.Tensor:
        """The feed-forward part's first product with its activation, `[T, F]`."""
        return self.activate(self.normalise(x, *norm, EPSILON, x.dtype), fc1)

    def add(self, x: torch.Tensor, hidden: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Adds a product of `hidden` to the stream `x`, in place."""
        return x.addmm_(hidden, matrix)


def plain_operations(device: torch.device, dtype: torch.dtype, family: Family) -> Operations:
    """PyTorch's own operations: right on every device and in every precision."""
    # 16-bit rounding is larger than what the tanh form changes; where fp32 was asked for it never serves.
    rounds = device.type == "cuda" and dtype != torch.float32
    gelu = fused_tanh_gelu if rounds else exact_gelu
    attend = choose_attention(device, dtype, rotate_of(family))
    return Operations(normalise, attend, gated if family.gate else gelu)


def fastest_operations(device: torch.device, dtype: torch.dtype, dimensions: ModelDimensions) -> Operations:
    """The kernels of `esmflow.engine.kernels` where they run and agree with PyTorch's; else those, with one warning."""
    plain = plain_operations(device, dtype, dimensions.family)
    if not flash_available(device, dtype):
        return plain

    def compiled() -> Operations:
        fast = kernel_operations(dimensions.family)
        _check_kernels(fast, plain, device, dtype, dimensions)
        return fast

    return kernels_or_plain(compiled, plain)


def kernel_operations(family: Family) -> Operations:
    """This project's kernels, not yet checked. Raises ImportError without Triton."""
    from esmflow.engine.kernels import sixteen_bits

    activate = sixteen_bits.gated if family.gate else fused_tanh_gelu
    return Operations(sixteen_bits.normalise, triton_attention(rotate_of(family)), activate)


def kernels_or_plain(compiled: Callable[[], AnyOperations], plain: AnyOperations) -> AnyOperations:
    """What `compiled` gives, or `plain`, with one warning, where the kernels do not compile or are wrong."""
    try:
        return compiled()
    except Exception as error:  # whatever a compiler raises, the plain operations are right
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("the fast kernels do not work here (%s); going on with PyTorch's own, at a lower speed", reason)
        return plain


@torch.inference_mode()
def _check_kernels(
    fast: Operations, plain: Operations, device: torch.device, dtype: torch.dtype, dimensions: ModelDimensions
) -> None:
    """Compiles the kernels and holds them against PyTorch's own on small packs. Raises when they differ."""
    hidden, heads = dimensions.hidden, dimensions.heads
    exact = partial(sdpa_attention, rotate=rotate_of(dimensions.family))
    # One pack of short sequences and one with a long one: the kernel has a variant for each.
    for pack in (pack_sequences(["M" * n for n in lengths]).to(device) for lengths in ((98, 28), (398, 28))):
        x, qkv = (torch.randn(len(pack.tokens), n * hidden, device=device).to(dtype) for n in (1, 3))
        weight, bias, offset = torch.randn(3, hidden, device=device).unbind()
        for kind in (dtype, torch.float32):
            check("layer norm", *(f(x, weight, bias, offset, EPSILON, kind) for f in (fast.normalise, normalise)))
        qkv, qk = qkv.unflatten(1, (3, heads, -1)), torch.cat((weight, bias))
        rotation = Rotation.of(torch.rand(hidden // heads // 2, device=device), pack.longest)
        check("attention", *(f(qkv.clone(), qk, rotation, pack) for f in (fast.attend, exact)))
        if dimensions.family.gate:
            fc1 = Linear(torch.randn(256, hidden, device=device).to(dtype) * hidden**-0.5, None)
            check("gate", *(f.activate(x, fc1) for f in (fast, plain)))


def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises RuntimeError when a kernel's result is not PyTorch's own."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    if not error < 0.02:
        raise RuntimeError(f"{name} is wrong by {error:.1e}")


def normalise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    offset: torch.Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Layer norm of `x + offset` `[T, D]`, computed in fp32."""
    return F.layer_norm(x.float() + offset, x.shape[-1:], weight, bias, epsilon).to(dtype)


def exact_gelu(x: torch.Tensor, fc1: Linear) -> torch.Tensor:
    """fc1 and the error function's GELU, as ESM-2 was trained."""
    return F.gelu(F.linear(x, *fc1))


def fused_tanh_gelu(x: torch.Tensor, fc1: Linear) -> torch.Tensor:
    """fc1 with GELU's tanh form computed inside the matrix product: its error is below 16-bit rounding."""
    assert fc1.bias is not None  # families without biases have a gate
    return torch._addmm_activation(fc1.bias, x, fc1.weight.t(), use_gelu=True)


def gated(x: torch.Tensor, fc1: Linear) -> torch.Tensor:
    """SiLU of the first half of fc1's product times the second half (SwiGLU; Shazeer, 2020, arXiv 2002.05202)."""
    gate, up = F.linear(x, *fc1).chunk(2, dim=-1)
    return F.silu(gate) * up


class Encoder:
    """Token ids to representations."""

    def __init__(self, weights: Weights, operations: Operations, read: Callable[[], Weights]) -> None:
        """read: gives `weights` once more, after they were unloaded."""
        self.operations = operations
        self._weights: Weights | None = weights
        self._read = read
        self.longest = None if weights.positions is None else len(weights.positions) - FRAME
        """Residues that there are learned positions for; None where positions are rotary."""
        # Published checkpoints repeat the same frequencies in every layer: their angles are computed once per pack.
        self._frequencies: list[torch.Tensor] = []
        self._rotation_of_layer: list[int] = []
        for layer in weights.layers:
            known = (i for i, f in enumerate(self._frequencies) if torch.equal(f, layer.frequencies))
            self._rotation_of_layer.append(next(known, len(self._frequencies)))
            if self._rotation_of_layer[-1] == len(self._frequencies):
                self._frequencies.append(layer.frequencies)

    @property
    def weights(self) -> Weights:
        """The weights, which are read again if they were unloaded."""
        if self._weights is None:
            self._weights = self._read()
        return self._weights

    def unload(self) -> None:
        """Gives the weights' memory up until they are next needed."""
        self._weights = None

    def representations(self, pack: Pack, attend: Attention, layers: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """Yields the representations of `layers` (ascending), each `[T, D]` fp32; layers above the last are not run."""
        rotations = [Rotation.of(frequencies, pack.longest) for frequencies in self._frequencies]
        x = self._embedded(pack)
        if 0 in layers:
            # A copy, since the stream goes on to be changed in place.
            yield self.operations.straight(x).to(torch.float32, copy=True)
        for number, layer in enumerate(self.weights.layers[: max(layers)], start=1):
            x = self._layer(x, layer, rotations[self._rotation_of_layer[number - 1]], attend, pack)
            if number == len(self.weights.layers):
                yield self.operations.normalise(
                    self.operations.straight(x), *self.weights.last_norm, EPSILON, torch.float32
                )
            elif number in layers:
                yield self.operations.straight(x).float() + layer.offset

    def _embedded(self, pack: Pack) -> torch.Tensor:
        weights = self.weights
        x = weights.embedding[pack.tokens]
        if weights.token_dropout and pack.unmasked is not None:
            x = (x / pack.unmasked[:, None]).to(x.dtype)
        if weights.positions is not None:
            x = x + weights.positions[pack.positions]
        if weights.first_norm is not None:
            x = self.operations.normalise(x, *weights.first_norm, EPSILON, x.dtype)
        return x

    def _layer(
        self, x: torch.Tensor, layer: LayerWeights, rotation: Rotation, attend: Attention, pack: Pack
    ) -> torch.Tensor:
        operations = self.operations
        x = operations.add(x, operations.mix(x, layer, rotation, pack, attend), layer.out)
        return operations.add(x, operations.feed(x, layer.ffn_norm, layer.fc1), layer.fc2)


def logits(x: torch.Tensor, head: HeadWeights) -> torch.Tensor:
    """The language model head on representations of the last layer: `[R, D]` to `[R, 33]` fp32."""
    x = F.gelu(F.linear(x.to(head.dense.weight.dtype), *head.dense))
    x = F.layer_norm(x, x.shape[-1:], *head.norm, EPSILON)
    return F.linear(x, *head.decoder).float()
