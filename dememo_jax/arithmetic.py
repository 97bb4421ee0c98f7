"""What a network multiplies: the matrix products and convolutions of its traced program, inner programs included.

Which type a network computes in, how many operations it takes and which of its parameters are weights are all questions
about these products. The program is traced with shapes alone: nothing is computed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var

from dememo_jax import tree
from dememo_jax.types import Array, Params

DOTS = ("dot_general", "ragged_dot", "ragged_dot_general")
CONVOLUTIONS = ("conv_general_dilated", "image_convolution")  # the second is that of `convolution`

Source = frozenset[str] | None  # the names of the parameters that a value is made of; None: of the data as well


class Product(NamedTuple):
    """One matrix product or convolution; or one lookup of rows, an embedding, whose `flops` are 0."""

    types: tuple[Any, ...]  # of the factors, such as bfloat16; of a lookup none
    flops: int  # two a multiply-add; in a scan times its length, in a `while` loop counted once
    parameters: frozenset[str]  # names of the parameters that make up one of the factors, without the data
    full: bool  # False where float32 factors may be rounded (TF32, bfloat16 passes): asked for by the network


def products(apply: Callable[[Any, Array], Any], params: Params, x: Array) -> list[Product]:
    """The products of `apply(params, x)`, in the order of the program.

    Args:
        apply: any function of parameters and a batch x [B, ...].
        params: a nest of arrays, or of `jax.ShapeDtypeStruct`.
        x: a batch, or its shape.

    Returns:
        One Product for each matrix product, convolution and lookup of rows.

    Example:
        >>> sum(product.flops for product in products(apply, params, x))
    """
    given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)), (params, x))
    with jax.default_matmul_precision("highest"):  # what the network leaves open is asked for in full
        program = jax.make_jaxpr(apply)(*given).jaxpr
    found: list[Product] = []
    sources: list[Source] = [frozenset([name]) for name in tree.names(params)]
    _walk(program, sources + [None] * (len(program.invars) - len(sources)), 1, found.append)
    return found


def flops(found: list[Product]) -> int:
    """Operations of all products together, two a multiply-add."""
    return sum(product.flops for product in found)


def share(found: list[Product], dtype: Any) -> float:
    """Which part of the operations has both factors of that type; 1 where there is no operation."""
    own = sum(product.flops for product in found if set(product.types) == {jnp.dtype(dtype)})
    return own / flops(found) if flops(found) else 1.0


def _walk(program: Any, sources: list[Source], times: int, tell: Callable[[Any], None]) -> list[Source]:
    """Tell of the products of a program whose inputs have these sources; returns those of its outputs."""
    known: dict[Any, Source] = dict(zip(program.invars, sources))

    def source(variable: Any) -> Source:
        return known.get(variable, frozenset()) if isinstance(variable, Var) else frozenset()

    for equation in program.eqns:
        given = [source(v) for v in equation.invars]
        made = _inner(equation, given, times, tell)
        if made is None:
            _product(equation, given, times, tell)
            made = [_joined(given)] * len(equation.outvars)
        known.update(zip(equation.outvars, made))
    return [source(v) for v in program.outvars]


def _joined(sources: list[Source]) -> Source:
    known = [s for s in sources if s is not None]
    return frozenset().union(*known) if len(known) == len(sources) else None


def _inner(equation: Any, given: list[Source], times: int, tell) -> list[Source] | None:
    """Sources of the outputs of an equation that holds programs; None where it holds none."""
    parts = [p for value in equation.params.values() for p in (value if isinstance(value, tuple | list) else [value])]
    inner = [getattr(p, "jaxpr", p) for p in parts if hasattr(getattr(p, "jaxpr", p), "eqns")]
    if not inner:
        return None
    name = equation.primitive.name
    if name == "scan":
        return _scan(equation, inner[0], given, times, tell)
    if name == "cond":
        ends = [_walk(branch, given[1:], times, tell) for branch in inner]
        return [None if given[0] is None else _joined(list(each)) for each in zip(*ends)]
    if len(inner) == 1 and len(inner[0].invars) == len(given):
        return _walk(inner[0], given, times, tell)
    for program in inner:  # a while loop, or something unknown: what it makes may hold anything that it was given
        _walk(program, [_joined(given)] * len(program.invars), times, tell)
    return [_joined(given)] * len(equation.outvars)


def _scan(equation: Any, program: Any, given: list[Source], times: int, tell) -> list[Source]:
    """What is carried is joined with what comes out of the body, until nothing changes."""
    begin, ends = _carried(equation)
    while True:
        made = _walk(program, given, times, lambda product: None)
        joined = [_joined([old, new]) for old, new in zip(given[begin:ends], made)]
        if joined == given[begin:ends]:
            break
        given = [*given[:begin], *joined, *given[ends:]]
    return _walk(program, given, times * equation.params["length"], tell)


def _carried(equation: Any) -> tuple[int, int]:
    """Which inputs of a scan are carried: after the constants, before what is scanned over."""
    if "num_carry" in equation.params:
        begin = equation.params["num_consts"]
        return begin, begin + equation.params["num_carry"]
    constants, carried, _ = equation.params["ft_in"].unpack()  # since jax 0.12
    return len(constants), len(constants) + len(carried)


def _product(equation: Any, given: list[Source], times: int, tell) -> None:
    name = equation.primitive.name
    if name == "gather":
        if given[0]:
            tell(Product((), 0, given[0], True))
    elif name in DOTS + CONVOLUTIONS:
        left, right = (v.aval for v in equation.invars[:2])
        out = int(np.prod(equation.outvars[0].aval.shape))
        parameters: frozenset[str] = frozenset().union(*(s for s in given[:2] if s is not None))
        asked = str(equation.params.get("precision"))  # of our own primitive None: it exists on CPU alone, which rounds nothing
        full = name == "image_convolution" or "HIGHEST" in asked or "F32_F32_F32" in asked
        tell(Product((left.dtype, right.dtype), times * 2 * out * _depth(equation, left, right), parameters, full))


def _depth(equation: Any, left: Any, right: Any) -> int:
    """Multiply-adds of one number of the result."""
    name = equation.primitive.name
    if name == "dot_general":
        axes = equation.params["dimension_numbers"][0][0]
        return int(np.prod([left.shape[axis] for axis in axes]))
    if name == "image_convolution":
        return int(np.prod(right.shape[:-1]))
    if name == "conv_general_dilated":
        return right.size // right.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    return int(left.shape[-1])
