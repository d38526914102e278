"""Drop-in TPU kernels: the table of contents and the one registry.

Everything public is named here; every module behind it starts with `_`.
Array letters, everywhere: B batch, T query and S key length, N query and
K key/value heads, H head size, D model width, F feed-forward width,
V vocabulary.
"""

from ._add_rms_norm import OP as _ADD_RMS_NORM
from ._add_rms_norm import add_rms_norm as add_rms_norm
from ._add_rms_norm import (
  add_rms_norm_reference as add_rms_norm_reference,
)
from ._attention.decode import OP as _DECODE_ATTENTION
from ._attention.decode import decode_attention as decode_attention
from ._attention.decode import (
  decode_attention_reference as decode_attention_reference,
)
from ._attention.op import OP as _FLASH_ATTENTION
from ._attention.op import flash_attention as flash_attention
from ._attention.spec import (
  flash_attention_reference as flash_attention_reference,
)
from ._attention.tiles import FlashAttentionConfig as FlashAttentionConfig
from ._feed_forward import OP as _FEED_FORWARD
from ._feed_forward import feed_forward as feed_forward
from ._feed_forward import feed_forward_reference as feed_forward_reference
from ._frame.op import Case as Case
from ._frame.op import Cost as Cost
from ._frame.op import Integers as Integers
from ._frame.op import Op as Op
from ._frame.sharding import sharding as sharding
from ._geglu import OP as _GEGLU
from ._geglu import geglu as geglu
from ._geglu import geglu_reference as geglu_reference
from ._geglu_tiles import FeedForwardConfig as FeedForwardConfig
from ._geglu_tiles import Tiles as Tiles
from ._linear_cross_entropy import OP as _LINEAR_CROSS_ENTROPY
from ._linear_cross_entropy import (
  LinearCrossEntropyConfig as LinearCrossEntropyConfig,
)
from ._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from ._linear_cross_entropy import (
  linear_cross_entropy_reference as linear_cross_entropy_reference,
)
from ._rms_norm import OP as _RMS_NORM
from ._rms_norm import RMSNormConfig as RMSNormConfig
from ._rms_norm import rms_norm as rms_norm
from ._rms_norm import rms_norm_reference as rms_norm_reference
from ._rope import OP as _APPLY_ROPE
from ._rope import Rope as Rope
from ._rope import RopeConfig as RopeConfig
from ._rope import apply_rope as apply_rope
from ._rope import apply_rope_reference as apply_rope_reference
from ._row_norm import Norm as Norm

# To add a kernel: one new module, its imports above, one entry here.
OPS: tuple[Op, ...] = (
  _RMS_NORM,
  _ADD_RMS_NORM,
  _APPLY_ROPE,
  _GEGLU,
  _FEED_FORWARD,
  _FLASH_ATTENTION,
  _DECODE_ATTENTION,
  _LINEAR_CROSS_ENTROPY,
)
