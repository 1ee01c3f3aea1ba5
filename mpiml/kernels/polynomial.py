"""exp, log, tanh and the normal distribution of a vector: polynomials, and what brings their arguments into range.

Each function is inlined into the kernel that calls it; it has no branches, so all lanes take the same steps. The
polynomials and quotients are minimax (Remez' algorithm) for the relative error. Errors below are the largest seen against
50 digits, in units in the last place (ulp), over the range where the result is a normal number.

============  =======  =======  =============================================================================
function      float32  float64  method
============  =======  =======  =============================================================================
exp           1.0      1.0      2**n * exp(r), r at most log(2) / 2 from 0 (Cody and Waite 1980)
2**x, x <= 0  0.9      0.9      as exp, without a remainder to compute; in attention, whose scores are in units of log(2)
log           1.0      1.0      n * log(2) + log(m), m near 1: log((1 + s) / (1 - s)), in the sum of fdlibm
tanh          3.2      3.1      e / (e + 2) with e = exp(2 x) - 1, free of cancellation
sigmoid       2.5      2.5      1 / (1 + e) or, where x < 0, e / (1 + e), with e = exp(-abs(x)) that cannot overflow
normal_tail   5.5      6.1      exp(-a**2 / 2) p(a) / q(a), as Cody 1969 has erfc; gelu: 6.5 and 6.9
============  =======  =======  =============================================================================
"""

from llvmlite import ir
from numba.extending import intrinsic

from .jit import vector_function
from .registers import Vector, emit_call, float_fields, llvm_vector
from .simd import copysign, exponent, fabs, fma, maximum, minimum, power_of_two, rint, select

# Constants and coefficients (highest power first) by the bits of a float.
_NUMBERS = {
    "ln2": {32: 0.6931471824645996, 64: 0.6931471805599453},
    "rest of ln2": {32: -1.904654299957768e-09, 64: 2.3190468138462996e-17},
    "1 / ln2": {32: 1.4426950408889634, 64: 1.4426950408889634},
    "largest exp": {32: 89.0, 64: 710.0},  # from here on exp is infinite
    "smallest exp": {32: -104.0, 64: -746.0},  # from here on it is 0
    "exp of negative is 0": {32: -88.0, 64: -709.0},  # there 2**n has the exponent field 0, that of 0
    "2** is 0": {32: -127.0, 64: -1023.0},  # as above
    "large": {32: 1.5 * 2.0**23 + 127, 64: 1.5 * 2.0**52 + 1023},  # floats near it are integers: see simd.power_of_two
    "smallest normal": {32: 2.0**-126, 64: 2.0**-1022},
    "to normal": {32: 2.0**32, 64: 2.0**64},  # a factor that makes normal numbers of subnormal ones,
    "its exponent": {32: 32.0, 64: 64.0},  # which is 2 to this power
    "half of sqrt 2": {32: 0.5**0.5, 64: 0.5**0.5},
    "tanh is 1": {32: 10.0, 64: 20.0},  # to the last bit, from here on
    "tail is 0": {32: 13.2687, 64: 37.6587},  # standard deviations from here on: there n is the least that leaves e at 0
    "1 / sqrt(2 pi)": {32: 0.3989422804014327, 64: 0.3989422804014327},
    "infinity": {32: float("inf"), 64: float("inf")},
    "-infinity": {32: -float("inf"), 64: -float("inf")},
    "nan": {32: float("nan"), 64: float("nan")},
}
_POLYNOMIALS = {
    "expm1(x) / x": {
        32: [0.00138889511, 0.00836910103, 0.0416671357, 0.166665059, 0.499999981, 1.00000001],
        64: [2.505220317348055e-08, 2.7626310481816585e-07, 2.755741457705554e-06, 2.4801504477521008e-05,
             0.0001984126970755668, 0.0013888888932367283, 0.008333333333397865, 0.04166666666657356, 0.16666666666666563,
             0.5000000000000006, 1.0],
    },
    "(2**x - 1) / x": {
        32: [0.000149916150, 0.00133833794, 0.00961934269, 0.0555037121, 0.240226440, 0.693147186],
        64: [4.3569461317816247e-10, 7.070750538307045e-09, 1.0178638579971146e-07, 1.3215451945050237e-06,
             1.5252732645146488e-05, 0.00015403530426085779, 0.0013333558147418795, 0.00961812910761637,
             0.05550410866481851, 0.24022650695910083, 0.6931471805599453],
    },
    "log": {  # (log((1 + s) / (1 - s)) / s - 2) / s**2, in s**2
        32: [0.295815494, 0.399887412, 0.666666852],
        64: [0.14618234058700638, 0.15331574013965243, 0.18182893681332452, 0.2222221107032254, 0.2857142862638524,
             0.3999999999989856, 0.666666666666667],
    },
    "exp(-x / 2)": {
        32: [-0.000259303172, 0.00261972728, -0.0208344675, 0.124997222, -0.49999981, 1.0],
        64: [-1.2204238468986442e-11, 2.6984734858472415e-10, -5.3823482428722012e-9, 9.688080593356527e-8,
             -1.550099174347701e-6, 2.1701388986581518e-5, -0.00026041666667375144, 0.0026041666666557541,
             -0.020833333333332708, 0.12500000000000044, -0.50000000000000002, 1.0],
    },
    "tail above": {  # p and q of p(a) / q(a) = (1 - cdf(a)) / exp(-a**2 / 2)
        32: [0.00401766471, 0.0399670468, 0.181255752, 0.435617099, 0.500000038],
        64: [1.3704467721869708e-6, 3.6911218460102963e-5, 0.00048663808775276542, 0.0040631598306853515,
             0.02349920553205416, 0.097295778778616064, 0.28843295096032752, 0.59278595438536766, 0.77400350385247697,
             0.49999999999999997],
    },
    "tail below": {
        32: [0.0100706474, 0.10018993, 0.464245684, 1.19427168, 1.66911905, 1.0],
        64: [3.4352006280523556e-6, 9.2522703840795917e-5, 0.001223255991120061, 0.01027735400769022, 0.060116723861149259,
             0.25388412362641194, 0.7794929289319205, 1.7103298356016264, 2.5573225726010363, 2.3458915685078099, 1.0],
    },
}


def _constant(kind, value):
    return ir.Constant(llvm_vector(kind), [value] * kind.lanes)


@intrinsic(prefer_literal=True)
def number(typing, like, text):
    """The vector of a constant, in the precision of the vector ``like``: one of the table, or what ``text`` reads as."""
    if isinstance(like, Vector):
        bits, name = like.dtype.bitwidth, text.literal_value
        value = _NUMBERS[name][bits] if name in _NUMBERS else float(name)
        return like(like, text), lambda context, builder, signature, args: _constant(like, value)


@intrinsic(prefer_literal=True)
def polynomial(typing, x, name):
    """The polynomial of the table at ``x``, by Horner's rule."""
    if isinstance(x, Vector):
        first, *others = _POLYNOMIALS[name.literal_value][x.dtype.bitwidth]

        def code(context, builder, signature, args):
            value = _constant(x, first)
            for coefficient in others:
                value = emit_call(builder, "fma", x, value, args[0], _constant(x, coefficient))
            return value

        return x(x, name), code


@intrinsic
def _last_bits_as_exponent(typing, x):
    """The number whose sign and exponent are the last bits of x, 9 in float32, and whose fraction is 0."""
    def code(context, builder, signature, args):
        fraction, _ = float_fields(x.dtype)
        integers = ir.VectorType(ir.IntType(x.dtype.bitwidth), x.lanes)
        moved = builder.shl(builder.bitcast(args[0], integers), ir.Constant(integers, [fraction] * x.lanes))
        return builder.bitcast(moved, args[0].type)

    return x(x), code


@vector_function
def _parts_of_exp(x):
    """n, r and q with exp(x) = 2**n * (1 + r * q) and |r| <= log(2) / 2."""
    n = rint(x * number(x, "1 / ln2"))
    # x - n log(2): the fma takes the product as it is, unrounded, and the rest makes up for the rounding of log(2) itself.
    r = fma(n, number(x, "-1") * number(x, "ln2"), x)
    r = fma(n, number(x, "-1") * number(x, "rest of ln2"), r)
    return n, r, polynomial(r, "expm1(x) / x")


@vector_function
def _scaled(x, n):
    """x * 2**n, in two steps: 2**n may lie as far as twice beyond the range of normal exponents."""
    half = rint(n * number(x, "0.5"))
    return x * power_of_two(half) * power_of_two(n - half)


@vector_function
def exp(x):
    """e**x; 0 and infinity beyond the range of the dtype, with gradual underflow."""
    x = minimum(number(x, "largest exp"), maximum(number(x, "smallest exp"), x))
    n, r, q = _parts_of_exp(x)
    return _scaled(fma(q, r, number(x, "1")), n)


@vector_function
def exp_of_negative(x):
    """e**x for x <= 0, cheaper than exp; 0 where that is below the normal numbers."""
    x = maximum(number(x, "exp of negative is 0"), x)
    biased = fma(x, number(x, "1 / ln2"), number(x, "large"))  # rounds to n, and leaves n + bias in the last bits
    n = biased - number(x, "large")
    r = fma(n, number(x, "-1") * number(x, "ln2"), x)
    r = fma(n, number(x, "-1") * number(x, "rest of ln2"), r)
    return fma(polynomial(r, "expm1(x) / x"), r, number(x, "1")) * _last_bits_as_exponent(biased)


@vector_function
def two_to_negative(x):
    """2**x for x <= 0, a third cheaper than exp_of_negative; 0 below the normal numbers, but for the first half octave."""
    x = maximum(number(x, "2** is 0"), x)
    biased = x + number(x, "large")
    r = x - (biased - number(x, "large"))  # exact
    return fma(polynomial(r, "(2**x - 1) / x"), r, number(x, "1")) * _last_bits_as_exponent(biased)


@vector_function
def log(x):
    """The natural logarithm: -infinity of 0, NaN of what is negative."""
    subnormal = x < number(x, "smallest normal")
    y = select(subnormal, x * number(x, "to normal"), x)
    n = exponent(y * number(x, "half of sqrt 2")) + number(x, "1")  # so that y / 2**n is in sqrt(1/2) .. sqrt(2)
    f = _scaled(y, number(x, "0") - n) - number(x, "1")
    n = n - select(subnormal, number(x, "its exponent"), number(x, "0"))
    s = f / (number(x, "2") + f)
    square = s * s
    half = number(x, "0.5") * f * f
    small = fma(n, number(x, "rest of ln2"), s * fma(square, polynomial(square, "log"), half))
    y = fma(n, number(x, "ln2"), f - (half - small))
    y = select(x == number(x, "infinity"), x, y)
    y = select(x == number(x, "0"), number(x, "-infinity"), y)
    return select(x < number(x, "0"), number(x, "nan"), y)


@vector_function
def tanh(x):
    """The hyperbolic tangent."""
    a = minimum(number(x, "tanh is 1"), fabs(x))
    n, r, q = _parts_of_exp(a + a)
    scale = power_of_two(n)
    e = fma(q * r, scale, scale - number(x, "1"))
    return copysign(e / (e + number(x, "2")), x)


@vector_function
def sigmoid(x):
    """1 / (1 + exp(-x)); 0 where that is below the normal numbers."""
    e = exp_of_negative(number(x, "0") - fabs(x))
    return select(x > number(x, "0"), number(x, "1"), e) / (number(x, "1") + e)


@vector_function
def normal_tail(x):
    """The size a of x, at most where the others are 0; the probability of a normal value above a; exp(-a**2 / 2).

    All coefficients of p and q are positive, so no digits cancel; a**2 is taken with the rest of its rounding, which counts
    a hundred times in the tail. Multiply-adds are what takes the time here, 21 of them, so p and q are polynomials in a itself:
    to bring it into a finite range first, as (a - c) / (a + c), would add to them.
    """
    a = minimum(number(x, "tail is 0"), fabs(x))
    square = a * a
    rest = fma(a, a, number(x, "0") - square)
    biased = fma(square, number(x, "-0.5") * number(x, "1 / ln2"), number(x, "large"))  # as in exp_of_negative
    n = biased - number(x, "large")
    rest = fma(n, number(x, "2") * number(x, "rest of ln2"), rest)
    r = fma(n, number(x, "2") * number(x, "ln2"), square) + rest
    e = polynomial(r, "exp(-x / 2)") * _last_bits_as_exponent(biased)
    return a, e * polynomial(a, "tail above") / polynomial(a, "tail below"), e
