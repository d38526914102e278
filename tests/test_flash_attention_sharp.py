"""Where the softmax is sharp and a query sees few keys.

There dq and dk are differences of almost equal numbers, dp - di, and what is
left of them is the rounding of one: di = do . out is made of the output in its
own dtype, as FlashAttention's is, while plain jnp has the weights.  The bar is
that of all gradients, and beside it what half an ulp of the output can do:

    |error of di| <= ulp / 2 * sum |do out|
    of dq_i       <= scale * that * sum_j p_ij |k_j|
    of dk_j       <= scale * sum_i p_ij * that_i * |q_i|
"""

import functools

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import pytest
from pallas_gemma.kernels import flash_attention, flash_attention_reference


def draw(seed, t, sharpness, dtype):
  rng = np.random.default_rng(seed)
  q, k, v, dout = (
    jnp.asarray(rng.standard_normal((1, t, heads, 64)), dtype)
    for heads in (2, 1, 1, 2)
  )
  return sharpness * q, k, v, dout


def gradients_of(function):
  def gradients(q, k, v, dout):
    causal = functools.partial(function, is_causal=True)
    return jax.vjp(causal, q, k, v)[1](dout)

  return gradients


def what_rounding_can_do(q, k, v, dout, dtype):
  """Bounds of dq's and dk's error, from that of di; in float64."""
  q, k, v, dout = (np.asarray(x, np.float64)[0] for x in (q, k, v, dout))
  scale = q.shape[-1] ** -0.5
  logits = scale * np.einsum("tnh,sh->nts", q, k[:, 0])
  logits[:, ~np.tri(len(q), dtype=bool)] = -np.inf
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  out = np.einsum("nts,sh->tnh", p, v[:, 0])
  ulp = float(jnp.finfo(dtype).eps)
  di = scale * ulp / 2 * np.abs(out * dout).sum(-1)  # [T, N]
  dq = di[..., None] * np.einsum("nts,sh->tnh", p, np.abs(k[:, 0]))
  dk = np.einsum("nts,tn,tnh->sh", p, di, np.abs(q))
  return dq[None], dk[None, :, None]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("t, sharpness", [(4, 8), (16, 8)])
def test_errors_are_those_of_a_rounded_output(t, sharpness, dtype):
  kernel = functools.partial(flash_attention, implementation="pallas")
  kernel = jax.jit(gradients_of(kernel))
  plain = gradients_of(flash_attention_reference)
  slack = numerics.SOFTMAX_GRADIENT_SLACK
  for seed in range(4):
    arrays = draw(seed, t, sharpness, dtype)
    with jax.enable_x64(True):
      truth = jax.jit(plain)(*numerics.widened(arrays))
      truth = [np.asarray(x) for x in truth]
    bounds = (*what_rounding_can_do(*arrays, dtype), np.zeros(1))
    both = zip(kernel(*arrays), plain(*arrays), truth, bounds, strict=True)
    for got, of_plain, exact, bound in both:
      for norm in (numerics.max_abs, numerics.rms):
        floor = 2 * np.finfo(np.float32).eps * norm(exact)
        bar = slack * norm(np.asarray(of_plain, np.float64) - exact)
        error = norm(np.asarray(got, np.float64) - exact)
        assert error <= bar + norm(bound) + floor
