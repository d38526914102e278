"""What each layer keeps for its backward pass, and what it computes again.

A policy is for one layer:

    none       keeps all that the backward pass reads; nothing is computed again
    unrolled   keeps the same, for training over several devices: see below
    attention  keeps all but the feed-forward's products with gate and up
    dots       keeps products of rows with weights
    names      keeps the layer's input, and the attention kernel's result
    full       keeps the layer's input alone

`GemmaConfig.remat` is a policy for all layers, or says how many layers take
each, in order: "none:14,full" is 14 that keep all, and of the others the input.

A scan over layers keeps what they keep in stacks.  On one device the kernels
write into these; over several, XLA copies the feed-forward's products into them
and out again, which takes longer than computing them anew.  Unrolled layers are
not in a scan, so that there is nothing to copy, but each of them is compiled.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import jax

Policy = Literal["none", "unrolled", "full", "dots", "names", "attention"]
AUTO = "auto"

# Attention's result and log-normaliser: without them its backward pass would
# have to run the forward kernel again.
_OF_KERNEL = ("flash_attention_out", "flash_attention_lse")
AROUND_ATTENTION = ("attention_q", "attention_k", "attention_v", "attention_y")
"""Names of what a block makes around its attention: q, k and v, and the
residual stream after it."""


def parts(remat: str, num_layers: int) -> tuple[tuple[Policy, int], ...]:
  """Policies, and how many layers each is for in one scan; "auto" as "none".

  Raises:
    ValueError: what it must be, for a sentence that begins with its name.
  """
  if remat == AUTO:
    return (("none", num_layers),)
  *counted, rest = remat.split(",") if isinstance(remat, str) else [""]
  found: list[tuple[Policy, int]] = []
  for part in counted:
    policy, _, count = part.partition(":")
    found.append((_policy(policy), int(count) if count.isdecimal() else 0))
  left = num_layers - sum(count for _, count in found)
  found.append((_policy(rest), left))
  if any(count < 1 for _, count in found):
    raise ValueError(
      f"fewer than {num_layers} layers, at least one for each but the last "
      f"policy, such as none:{max(1, num_layers // 2)},full"
    )
  return tuple(
    (policy, 1 if policy == "unrolled" else count)
    for policy, count in found
    for _ in range(count if policy == "unrolled" else 1)
  )


def _policy(name: str) -> Policy:
  if name not in get_args(Policy):
    raise ValueError(
      f"one of {', '.join(get_args(Policy))}, {AUTO}, or layers of some and "
      f"the rest of another, such as none:2,full"
    )
  return cast("Policy", name)


def keeps_all(policy: Policy) -> bool:
  """Whether nothing is computed again."""
  return policy in ("none", "unrolled")


def checkpoint(policy: Policy) -> Callable[[Any], Any] | None:
  """What wraps a layer, so that it keeps what the policy says.

  None for all, in stacks of all layers where that is no copy.
  """
  policies = jax.checkpoint_policies
  match policy:
    case "none":
      return None
    case "unrolled":
      return lambda layer: layer
    case "full":
      kept = policies.nothing_saveable
    case "dots":
      # Products of rows with weights; not those of attention, of size T^2.
      kept = policies.dots_with_no_batch_dims_saveable
    case "names":
      kept = policies.save_only_these_names(*_OF_KERNEL)
    case "attention":
      kept = policies.save_only_these_names(*_OF_KERNEL, *AROUND_ATTENTION)
  # prevent_cse puts barriers between the forward pass and its recomputation, so
  # that XLA does not merge them.  In a scan they are apart without barriers.
  return functools.partial(jax.checkpoint, policy=kept, prevent_cse=False)


# --- what fits ----------------------------------------------------------------


def fastest_first(num_layers: int, over_devices: bool = False) -> list[str]:
  """Choices, each of which keeps less than the one before.

  Args:
    num_layers: of the model.
    over_devices: whether it is trained over several.
  """
  some = range(num_layers - 1, 0, -1)
  # What a byte saves in time, it saves most of around attention, and least of
  # the feed-forward's products.
  most = "unrolled" if over_devices else "none"
  policies = most, "attention", "names", "full"
  choices = []
  for more, less in itertools.pairwise(policies):
    choices += [more, *(f"{more}:{count},{less}" for count in some)]
  return [*choices, "full"]


def fastest_that(
  fits: Callable[[str], bool], num_layers: int, over_devices: bool = False
) -> str | None:
  """The fastest choice that fits, found by halving; None if none does."""
  choices = fastest_first(num_layers, over_devices)
  low, high = 0, len(choices)  # those before `low` do not fit
  while low < high:
    middle = (low + high) // 2
    if fits(choices[middle]):
      high = middle
    else:
      low = middle + 1
  return choices[low] if low < len(choices) else None
