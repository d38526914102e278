"""Page 2: frequencies by the configuration of a published model.

The keys are those of Hugging Face's transformers, of version 4 (`rope_scaling`
beside `rope_theta`) and 5 (`rope_parameters`, with all of it inside, once or
for each kind of layer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .frequencies import RopeFrequencies
from .numbers import yarn_scale

_NAME = "RopeFrequencies.from_hugging_face"

# Other names of a key, in models older than the common one.
_ALIASES = {
  "rope_theta": ("rotary_emb_base", "rope_base", "default_theta"),
  "partial_rotary_factor": ("rotary_pct",),
}
# Keys that may stand beside the dictionary of RoPE's own.
_BESIDE = (
  "rope_theta",
  "partial_rotary_factor",
  "rotary_dim",
  "max_position_embeddings",
  "original_max_position_embeddings",
)


def frequencies_of(
  config: Any,
  head_size: int | None,
  base: float | None,
  layer_type: str | None,
  length: Any,
) -> RopeFrequencies:
  """See `RopeFrequencies.from_hugging_face`."""
  whole = _as_mapping(config)
  p = _Parameters(_parameters(whole, layer_type))
  size = _head_size(whole, layer_type) if head_size is None else head_size
  p["rope_theta"] = p.get("rope_theta") if base is None else base
  kind = p.get("rope_type") or p.get("type") or "default"
  make = _TYPES.get(kind) if isinstance(kind, str) else None
  if make is None:
    raise ValueError(
      f"{_NAME}: the type must be one of {', '.join(_TYPES)}, got {kind!r}"
    )
  if p.get("rotary_dim") is not None:
    rotated = p["rotary_dim"] / size
  else:
    rotated = p.get("partial_rotary_factor") or 1.0
  common = {"base": p.needed("rope_theta"), "head_size": size}
  made = make(p, length, common | {"rotated": rotated})
  sections = p.get("mrope_section")
  if sections is None:
    return made
  return made.by_sections(
    sections, interleaved=bool(p.get("mrope_interleaved"))
  )


# --- reading ------------------------------------------------------------------


class _Parameters(dict):
  """RoPE's own keys, and those beside them."""

  def needed(self, name: str) -> Any:
    """The value of a key that must be there."""
    if self.get(name) is None:
      raise ValueError(
        f"{_NAME}: {name} must be given for type "
        f"{self.get('rope_type') or self.get('type') or 'default'!r}, got keys "
        f"{sorted(k for k, v in self.items() if v is not None)}"
      )
    return self[name]


def _as_mapping(config: Any) -> Mapping[str, Any]:
  to_dict = getattr(config, "to_dict", None)
  config = to_dict() if callable(to_dict) else config
  if not isinstance(config, Mapping):
    raise ValueError(
      f"{_NAME}: config must be a dictionary, got {type(config).__name__}"
    )
  inner = config.get("text_config")  # of a model that sees images, too
  return config if inner is None else _as_mapping(inner)


def _parameters(
  whole: Mapping[str, Any], layer_type: str | None
) -> dict[str, Any]:
  """All that is known of the rotation of a kind of layers."""
  own = whole.get("rope_parameters") or whole.get("rope_scaling")
  if own is None and ({"rope_type", "type"} & whole.keys() or _nested(whole)):
    own = whole
  beside = {key: _aliased(whole, key) for key in _BESIDE}
  is_local = layer_type == "sliding_attention"
  if is_local and whole.get("rope_local_base_freq") is not None:  # Gemma 3
    return {**beside, "rope_theta": whole["rope_local_base_freq"]}
  kinds = _nested(own or {})
  if kinds:
    if layer_type not in kinds:
      raise ValueError(
        f"{_NAME}: layer_type must be one of {', '.join(kinds)}, "
        f"got {layer_type!r}"
      )
    own = kinds[layer_type]
  return beside | {k: v for k, v in (own or {}).items() if v is not None}


def _nested(own: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """Parameters of each kind of layers, if there are several."""
  return {
    kind: value
    for kind, value in own.items()
    if kind.endswith("_attention") and isinstance(value, Mapping)
  }


def _aliased(whole: Mapping[str, Any], key: str) -> Any:
  names = (key, *_ALIASES.get(key, ()))
  return next((whole[n] for n in names if whole.get(n) is not None), None)


def _head_size(whole: Mapping[str, Any], layer_type: str | None) -> int:
  names = ["qk_rope_head_dim", "head_dim"]  # the former of latent attention
  if layer_type == "full_attention":
    names.insert(0, "global_head_dim")  # Gemma 4
  for name in names:
    if whole.get(name) is not None:
      return whole[name]
  width, heads = (
    whole.get("hidden_size") or whole.get("n_embd"),
    whole.get("num_attention_heads") or whole.get("n_head"),
  )
  if width is None or heads is None:
    raise ValueError(
      f"{_NAME}: head_size must be given with a config that lacks head_dim, "
      f"got keys {sorted(whole)}"
    )
  return width // heads


# --- types --------------------------------------------------------------------


def _plain(p: _Parameters, length: Any, common: Any) -> RopeFrequencies:
  del p, length
  return RopeFrequencies.plain(**common)


def _linear(p: _Parameters, length: Any, common: Any) -> RopeFrequencies:
  del length
  return RopeFrequencies.linear(**common, factor=p.needed("factor"))


def _ntk(p: _Parameters, length: Any, common: Any) -> RopeFrequencies:
  del length
  return RopeFrequencies.ntk(**common, factor=p.needed("factor"))


def _dynamic(p: _Parameters, length: Any, common: Any) -> RopeFrequencies:
  if p.get("alpha"):  # Hunyuan's, which knows no length
    return RopeFrequencies.ntk(**common, factor=p["alpha"])
  known = p.needed("max_position_embeddings")
  return RopeFrequencies.ntk(
    **common,
    factor=p.needed("factor"),
    original_length=known,
    length=known if length is None else length,
  )


def _lengths(p: _Parameters) -> tuple[float, float]:
  """The original length, and the factor from it to the longest."""
  original = p.get("original_max_position_embeddings")
  factor = p.get("factor")
  if original is None:
    return p.needed("max_position_embeddings"), p.needed("factor")
  if factor is None:
    factor = p.needed("max_position_embeddings") / original
  return original, factor


def _yarn(p: _Parameters, length: Any, common: Any) -> RopeFrequencies:
  del length
  original, factor = _lengths(p)
  scale = p.get("attention_factor")
  if scale is None and p.get("mscale") and p.get("mscale_all_dim"):
    # DeepSeek's, whose attention multiplies its logits by the latter's square.
    weights = p["mscale"], p["mscale_all_dim"]
    one, all_dims = (yarn_scale(factor, weight) for weight in weights)
    scale = one / all_dims
  return RopeFrequencies.yarn(
    **common,
    factor=factor,
    original_length=original,
    beta_fast=p.get("beta_fast") or 32.0,
    beta_slow=p.get("beta_slow") or 1.0,
    attention_scale=scale,
    truncate=bool(p.get("truncate", True)),
  )


def _longrope(p: _Parameters, length: Any, common: Any) -> RopeFrequencies:
  original = p.get("original_max_position_embeddings")
  if original is None:
    original, factor = _lengths(p)
  elif p.get("max_position_embeddings") is not None:
    factor = p["max_position_embeddings"] / original
  else:
    factor = p.needed("factor")
  return RopeFrequencies.longrope(
    **common,
    short_factor=p.needed("short_factor"),
    long_factor=p.needed("long_factor"),
    original_length=original,
    factor=factor,
    length=length,
    attention_scale=p.get("attention_factor"),
  )


def _llama3(p: _Parameters, length: Any, common: Any) -> RopeFrequencies:
  del length
  return RopeFrequencies.llama3(
    **common,
    factor=p.needed("factor"),
    original_length=p.needed("original_max_position_embeddings"),
    low_frequency_factor=p.needed("low_freq_factor"),
    high_frequency_factor=p.needed("high_freq_factor"),
  )


def _proportional(p: _Parameters, length: Any, common: Any) -> RopeFrequencies:
  del length
  return RopeFrequencies.proportional(**common, factor=p.get("factor") or 1.0)


_TYPES: dict[str, Callable[..., RopeFrequencies]] = {
  "default": _plain,
  "linear": _linear,
  "dynamic": _dynamic,
  "ntk": _ntk,
  "yarn": _yarn,
  "longrope": _longrope,
  "su": _longrope,  # its older name
  "llama3": _llama3,
  "proportional": _proportional,
  "mrope": _plain,  # an older name of sections
}
