"""The document's slips E1 to E17: the printed form is wrong, the library's corrected one is right.

Where numbers can show it, central differences decide; where they cannot (E7, E8, E16, E17) a shape
or a condition does. Vectors are columns throughout, because 1-D arrays hide E5 and E7: there
`delta @ W` is already Wᵀ δ. docs/slips.md tells the same story in words.
"""

import math

import numpy as np
import pytest

from torch_nnmath import reference
from torch_nnmath.reference import central_difference


def column(*entries):
    return np.array(entries, dtype=float).reshape(-1, 1)


# The document's two nodes, with the numbers that docs/slips.md quotes.
A, T_ONE_HOT, B0 = column(0.7, 0.2), column(1, 0), column(0, 0)
W2 = np.array([[1.0, 2.0], [3.0, 4.0]])
Z_P, P = column(0, math.log(3)), column(0.25, 0.75)  # P = softmax(Z_P)

# Layers of 4, 3 and 2 nodes, because equal sizes hide E5, E10, E12 and E13, and targets that do not
# sum to 1, because a sum of 1 hides E6.
rng = np.random.default_rng(17)
X = rng.normal(size=(4, 1))
WEIGHTS = [rng.normal(size=(3, 4)), rng.normal(size=(2, 3))]
BIASES = [rng.normal(size=(3, 1)), rng.normal(size=(2, 1))]
TARGET, TARGET_3 = column(0.9, 0.4), column(0.5, 2, 0.25)


@pytest.fixture(params=["element", "matrix"])
def form(request):
    """Picks one form of a formula, so that both are held to the truth."""
    return lambda forms: getattr(forms, request.param)


def agree(found, truth):
    assert np.shape(found) == np.shape(truth)
    np.testing.assert_allclose(found, truth, rtol=0, atol=4e-9)


def differ(printed, truth):
    """Same shape, so that the numbers alone tell them apart."""
    assert np.shape(printed) == np.shape(truth)
    assert np.abs(np.subtract(printed, truth)).max() >= 0.01


def jacobians(form, *inputs, **options):
    """The derivative in every input, of shape value.shape + input.shape, pulled back row by row."""
    value = form.value(*inputs, **options)
    rows = []
    for i in range(np.size(value)):
        g = np.zeros(np.shape(value))
        g.flat[i] = 1
        rows.append(form.pullback(g, *inputs, **options))
    return [np.stack(d).reshape(np.shape(value) + d[0].shape) for d in zip(*rows, strict=True)]


def network(form, weights, biases, x, t):
    """The loss of a sigmoid network and its gradients, dW and db layer by layer (F12, F4)."""
    net, loss = form(reference.FEEDFORWARD), form(reference.SQUARED_ERROR)
    a = net.value(x, weights, biases)
    da, _ = loss.pullback(1.0, a, t)
    return loss.value(a, t), *net.pullback(da, x, weights, biases)


def first_weight_difference(weights, biases, x, t):
    """dc/dW of the first layer by central differences."""

    def c(W):
        a = reference.FEEDFORWARD.matrix.value(x, [W, *weights[1:]], biases)
        return reference.SQUARED_ERROR.matrix.value(a, t)

    return central_difference(c, weights[0])


def test_e01_sign_of_squared_error(form):
    loss = form(reference.SQUARED_ERROR)
    truth = central_difference(lambda a: loss.value(a, T_ONE_HOT), A)
    printed = T_ONE_HOT - A
    agree(truth, column(-0.3, 0.2))
    differ(printed, truth)
    da, _ = loss.pullback(1.0, A, T_ONE_HOT)
    agree(da, truth)

    here = loss.value(A, T_ONE_HOT)
    assert loss.value(A - 0.1 * printed, T_ONE_HOT) > here > loss.value(A - 0.1 * da, T_ONE_HOT)


def test_e01_sign_through_the_layer(form):
    layer, x = form(reference.SIGMOID_SQUARED_ERROR), column(0.5, -1, 2)
    W, b = WEIGHTS[1], BIASES[1]
    truth = central_difference(lambda W: layer.value(x, W, b, TARGET), W)
    a = reference.SIGMOID.matrix.value(W @ x + b)
    printed = ((TARGET - a) * (1 - a) * a) @ x.T
    differ(printed, truth)
    agree(layer.pullback(1.0, x, W, b, TARGET)[1], truth)


def test_e02_squared_error_is_a_scalar(form):
    def printed(a):
        return 0.5 * ((T_ONE_HOT - a) * (T_ONE_HOT - a))

    agree(printed(A), column(0.045, 0.02))
    assert central_difference(printed, A).shape == (2, 1, 2, 1)

    loss = form(reference.SQUARED_ERROR)
    agree(loss.value(A, T_ONE_HOT), 0.065)
    truth = central_difference(lambda a: loss.value(a, T_ONE_HOT), A)
    agree(loss.pullback(1.0, A, T_ONE_HOT)[0], truth)


@pytest.mark.parametrize("k", [0, 1])
def test_e03_sum_over_inputs(form, k):
    def printed(W):
        return A[k] * W[:, [k]] + B0

    affine = form(reference.AFFINE)
    agree(affine.value(A, W2, B0), column(1.1, 2.9))
    agree(printed(W2), [column(0.7, 2.1), column(0.4, 0.8)][k])
    differ(printed(W2), affine.value(A, W2, B0))

    truth = central_difference(lambda W: affine.value(A, W, B0), W2)
    differ(central_difference(printed, W2), truth)
    agree(jacobians(affine, A, W2, B0)[1], truth)


def test_e03_sum_over_inputs_of_another_number(form):
    W, b = WEIGHTS[0], BIASES[0]
    z = [sum(W[j, k] * X[k, 0] for k in range(4)) + b[j, 0] for j in range(3)]
    agree(form(reference.AFFINE).value(X, W, b), column(*z))
    for k in range(4):
        differ(X[k] * W[:, [k]] + b, column(*z))


@pytest.mark.parametrize(("x", "W", "b"), [(A, W2, B0), (X, WEIGHTS[0], BIASES[0])])
def test_e04_derivatives_in_weights_and_biases(form, x, W, b):
    affine = form(reference.AFFINE)
    dz_dW = central_difference(lambda W: affine.value(x, W, b), W)
    dz_db = central_difference(lambda b: affine.value(x, W, b), b)
    m, n = W.shape
    assert dz_dW.shape == (m, 1, m, n)
    assert dz_db.shape == (m, 1, m, 1)
    agree(dz_dW[0, 0, 1, 0], 0)  # printed: a_0
    agree(dz_db[0, 0, 1, 0], 0)  # printed: 1

    differ(np.broadcast_to(x[:, 0], (m, 1, m, n)), dz_dW)
    differ(np.ones((m, 1, m, 1)), dz_db)
    _, dW, db = jacobians(affine, x, W, b)
    agree(dW, dz_dW)
    agree(db, dz_db)


def test_e05_transpose_in_the_layer_before(form):
    delta = column(1, 0)
    truth = central_difference(lambda a: (delta.T @ W2 @ a).item(), A)
    with pytest.raises(ValueError, match="mismatch"):
        delta @ W2  # as printed
    agree(W2 @ delta, column(1, 3))  # mended the other way round
    agree(truth, column(1, 2))
    differ(W2 @ delta, truth)
    agree(form(reference.AFFINE).pullback(delta, A, W2, B0)[0], truth)


def test_e05_transpose_in_a_network(form):
    _, _, dW, db = network(form, WEIGHTS, BIASES, X, TARGET)
    agree(dW[0], first_weight_difference(WEIGHTS, BIASES, X, TARGET))

    a = reference.SIGMOID.matrix.value(WEIGHTS[0] @ X + BIASES[0])
    slope = a * (1 - a)
    for printed in (
        lambda: ((db[1] @ WEIGHTS[1]) * slope) @ X,
        lambda: ((WEIGHTS[1] @ db[1]) * slope) @ X,
        lambda: ((WEIGHTS[1].T @ db[1]) * slope) @ X,
    ):
        with pytest.raises(ValueError, match="mismatch"):
            printed()
    agree(((WEIGHTS[1].T @ db[1]) * slope) @ X.T, dW[0])

    # Row against column is no error: NumPy makes it (3, 3), which is no gradient in z.
    assert ((db[1].T @ WEIGHTS[1]) * slope).shape == (3, 3)


@pytest.mark.parametrize("beta", [math.e, 2.0])
def test_e06_targets_need_not_sum_to_one(form, beta):
    loss = form(reference.CROSS_ENTROPY)
    t = column(1, 1)
    truth = central_difference(lambda z: loss.value(z, t, beta=beta), Z_P)
    agree(truth, column(-0.5, 0.5) / math.log(beta))
    differ((P - t) / math.log(beta), truth)  # (-.75, -.25) in base e
    agree(loss.pullback(1.0, Z_P, t, beta=beta)[0], truth)

    # With targets that do sum to 1 the printed form is right.
    truth = central_difference(lambda z: loss.value(z, T_ONE_HOT, beta=beta), Z_P)
    agree((P - T_ONE_HOT) / math.log(beta), truth)


def test_e06_in_the_weight_gradient(form):
    head, W, b = form(reference.LINEAR_CROSS_ENTROPY), WEIGHTS[0], BIASES[0]
    truth = central_difference(lambda W: head.value(X, W, b, TARGET_3), W)
    a = reference.SOFTMAX.matrix.value(W @ X + b)
    differ((a - TARGET_3) @ X.T, truth)
    agree(head.pullback(1.0, X, W, b, TARGET_3)[1], truth)


@pytest.mark.parametrize(
    ("x", "W", "b", "t"),
    [(A, W2, Z_P - W2 @ A, T_ONE_HOT), (X, WEIGHTS[0], BIASES[0], TARGET_3)],
)
def test_e07_gradient_of_the_weights_is_a_column_times_a_row(form, x, W, b, t):
    head = form(reference.LINEAR_CROSS_ENTROPY)
    truth = central_difference(lambda W: head.value(x, W, b, t), W)
    _, dW, dz, _ = head.pullback(1.0, x, W, b, t)
    agree(dz @ x.T, truth)
    agree(dW, truth)

    z = W @ x + b
    a = reference.SOFTMAX.matrix.value(z)
    row = (-t / a).T @ reference.SOFTMAX_JACOBIAN.matrix.value(z)
    agree(row, dz.T)
    assert row.shape == (1, len(z))  # printed as a column
    with pytest.raises(ValueError, match="mismatch"):
        row.T @ x  # dz/dW is printed as a column, too


def test_e07_row_times_column_is_a_number():
    row = (-T_ONE_HOT / P).T @ reference.SOFTMAX_JACOBIAN.matrix.value(Z_P)
    assert (row @ A).shape == (1, 1)
    assert (row.T @ A.T).shape == W2.shape


def test_e08_chain_rule():
    def chained(z):
        return math.e ** (z**2)

    def added(z):
        return math.e**z + z**2

    f_prime, g_prime = math.exp, lambda z: 2 * z  # f = e^z, g = z²
    one = np.array(1.0)
    printed = f_prime(1) + g_prime(1)
    agree(printed, central_difference(added, one))  # right for the sum f + g
    differ(printed, central_difference(chained, one))
    agree(f_prime(1**2) * g_prime(1), central_difference(chained, one))


def test_e08_chain_rule_of_the_library(form):
    # F5 after F7: derivatives are multiplied, and F13 is their product.
    z, t = column(0.3, -1, 0.8), TARGET_3
    softmax, loss = form(reference.SOFTMAX), form(reference.CATEGORICAL_CROSS_ENTROPY)
    truth = central_difference(lambda z: loss.value(softmax.value(z), t), z)
    da, _ = loss.pullback(1.0, softmax.value(z), t)
    (dz,) = softmax.pullback(da, z)
    agree(dz, truth)
    agree(form(reference.CROSS_ENTROPY).pullback(1.0, z, t)[0], truth)
    (sums,) = softmax.pullback(np.ones((3, 1)), z)
    differ(da + sums, truth)  # f' + g'


@pytest.mark.parametrize("z", [Z_P, column(0.3, -1, 0.8)])
def test_e09_softmax_jacobian_as_a_product(form, z):
    truth = central_difference(reference.SOFTMAX.matrix.value, z)[:, 0, :, 0]
    a, one, identity = reference.SOFTMAX.matrix.value(z), np.ones_like(z), np.eye(len(z))
    printed = a.T @ (identity - one @ a.T)
    agree(printed, np.zeros((1, len(z))))
    assert printed.shape != truth.shape
    differ(np.broadcast_to(printed, truth.shape), truth)
    agree(np.diagflat(a) @ (identity - one @ a.T), truth)
    agree(form(reference.SOFTMAX_JACOBIAN).value(z), truth)


def test_e09_numbers_of_the_page(form):
    agree(form(reference.SOFTMAX_JACOBIAN).value(Z_P), 0.1875 * np.array([[1, -1], [-1, 1]]))


def test_e10_layout_of_the_jacobian(form):
    def layout_of_appendix_b(f, x):
        """dy_j/dx_i in row i, column j."""
        partials = central_difference(f, x)
        m, n = len(partials), len(x)
        return np.array([[partials[j, 0, i, 0] for j in range(m)] for i in range(n)])

    affine = form(reference.AFFINE)
    printed = layout_of_appendix_b(lambda a: affine.value(a, W2, B0), A)
    agree(printed, np.array([[1.0, 3.0], [2.0, 4.0]]))
    differ(printed, W2)  # section 4: dz/da = W
    agree(jacobians(affine, A, W2, B0)[0][:, 0, :, 0], W2)

    W, b = WEIGHTS[0], BIASES[0]
    assert layout_of_appendix_b(lambda a: affine.value(a, W, b), X).shape == (4, 3)
    agree(central_difference(lambda a: affine.value(a, W, b), X)[:, 0, :, 0], W)
    agree(jacobians(affine, X, W, b)[0][:, 0, :, 0], W)

    # Softmax alone cannot tell: its Jacobian is symmetric.
    printed = layout_of_appendix_b(reference.SOFTMAX.matrix.value, Z_P)
    agree(printed, form(reference.SOFTMAX_JACOBIAN).value(Z_P))


@pytest.mark.parametrize("z", [Z_P, column(0.3, -1, 0.8)])
def test_e11_jacobian_is_not_a_sum_of_partials(form, z):
    truth = central_difference(reference.SOFTMAX.matrix.value, z)[:, 0, :, 0]
    printed = truth.sum(axis=1, keepdims=True)
    agree(printed, np.zeros_like(z))
    differ(np.broadcast_to(printed, truth.shape), truth)
    agree(jacobians(form(reference.SOFTMAX), z)[0][:, 0, :, 0], truth)
    agree(form(reference.SOFTMAX_JACOBIAN).value(z), truth)


def test_e11_gradient_is_not_a_sum_of_partials():
    truth = central_difference(lambda v: (v[0] * v[1]).item(), column(2, 3))
    agree(truth, column(3, 2))
    printed = truth.sum()  # f'(x) + f'(y)
    agree(printed, 5.0)
    differ(np.broadcast_to(printed, truth.shape), truth)


def test_e12_counts_and_layouts(form):
    n = len(A)  # "the number of nodes"
    with pytest.raises(IndexError):
        sum(W2[0, k] * A[k, 0] for k in range(n + 1))  # from 0 to n

    affine = form(reference.AFFINE)
    z = affine.value(A, W2, B0)
    agree(z, column(1.1, 2.9))
    with pytest.raises(ValueError, match="mismatch"):
        A @ W2  # section 1 on a column
    agree(A.T @ W2, np.array([[1.3, 2.2]]))  # and on a row
    differ(A.T @ W2, z.T)
    agree(A.T @ W2.T, z.T)

    W, b = WEIGHTS[0], BIASES[0]  # not square
    with pytest.raises(ValueError, match="mismatch"):
        X.T @ W + b.T
    agree(X.T @ W.T + b.T, affine.value(X, W, b).T)


def test_e13_input_of_the_layer_before(form):
    x, t, zero = column(2), column(1), column(0)
    weights, biases = [column(0.5), column(1)], [zero, zero]
    truth = first_weight_difference(weights, biases, x, t)
    _, _, dW, db = network(form, weights, biases, x, t)
    a = reference.SIGMOID.matrix.value(weights[0] @ x)
    printed = db[0] @ a.T  # a_q^{L-1}; the sign (E1) is mended
    assert round(truth.item(), 4) == -0.0280
    assert round(printed.item(), 4) == -0.0102
    differ(printed, truth)
    agree(dW[0], truth)


def test_e13_with_layers_of_different_sizes(form):
    truth = first_weight_difference(WEIGHTS, BIASES, X, TARGET)
    _, _, dW, db = network(form, WEIGHTS, BIASES, X, TARGET)
    a = reference.SIGMOID.matrix.value(WEIGHTS[0] @ X + BIASES[0])
    assert (db[0] @ a.T).shape == (3, 3) != truth.shape
    differ(db[0] @ a.T, truth[:, :3])
    agree(dW[0], truth)


@pytest.mark.parametrize("z", [Z_P, column(0.3, -1, 0.8)])
def test_e14_sigmoid_derivative_is_a_diagonal_matrix(form, z):
    sigmoid = form(reference.SIGMOID)
    truth = central_difference(sigmoid.value, z)[:, 0, :, 0]
    a = sigmoid.value(z)
    printed = a * (1 - a)
    assert printed.shape != truth.shape
    differ(np.broadcast_to(printed, truth.shape), truth)
    agree(np.diagflat(printed), truth)
    agree(jacobians(sigmoid, z)[0][:, 0, :, 0], truth)

    # The vector wants ∘: with the matrix product that softmax's Jacobian wants, it has no meaning.
    g = column(1, -2, 3)[: len(z)]
    with pytest.raises(ValueError, match="mismatch"):
        printed @ g
    agree(sigmoid.pullback(g, z)[0], printed * g)


def test_e14_numbers_of_the_page(form):
    agree(jacobians(form(reference.SIGMOID), Z_P)[0][:, 0, :, 0], np.diag([0.25, 0.1875]))


def test_e15_leaving_out_one_over_n_changes_the_steps(form):
    n, rate = 4, 2.5
    loss, t = form(reference.SQUARED_ERROR), column(1, 0, 0.5, 2)
    start = np.zeros((n, 1))

    def mean_squared_error(a):
        return np.mean((t - a) ** 2)

    truth = central_difference(mean_squared_error, start)
    da, _ = loss.pullback(1.0, start, t)
    differ(da, truth)
    agree(2 / n * da, truth)

    descents = {}
    for name, scale in (("mean", 2 / n), ("sum", 1)):
        a = start
        for _ in range(40):
            a = a - rate * scale * loss.pullback(1.0, a, t)[0]
        descents[name] = loss.value(a, t)
    assert descents["mean"] < 1e-12 < 1e6 < descents["sum"]


def test_e16_base_above_one_and_probabilities_above_zero(form):
    a, t = column(0.7, 0.2, 0.1), column(1, 0, 0)
    loss = form(reference.CATEGORICAL_CROSS_ENTROPY)
    truth = central_difference(lambda a: loss.value(a, t, beta=0.5), a)
    da, _ = loss.pullback(1.0, a, t, beta=0.5)
    assert round(loss.value(a, t, beta=0.5), 3) == -0.515  # a loss below 0
    np.testing.assert_allclose(truth, column(2.06, 0, 0), atol=0.005)
    agree(-(t / a) / math.log(0.5), truth)  # the printed derivative holds for any base ...
    agree(da, truth)

    # ... but a step against it makes the true class likelier only for β > 1.
    for beta, likelier in ((math.e, True), (2.0, True), (0.5, False)):
        da, _ = loss.pullback(1.0, a, t, beta=beta)
        assert ((a - 0.01 * da)[0, 0] > a[0, 0]) == likelier

    with np.errstate(invalid="ignore"):
        outside = loss.value(column(-0.1, 0.6, 0.5), t)  # in ℝᴺ, not in the domain
    assert math.isnan(outside)


def test_e17_softmax_depends_on_every_input(form):
    # dS(z_0)/dz_1 and dg(z_0)/dz_1, though neither is written with a z_1.
    S = central_difference(form(reference.SOFTMAX).value, Z_P)[:, 0, :, 0]
    agree(S[0, 1], -0.1875)
    agree(jacobians(form(reference.SOFTMAX), Z_P)[0][:, 0, :, 0], S)
    agree(central_difference(lambda z: np.exp(z).sum(), Z_P), np.exp(Z_P))


def test_e17_law_of_independence():
    # "de^z/de^x = 0" holds for k ≠ j only: on the diagonal de^{z_j}/dz_j is e^{z_j}.
    partials = central_difference(np.exp, Z_P)[:, 0, :, 0]
    differ(np.zeros((2, 2)), partials)
    agree(partials, np.diag([1.0, 3.0]))


def test_e17_division_is_elementwise(form):
    # t / a and 1 / (1 + e^-z) in matrix notation: no inverse of a column exists.
    with pytest.raises(np.linalg.LinAlgError):
        T_ONE_HOT @ np.linalg.inv(A)
    loss, t = form(reference.CATEGORICAL_CROSS_ENTROPY), TARGET
    truth = central_difference(lambda a: loss.value(a, t), A)
    agree(-column(t[0, 0] / A[0, 0], t[1, 0] / A[1, 0]), truth)
    agree(loss.pullback(1.0, A, t)[0], truth)


def test_e17_dots_hide_minus_signs(form):
    z, t = column(0.3, -1, 0.8, 0.1), column(0.5, 2, 0.25, 1)
    loss = form(reference.CROSS_ENTROPY)
    truth = central_difference(lambda z: loss.value(z, t), z)
    a = reference.SOFTMAX.matrix.value(z)

    def first_row(sign):
        """5.2.2: -(t_0 (1 - a_0) - t_1 a_0 + ⋯ - t_n a_0), with that sign for the terms in ⋯."""
        ends = t[0] * (1 - a[0]) - t[1] * a[0] - t[3] * a[0]
        return -(ends + sign * t[2] * a[0])

    differ(first_row(+1), truth[0])
    agree(first_row(-1), truth[0])
    agree(loss.pullback(1.0, z, t)[0], truth)
