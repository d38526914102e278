"""Evaluates operation by operation what runs once: kernels, and references.

JAX's interpreter compiles each kernel as one program: seconds of XLA's for one
use.  Here NumPy does what it does exactly as XLA would, and XLA the rest, one
operation at a time: these programs are small, and tests share them.
"""

import functools
import string

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import core


def evaluate(jaxpr, consts, *args):
  """As `jax.core.eval_jaxpr`; branches, and loops with effects, in Python."""
  # Integers overflow, and memory that nothing wrote is NaN: neither is an error
  # on a chip, and NumPy is not to warn of it.
  with np.errstate(all="ignore"):
    args = [
      np.asarray(x, var.aval.dtype) if isinstance(x, bool | int | float) else x
      for x, var in zip(args, jaxpr.invars, strict=True)
    ]
    return _run(jaxpr, [*map(_numpy, consts)], [*map(_numpy, args)])


def op_by_op(function):
  """`function`, without a compiler between its operations."""

  def run(*args):
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    results = evaluate(jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)

  return run


def _run(jaxpr, consts, args):
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  values |= zip(jaxpr.invars, args, strict=True)

  def read(atom):
    if isinstance(atom, core.Literal):
      return np.asarray(atom.val, getattr(atom.aval, "dtype", None))
    return values[atom]

  for eqn in jaxpr.eqns:
    operands = [read(atom) for atom in eqn.invars]
    results = _step(eqn, operands)
    values.update(zip(eqn.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _step(eqn, operands):
  """The results of one equation."""
  name, params = eqn.primitive.name, eqn.params
  if inner := _CALLS.get(name):
    called = params[inner]
    return _closed(called[0] if type(called) is tuple else called, operands)
  if name == "io_callback":
    return _call_back(eqn, operands)
  if name == "cond":
    return _cond(params, operands)
  if eqn.effects and (loop := _LOOPS.get(name)):
    return loop(params, operands)
  multiple = eqn.primitive.multiple_results
  is_key = any(isinstance(x, jax.Array) for x in operands)
  if (exact := EXACT.get(name)) and not is_key:
    result = exact(params, *operands)
    if result is not None:
      return [np.asarray(r) for r in (result if multiple else [result])]
  params = eqn.primitive.get_bind_params(params)
  bind = functools.partial(eqn.primitive.bind, **params)
  if name in _OF_ONE and _kind(operands[0]) == "f":
    return [_in_a_common_shape(bind, np.asarray(operands[0]))]
  try:
    results = bind(*operands)
  except (
    NotImplementedError
  ):  # some of Pallas's are for compiled programs alone
    results = jax.jit(bind)(*operands)
  if not multiple:
    results = [results]
  return [_numpy(result) for result in results]


def _numpy(x):
  # NumPy's functions of a JAX array are JAX's: compiled for every shape.  A key
  # of random numbers has no other form.
  return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)


def _closed(jaxpr, operands):
  # That of `jax.checkpoint` has no constants.
  consts = getattr(jaxpr, "consts", ())
  return _run(getattr(jaxpr, "jaxpr", jaxpr), consts, operands)


def _call_back(eqn, operands):
  results = eqn.params["callback"](*map(np.asarray, operands))
  return [
    np.asarray(result, var.aval.dtype).reshape(var.aval.shape)
    for result, var in zip(results, eqn.outvars, strict=True)
  ]


# Where a primitive that only calls has what it calls.
_CALLS = {
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
  "custom_vmap_call": "call",
  "remat2": "jaxpr",
  "pallas_gemma_ruled": "jaxpr",
}


# --- control flow -------------------------------------------------------------


def _while(params, operands):
  of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
  for_cond = operands[:of_cond]
  for_body = operands[of_cond : of_cond + of_body]
  state = operands[of_cond + of_body :]
  while _closed(params["cond_jaxpr"], for_cond + state)[0]:
    state = _closed(params["body_jaxpr"], for_body + state)
  return state


def _cond(params, operands):
  index, *operands = operands
  branches = params["branches"]
  index = min(max(int(index), 0), len(branches) - 1)
  return _closed(branches[index], operands)


def _scan(params, operands):
  if "ft_in" in params:  # since JAX 0.12
    consts, carry, rows = map(list, params["ft_in"].update(operands).unpack())
  else:
    of_consts, of_carry = params["num_consts"], params["num_carry"]
    consts = operands[:of_consts]
    carry = operands[of_consts : of_consts + of_carry]
    rows = operands[of_consts + of_carry :]
  steps = range(params["length"])
  outs = []
  for i in reversed(steps) if params["reverse"] else steps:
    results = _closed(params["jaxpr"], consts + carry + [x[i] for x in rows])
    carry = results[: len(carry)]
    outs.append(results[len(carry) :])
  if params["reverse"]:
    outs.reverse()
  return carry + [np.stack(each) for each in zip(*outs, strict=True)]


_LOOPS = {"while": _while, "scan": _scan}


# --- what XLA does, in few shapes --------------------------------------------

_OF_ONE = set(
  "cos sin exp exp2 expm1 log log1p tanh logistic erf erfc erf_inv integer_pow "
  "rsqrt sqrt square round".split()
)


def _in_a_common_shape(function, x):
  """Each number by itself: in rows of a few lengths, which programs share."""
  length = 1 << max(8, 2 * -(-(x.size - 1).bit_length() // 2))
  row = np.ones(length, x.dtype)
  row[: x.size] = x.ravel()
  return np.asarray(function(row))[: x.size].reshape(x.shape)


# --- what NumPy does as XLA does ----------------------------------------------
# A function gets the parameters and operands of the primitive, and returns None
# for what it leaves to XLA.


def _elementwise(function, kinds="biuf"):
  def apply(params, *operands):
    if all(_kind(x) in kinds for x in operands):
      return function(*operands)
    return None

  return apply


def _kind(x):
  # NumPy's kind of bfloat16 is that of a raw type.
  dtype = np.asarray(x).dtype
  return "f" if jnp.issubdtype(dtype, jnp.floating) else dtype.kind


def _select(params, which, *cases):
  which = np.asarray(which)
  if which.dtype != bool or len(cases) != 2:
    return None
  return np.where(which, cases[1], cases[0])


def _convert(params, x):
  x, dtype = np.asarray(x), params["new_dtype"]
  if _kind(x) == "f" and not jnp.issubdtype(dtype, jnp.floating):
    return None  # XLA saturates, and takes NaN for 0
  return x.astype(dtype)


def _broadcast(params, x, *dynamic):
  if dynamic:
    return None
  x, shape = np.asarray(x), params["shape"]
  axes = params["broadcast_dimensions"]
  ones = [x.shape[axes.index(i)] if i in axes else 1 for i in range(len(shape))]
  return np.broadcast_to(x.reshape(ones), shape)


def _slice(params, x):
  strides = params["strides"] or (1,) * np.ndim(x)
  limits = zip(
    params["start_indices"], params["limit_indices"], strides, strict=True
  )
  return np.asarray(x)[tuple(slice(*limit) for limit in limits)]


def _iota(params, *dynamic):
  if dynamic:
    return None
  shape, axis = params["shape"], params["dimension"]
  along = np.arange(shape[axis]).astype(params["dtype"])
  ones = [1] * len(shape)
  ones[axis] = shape[axis]
  return np.broadcast_to(along.reshape(ones), shape)


def _shift(function):
  def apply(params, x, by):
    bits = np.asarray(x).dtype.itemsize * 8
    by = np.asarray(by)
    return function(x, by) if np.all((by >= 0) & (by < bits)) else None

  return apply


def _right_logical(x, by):
  x = np.asarray(x)
  unsigned = np.dtype(f"u{x.dtype.itemsize}")
  return (x.view(unsigned) >> by.astype(unsigned)).view(x.dtype)


def _bitcast(params, x, dtype=None):
  x, dtype = np.asarray(x), np.dtype(dtype or params["new_dtype"])
  return x.view(dtype) if x.dtype.itemsize == dtype.itemsize else None


def _divide(params, x, y):
  if _kind(x) == "f":
    return np.divide(x, y)
  x, y = np.asarray(x), np.asarray(y)
  if x.dtype.kind != "i" or not np.all(y > 0):
    return None
  return np.sign(x) * (np.abs(x) // y)  # rounds towards zero


def _remainder(params, x, y):
  x, y = np.asarray(x), np.asarray(y)
  if x.dtype.kind != "i" or not np.all(y > 0):
    return None
  return np.fmod(x, y)


def _in_float64(function):
  """The truth may come from either: both are far more exact than is asked."""

  def apply(params, x):
    return function(x) if np.asarray(x).dtype == np.float64 else None

  return apply


def _dot(params, x, y):
  """Sums of products in float32, or float64, in no order that is promised.

  Of float32 they are taken in float64 and rounded: in NumPy's library their
  error depends on the machine, and can be several times that of XLA's, which
  plain jnp has.
  """
  x, y = np.asarray(x), np.asarray(y)
  is_wide = {x.dtype, y.dtype} & {np.dtype("float32"), np.dtype("float64")}
  wide = np.float64 if is_wide else np.float32
  out = params["preferred_element_type"] or jnp.result_type(x, y)
  if (
    not _kind(x) == _kind(y) == "f"
    or jnp.finfo(out).bits > jnp.finfo(wide).bits
  ):
    return None
  (of_x, of_y), (batch_x, batch_y) = params["dimension_numbers"]
  # Plain strings of letters: what every version of NumPy's types knows.
  spec_x = string.ascii_lowercase[: x.ndim]
  letters = list(string.ascii_uppercase[: y.ndim])
  for i, j in zip((*of_x, *batch_x), (*of_y, *batch_y), strict=True):
    letters[j] = spec_x[i]
  spec_y = "".join(letters)
  free_x = [n for i, n in enumerate(spec_x) if i not in (*of_x, *batch_x)]
  free_y = [n for j, n in enumerate(spec_y) if j not in (*of_y, *batch_y)]
  result = "".join([*(spec_x[i] for i in batch_x), *free_x, *free_y])
  x, y = x.astype(wide), y.astype(wide)
  product = np.einsum(f"{spec_x},{spec_y}->{result}", x, y, optimize=True)
  return product.astype(out)


def _sum(params, x):
  # In float32 the order of the sum is plain jnp's error: XLA's own.
  x = np.asarray(x)
  return x.sum(axis=params["axes"]) if x.dtype == np.float64 else None


def _reduce(function, kinds="biuf"):
  def apply(params, x):
    x = np.asarray(x)
    if _kind(x) not in kinds or not x.size:
      return None
    return function.reduce(x, axis=params["axes"])

  return apply


def _split(params, x):
  ends = np.cumsum(params["sizes"])[:-1]
  return np.split(np.asarray(x), ends, axis=params["axis"])


def _pad(params, x, value):
  x = np.asarray(x)
  low, high, inner = zip(*params["padding_config"], strict=True)
  if any(inner) or min(*low, *high, 0) < 0:
    return None
  result = np.full(np.add(x.shape, np.add(low, high)), value, x.dtype)
  result[tuple(slice(i, i + n) for i, n in zip(low, x.shape, strict=True))] = x
  return result


EXACT = {
  "add": _elementwise(np.add),
  "add_any": _elementwise(np.add),
  "sub": _elementwise(np.subtract, "iuf"),
  "mul": _elementwise(np.multiply),
  "neg": _elementwise(np.negative, "if"),
  "max": _elementwise(np.maximum),
  "min": _elementwise(np.minimum),
  "abs": _elementwise(np.abs, "if"),
  "and": _elementwise(np.bitwise_and, "biu"),
  "or": _elementwise(np.bitwise_or, "biu"),
  "xor": _elementwise(np.bitwise_xor, "biu"),
  "not": _elementwise(np.bitwise_not, "biu"),
  "eq": _elementwise(np.equal),
  "ne": _elementwise(np.not_equal),
  "lt": _elementwise(np.less),
  "le": _elementwise(np.less_equal),
  "gt": _elementwise(np.greater),
  "ge": _elementwise(np.greater_equal),
  "div": _divide,
  "rem": _remainder,
  "shift_left": _shift(np.left_shift),
  "shift_right_arithmetic": _shift(np.right_shift),
  "shift_right_logical": _shift(_right_logical),
  "select_n": _select,
  "convert_element_type": _convert,
  "broadcast_in_dim": _broadcast,
  "slice": _slice,
  "iota": _iota,
  "squeeze": lambda params, x: np.squeeze(x, params["dimensions"]),
  "reshape": lambda params, x, *dynamic: (
    None if dynamic else np.reshape(x, params["new_sizes"])
  ),
  "expand_dims": lambda params, x: np.expand_dims(x, params["dimensions"]),
  "transpose": lambda params, x: np.transpose(x, params["permutation"]),
  "concatenate": lambda params, *xs: np.concatenate(
    xs, axis=params["dimension"]
  ),
  "tile": lambda params, x: np.tile(x, params["reps"]),
  "dot_general": _dot,
  "reduce_sum": _sum,
  "reduce_max": _reduce(np.maximum),
  "reduce_min": _reduce(np.minimum),
  "reduce_or": _reduce(np.logical_or, "b"),
  "reduce_and": _reduce(np.logical_and, "b"),
  "split": _split,
  "pad": _pad,
  "sign": _elementwise(np.sign, "if"),
  "is_finite": _elementwise(np.isfinite, "f"),
  "exp": _in_float64(np.exp),
  "exp2": _in_float64(np.exp2),
  "log": _in_float64(np.log),
  "tanh": _in_float64(np.tanh),
  "sin": _in_float64(np.sin),
  "cos": _in_float64(np.cos),
  "sqrt": _in_float64(np.sqrt),
  "reciprocal": _elementwise(np.reciprocal, "f"),
  "clamp": lambda params, low, x, high: np.clip(x, low, high),
  "bitcast_convert_type": _bitcast,
  "bitcast": lambda params, x: _bitcast(params, x, params["ty"]),
  "stop_gradient": lambda params, x: x,
  "pallas_gemma_guard": lambda params, x: x,
}
