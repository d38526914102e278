"""Activations of gated units: the specification's, and the kernels' own.

A kernel's backward needs value and derivative of the same argument, from one
evaluation of the transcendental they share:

    gelu_tanh  a = g (1 + t) / 2,   t = tanh(c g (1 + k g^2)),  c = sqrt(2 / pi)
               a' = (1 + t) / 2 + g (1 - t^2) c (1 + 3 k g^2) / 2,  k = 0.044715
    gelu       a = g P,   a' = P + g exp(-g^2 / 2) / sqrt(2 pi)
               where P = (1 + erf(g / sqrt 2)) / 2
    silu       a = g s,   a' = s + a (1 - s),   s = 1 / (1 + exp(-g))
    quick_gelu the same with s = 1 / (1 + exp(-b g)),  a' = s + b a (1 - s),
               b = 1.702
    sigmoid    a = s,   a' = s (1 - s)
    relu       a = max(g, 0),   a' = 1 where g > 0, else 0
    relu2      a = max(g, 0)^2,   a' = 2 max(g, 0)

Any other elementwise function is differentiated by JAX while the kernel is
traced.  ClampedSwiGLU is of both branches, see there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._frame.check import as_number

Elementwise = Callable[[jax.Array], jax.Array]

_QUICK = 1.702


@dataclasses.dataclass(frozen=True)
class ClampedSwiGLU:
  """The gated unit of gpt-oss, for `activation`; limits as well as gates.

      g = min(gate, limit),   u = clip(up, -limit, limit)
      h = g * sigmoid(alpha g) * (u + 1)

  OpenAI, gpt-oss model card, arXiv 2508.10925, section 2.2.  Where it clamps,
  gate and up have no gradient; at the limit itself they have.

  Attributes:
    limit: positive, in the units of gate and up; `math.inf` for no limit.
    alpha: of the sigmoid.

  Raises:
    ValueError: if a number is none that is known when the program is traced,
      or limit is not positive.
  """

  limit: float = 7.0
  alpha: float = _QUICK

  def __post_init__(self):
    for name in ("limit", "alpha"):
      number = as_number("ClampedSwiGLU", name, getattr(self, name))
      object.__setattr__(self, name, number)
    if not self.limit > 0:
      raise ValueError(
        f"ClampedSwiGLU: limit must be positive, got {self.limit}"
      )

  def of(self, gate: jax.Array, up: jax.Array) -> jax.Array:
    """h, of any shape; plain jnp, and what the kernels compute too."""
    gate = jnp.where(gate > self.limit, self.limit, gate)
    return gate * jax.nn.sigmoid(self.alpha * gate) * (self._clip(up) + 1)

  def gradients(
    self, dh: jax.Array, gate: jax.Array, up: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dgate, dup and h, from float32 tiles."""
    g = jnp.where(gate > self.limit, self.limit, gate)
    s = jax.nn.sigmoid(self.alpha * g)
    a, factor = g * s, self._clip(up) + 1
    slope = s + self.alpha * a * (1 - s)
    dgate = jnp.where(gate > self.limit, 0.0, dh * factor * slope)
    dup = jnp.where(jnp.abs(up) > self.limit, 0.0, dh * a)
    return dgate, dup, a * factor

  def _clip(self, up: jax.Array) -> jax.Array:
    # By selections, whose gradient at the limit itself is 1.
    up = jnp.where(up > self.limit, self.limit, up)
    return jnp.where(up < -self.limit, -self.limit, up)


Activation = str | Elementwise | ClampedSwiGLU

# --- the specification's ------------------------------------------------------


def _relu2_reference(g: jax.Array) -> jax.Array:
  return jnp.square(jax.nn.relu(g))


def _quick_gelu_reference(g: jax.Array) -> jax.Array:
  return g * jax.nn.sigmoid(_QUICK * g)


ACTIVATIONS: Mapping[str, Elementwise] = {
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
  "relu2": _relu2_reference,
  "quick_gelu": _quick_gelu_reference,
  "sigmoid": jax.nn.sigmoid,
}

# What others call them: PyTorch, Hugging Face's configs, papers.
_SPELLINGS: Mapping[str, str] = {
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_approximate": "gelu_tanh",
  "gelu_exact": "gelu",
  "gelu_erf": "gelu",
  "gelu_python": "gelu",
  "swish": "silu",
  "relu_squared": "relu2",
  "squared_relu": "relu2",
}

# JAX's own, which the kernels need not differentiate.
_KNOWN: Mapping[Elementwise, str] = {
  jax.nn.gelu: "gelu_tanh",
  jax.nn.silu: "silu",
  jax.nn.swish: "silu",
  jax.nn.relu: "relu",
  jax.nn.sigmoid: "sigmoid",
  ACTIVATIONS["gelu_tanh"]: "gelu_tanh",
  ACTIVATIONS["gelu"]: "gelu",
}


def gated(
  activation: Activation, gate: jax.Array, up: jax.Array | None
) -> jax.Array:
  """h, in plain jnp."""
  if isinstance(activation, ClampedSwiGLU):
    assert up is not None
    return activation.of(gate, up)
  if isinstance(activation, str):
    activation = ACTIVATIONS[activation]
  a = activation(gate)
  return a if up is None else a * up


# --- in a kernel --------------------------------------------------------------

_C = math.sqrt(2 / math.pi)
_K = 0.044715


def _gelu_tanh(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  square = g * g
  t = jnp.tanh(_C * g * (1 + _K * square))
  half = 0.5 * (1 + t)
  slope = 0.5 * _C * g * (1 - t * t) * (1 + 3 * _K * square)
  return g * half, half + slope


def _gelu(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  p = 0.5 * (1 + jax.lax.erf(g * math.sqrt(0.5)))
  density = jnp.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
  return g * p, p + g * density


def _silu(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  s = jax.nn.sigmoid(g)
  a = g * s
  return a, s + a * (1 - s)


def _quick_gelu(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  s = jax.nn.sigmoid(_QUICK * g)
  a = g * s
  return a, s + _QUICK * a * (1 - s)


def _sigmoid(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  s = jax.nn.sigmoid(g)
  return s, s * (1 - s)


def _relu(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  return jnp.maximum(g, 0), jnp.where(g > 0, 1.0, 0.0)


def _relu2(g: jax.Array) -> tuple[jax.Array, jax.Array]:
  a = jnp.maximum(g, 0)
  return a * a, 2 * a


_VALUE_AND_DERIVATIVE = {
  "gelu_tanh": _gelu_tanh,
  "gelu": _gelu,
  "silu": _silu,
  "relu": _relu,
  "relu2": _relu2,
  "quick_gelu": _quick_gelu,
  "sigmoid": _sigmoid,
}


def activate(activation: str | Elementwise, gate: jax.Array) -> jax.Array:
  """The activation of a float32 tile, inside a kernel."""
  if not isinstance(activation, str):
    return activation(gate)
  return _VALUE_AND_DERIVATIVE[activation](gate)[0]


def activate_and_derive(
  activation: str | Elementwise, gate: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The activation of a float32 tile and its derivative, inside a kernel."""
  if not isinstance(activation, str):
    value, pull = jax.vjp(activation, gate)
    return value, pull(jnp.ones_like(gate))[0]
  return _VALUE_AND_DERIVATIVE[activation](gate)


# --- what a caller may say ----------------------------------------------------


def as_activation(op: str, activation: Activation) -> Activation:
  """The activation by its one name; a function that is known, likewise.

  Raises:
    ValueError: if it is none, or a function that is not elementwise.
  """
  if isinstance(activation, ClampedSwiGLU):
    return activation
  if isinstance(activation, str):
    name = _SPELLINGS.get(activation, activation)
    if name in ACTIVATIONS:
      return name
  elif callable(activation):
    if isinstance(activation, functools.partial):
      activation = _settled(activation)
    try:
      known = _KNOWN.get(activation)
    except TypeError as error:
      raise ValueError(
        f"{op}: activation must be hashable, as a function is, got "
        f"{activation!r}"
      ) from error
    if known is None:
      _check_elementwise(op, activation)
    return known or activation
  names = ", ".join([*ACTIVATIONS, *_SPELLINGS])
  raise ValueError(
    f"{op}: activation must be one of {names}, an elementwise function or a "
    f"ClampedSwiGLU, got {activation!r}"
  )


def _settled(function: functools.partial[Any]) -> Elementwise:
  """JAX's GELU of either kind; its exact one has no lowering in a kernel."""
  if function.func is not jax.nn.gelu or function.args:
    return function
  is_tanh = function.keywords.get("approximate", True)
  return ACTIVATIONS["gelu_tanh" if is_tanh else "gelu"]


# Of one shape, and still not elementwise.
_ALONG_AN_AXIS = (
  *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "rev"),
  *("iota", "fft", "random_bits", "rng_uniform", "rng_bit_generator"),
)


def _check_elementwise(op: str, function: Elementwise) -> None:
  """Refuses a function of more than one element of its argument."""

  def refused(got: str) -> ValueError:
    return ValueError(
      f"{op}: activation must be an elementwise function of one float array, "
      f"got {function!r}, which {got}"
    )

  tile = jax.ShapeDtypeStruct((8, 128), jnp.float32)
  try:
    closed = jax.make_jaxpr(function)(tile)
  except Exception as error:
    raise refused("cannot be traced") from error
  avals: list[Any] = list(closed.out_avals)
  outs = [(out.shape, out.dtype) for out in avals]
  if outs != [(tile.shape, tile.dtype)]:
    raise refused(f"makes {outs} of {tile.shape} float32")
  if closed.consts:
    raise refused("depends on another array")
  shapes = {(), (1, 1), tile.shape}
  for equation in _equations(closed.jaxpr):
    name = equation.primitive.name
    avals = [v.aval for v in (*equation.invars, *equation.outvars)]
    is_mixed = any(getattr(a, "shape", ()) not in shapes for a in avals)
    if is_mixed or name in _ALONG_AN_AXIS:
      raise refused(f"has a {name}")


def _equations(jaxpr: Any) -> Iterator[Any]:
  """Of a jaxpr and of those in it."""
  for equation in jaxpr.eqns:
    closed = [getattr(p, "jaxpr", None) for p in equation.params.values()]
    inner = [jaxpr for jaxpr in closed if jaxpr is not None]
    if not inner:
      yield equation
    for jaxpr in inner:
      yield from _equations(jaxpr)
