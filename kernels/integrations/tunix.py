"""Google's `tunix`: Llama 3 and Qwen 3, for training and for scoring.

    from pallas_gemma.kernels.integrations import tunix

    tunix.apply()        # before `from tunix.sft.utils import ...`
    model = Llama3(config, rngs=rngs)   # as ever

What is swapped: `RMSNorm`, `Attention` (with its RoPE and its norms of q and k)
and `MLP` of `tunix.models.llama3` and `tunix.models.qwen3`, and
`make_causal_attn_mask` of `tunix.sft.utils` and `tunix.rl.common`, which says
that the mask is causal; and the losses of fine-tuning and of preferences, see
`_tunix_loss.py`.  Devices are those of `config.shd_config` on the mesh
of the context, as for the library's own activations.

What stays the library's own code, layer by layer, and is in the report: a KV
cache; a mask that is an array; a sequence that is split over devices; a
feed-forward of which qwix changes products, for LoRA or quantisation, while
attention between projections with LoRA is served; a mixture of experts.

tunix 0.1.7 rotates by a base of 1,000,000, whatever `rope_theta` says; so does
the swap.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._frame.check import Implementation
from .._gated import feed_forward
from .._rope import Rope
from .._row_norm import Norm
from . import _log, _nnx, _parts, _tunix_loss
from ._library import Choice, Library, Swap, module
from ._mask import CausalMask, dense

_NAME = "tunix"
_MODELS = ("llama3", "qwen3")


def apply(
  *,
  implementation: Implementation = None,
  parts: Sequence[str] | None = None,
) -> None:
  """Swaps the classes of the installed `tunix`, for models yet to be traced.

  What was traced before is forgotten (`jax.clear_caches()`), so that models in
  use are swapped too.  A `make_causal_attn_mask` that was imported by name
  before stays what it was: its masks are arrays, and attention the library's.

  Args:
    implementation: as in `integrations.gemma.apply`.
    parts: some of "norm", "attention", "feed_forward", "loss"; None is all.

  Raises:
    ValueError: if `tunix` is not installed, or in a version whose classes are
      not known here.
  """
  _library.apply(implementation, parts)


def undo() -> None:
  """Puts the library's own code back, and forgets what was traced."""
  _library.undo()


# --- the swaps ----------------------------------------------------------------


def _swaps(choice: Choice) -> Iterator[Swap]:
  models = [module(f"tunix.models.{name}.model") for name in _MODELS]
  if "loss" in choice.parts:
    yield from _tunix_loss.swaps(choice, models, _split_loss)
  for name, model in zip(_MODELS, models, strict=True):

    def swap(
      owner: Any, method: str, make: Any, model: Any = model, name: str = name
    ) -> Swap:
      original = vars(owner)[method]
      new = make(choice, model, name, original)
      return Swap(owner, method, functools.wraps(original)(new))

    yield swap(_tunix_loss.whole(model), "__call__", _model)
    if "norm" in choice.parts:
      yield swap(model.RMSNorm, "__call__", _norm)
    if "attention" in choice.parts:
      yield swap(model.Attention, "block", _attention)
    if "feed_forward" in choice.parts:
      yield swap(model.MLP, "block", _feed_forward)
      yield swap(model.DecoderLayer, "block", _layer)
  if "attention" in choice.parts:
    for name in ("tunix.sft.utils", "tunix.rl.common"):
      owner = module(name)
      original = vars(owner)["make_causal_attn_mask"]
      yield Swap(owner, original.__name__, _mask_maker(original))


_library = Library(
  name=_NAME,
  distribution="google-tunix",
  versions=("0.1.7",),
  parts=("norm", "attention", "feed_forward", "loss"),
  swaps=_swaps,
  beyond="models other than Llama 3 and Qwen 3 are as they were, and so are "
  "losses that take logits: of distillation, and of compute_per_token_logps",
)


def _model(choice: Choice, model: Any, name: str, original: Any) -> Any:
  """The model itself, which says what its layers are called."""
  del choice, model, name

  def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _nnx.named(self):
      return original(self, *args, **kwargs)

  return __call__


def _mask_maker(original: Callable[..., Any]) -> Callable[..., Any]:
  @functools.wraps(original)
  def make_causal_attn_mask(input_mask: Any) -> Any:
    if input_mask.ndim != 2:
      return original(input_mask)
    return CausalMask(input_mask)

  return make_causal_attn_mask


def _norm(choice: Choice, model: Any, name: str, original: Any) -> Any:
  del model, original

  def __call__(self: Any, x: jax.Array) -> jax.Array:
    words = _parts.norm_in_words(choice.implementation)
    path = _nnx.path_of(self, f"{name}.RMSNorm")
    _log.note(_NAME, path, "norm", "rms_norm", words)
    # Llama's gives x's dtype, Qwen's that of its config.
    dtype = getattr(self, "dtype", x.dtype)
    with _nnx.undisturbed():
      y = _parts.norm(
        x,
        _nnx.value(self.w),
        epsilon=self.norm_eps,
        scale_offset=0.0,
        implementation=choice.implementation,
      )
    return y.astype(dtype)

  return __call__


# --- feed-forward -------------------------------------------------------------


def _feed_forward(
  choice: Choice, model: Any, name: str, original: Callable[..., Any]
) -> Any:
  def block(self: Any, x: jax.Array) -> jax.Array:
    path = _nnx.path_of(self, f"{name}.MLP")
    why = _why_not_mlp(self)
    if why is not None:
      _log.note(_NAME, path, "feed_forward", _log.OWN, why)
      return original(self, x)
    words = _parts.in_words(choice.implementation)
    _log.note(_NAME, path, "feed_forward", "feed_forward", words)
    return _mlp(choice, model, self, x)

  return block


def _why_not_mlp(mlp: Any) -> str | None:
  if _nnx.is_intercepted():
    return "qwix changes its products, for LoRA or quantisation"
  return _nnx.why_not_linear(mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _mlp(
  choice: Choice, model: Any, mlp: Any, x: jax.Array, **kwargs: Any
) -> jax.Array:
  """The kernel, perhaps with the norm before it and the residual after it."""
  layers = mlp.gate_proj, mlp.up_proj, mlp.down_proj
  dtype = _nnx.dtype_of(x, *layers)
  weights = [_nnx.value(layer.kernel).astype(dtype) for layer in layers]
  mesh = _mesh(model)
  with _nnx.split(mesh, _rules(mesh, mlp, x, F=weights[0].shape[1])):
    return feed_forward(
      x.astype(dtype),
      *weights,
      activation="silu",
      implementation=choice.implementation,
      **kwargs,
    )


def _layer(
  choice: Choice, model: Any, name: str, original: Callable[..., Any]
) -> Any:
  """A layer whose feed-forward has its norm and its residual inside.

  One that says so if its feed-forward is another than `MLP`.
  """

  def block(
    self: Any, x: jax.Array, *args: Any, **kwargs: Any
  ) -> tuple[Any, jax.Array]:
    norm, mlp = self.post_attention_layernorm, self.mlp
    if not isinstance(mlp, model.MLP):
      path = _nnx.path_of(mlp, f"{name}.{type(mlp).__name__}")
      why = "a mixture of experts is the library's"
      _log.note(_NAME, path, "feed_forward", _log.OWN, why)
    elif "norm" in choice.parts and _takes_its_norm(model, mlp, norm, x):
      normed = self.input_layernorm(x)
      cache, out = self.attn(normed, *args, **kwargs)
      words = _parts.in_words(choice.implementation)
      for module, part, its in (
        (norm, "norm", "RMSNorm"),
        (mlp, "feed_forward", "MLP"),
      ):
        path = _nnx.path_of(module, f"{name}.{its}")
        _log.note(_NAME, path, part, "feed_forward", words)
      scale = Norm(_nnx.value(norm.w), norm.norm_eps)
      with jax.named_scope("feed_forward"):
        y = _mlp(choice, model, mlp, x + out, norm=scale, residual=True)
      return cache, y
    return original(self, x, *args, **kwargs)

  return block


def _takes_its_norm(model: Any, mlp: Any, norm: Any, x: jax.Array) -> bool:
  """Whether the feed-forward can have its norm and its residual inside.

  Not if it is the library's own, recomputed alone, or in another dtype than the
  residual stream.
  """
  if mlp.config.remat_config in (
    model.RematConfig.BLOCK,
    model.RematConfig.BLOCK.value,
  ):
    return False
  of_norm = getattr(norm, "dtype", x.dtype)
  layers = mlp.gate_proj, mlp.up_proj, mlp.down_proj
  of_mlp = _nnx.dtype_of(x, *layers)
  return _why_not_mlp(mlp) is None and x.dtype == of_norm == of_mlp


# --- attention ----------------------------------------------------------------


def _attention(
  choice: Choice, model: Any, name: str, original: Callable[..., Any]
) -> Any:
  parameters = inspect.signature(model.apply_rope).parameters
  base = parameters["rope_theta"].default

  def block(
    self: Any,
    x: jax.Array,
    segment_pos: jax.Array,
    cache: Any,
    attn_mask: Any,
    segment_ids: Any = None,
  ) -> tuple[Any, jax.Array]:
    mesh, path = _mesh(model), _nnx.path_of(self, f"{name}.Attention")
    splash = getattr(self.config, "use_flash_attention", False)
    why = _why_not_attention(self, cache, attn_mask, splash)
    if why is not None:
      _log.note(_NAME, path, "attention", _log.OWN, why)
      more = () if segment_ids is None else (segment_ids,)
      return original(self, x, segment_pos, cache, dense(attn_mask), *more)
    words = _parts.in_words(choice.implementation)
    _log.note(_NAME, path, "attention", "flash_attention", words)
    q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    q, k = (
      getattr(self, norm, lambda heads: heads)(heads)
      for norm, heads in (("q_norm", q), ("k_norm", k))
    )
    q, k, v = (
      model.shard(heads, self.shd_config.act_btnh) for heads in (q, k, v)
    )
    rules = _rules(mesh, self, x, N=q.shape[2])
    with _nnx.undisturbed(), _nnx.split(mesh, rules):
      out = _parts.attend(
        q,
        k,
        v,
        scale=self.scale,
        rope=Rope(segment_pos, base),
        implementation=choice.implementation,
        **_visible(attn_mask, segment_ids, splash),
      )
    out = self.o_proj(out)
    return None, model.shard(out, self.shd_config.act_btd)

  return block


def _why_not_attention(
  layer: Any, cache: Any, mask: Any, splash: bool
) -> str | None:
  if cache is not None:
    return "a KV cache is the library's"
  if not splash and mask is not None and not isinstance(mask, CausalMask):
    return "attention_mask is an array of the caller's own"
  if layer.shd_config.act_btnh[1] is not None:
    return "the sequence is split over devices"
  if _nnx.is_quantised():
    return "qwix changes its products"
  return None


def _visible(mask: Any, segment_ids: Any, splash: bool) -> dict[str, Any]:
  """Which keys a query sees, as `flash_attention` takes it.

  With the library's own flash attention that is causal by segments, whatever
  the mask; without, what the mask says, and all keys where there is none.
  """
  if splash:
    if segment_ids is None:
      return {"is_causal": True}
    ids = jnp.asarray(segment_ids, jnp.int32)
    return {"is_causal": True, "segment_ids": ids + 1}  # 0 is one of theirs
  if mask is None:
    return {}
  return {"is_causal": True, "segment_ids": mask.segment_ids()}


# --- devices ------------------------------------------------------------------


def _mesh(model: Any) -> Any:
  """The mesh of the context, as the library looks for it."""
  return model.pxla.thread_resources.env.physical_mesh


def _rules(
  mesh: Any, layer: Any, x: jax.Array, **sizes: int
) -> dict[str, tuple[str, ...]]:
  of = layer.shd_config
  axes = {"B": of.act_btnh[0], "N": of.act_btnh[2], "F": of.act_btf[2]}
  sizes["B"] = x.shape[0]
  axes = {letter: axes[letter] for letter in sizes}
  return {} if mesh.empty else _nnx.rules_of(mesh, sizes, axes)


def _split_loss(config: Any, x: jax.Array) -> Any:
  """The mesh of the context, and how it splits tokens and the vocabulary."""
  mesh = _mesh(module(f"tunix.models.{_MODELS[0]}.model"))
  if mesh.empty:
    return _nnx.split(mesh, {})
  of = config.shd_config
  axes = {"B": of.act_btd[0], "V": of.emb_vd[0]}
  sizes = {"B": x.shape[0], "V": config.vocab_size}
  return _nnx.split(mesh, _nnx.rules_of(mesh, sizes, axes))
