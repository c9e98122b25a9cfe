"""The document's slips E1 to E17: the printed form is wrong, the library's corrected one is right.

Most tests compare both with central differences. E7, E8, E16 and E17 are not visible in numbers;
their tests use a shape or a condition. All vectors are columns, because 1-D arrays hide E5 and E7:
there `delta @ W` is already Wᵀ δ. docs/slips.md explains each slip.
"""

import math

import numpy as np
import pytest

from torch_nnmath import reference
from torch_nnmath.reference import central_difference


def column(*entries):
    return np.array(entries, dtype=float).reshape(-1, 1)


# The document's layer of two nodes, with the numbers of docs/slips.md.
A, T_ONE_HOT, B0 = column(0.7, 0.2), column(1, 0), column(0, 0)
W2 = np.array([[1.0, 2.0], [3.0, 4.0]])
Z_P, P = column(0, math.log(3)), column(0.25, 0.75)  # P = softmax(Z_P)

# Layers of 4, 3 and 2 nodes, because equal sizes hide E5, E10, E12 and E13. The targets do not sum
# to 1, because a sum of 1 hides E6.
rng = np.random.default_rng(17)
X = rng.normal(size=(4, 1))
WEIGHTS = [rng.normal(size=(3, 4)), rng.normal(size=(2, 3))]
BIASES = [rng.normal(size=(3, 1)), rng.normal(size=(2, 1))]
TARGET, TARGET_3 = column(0.9, 0.4), column(0.5, 2, 0.25)


@pytest.fixture(params=["element", "matrix"])
def select_form(request):
    """Returns a function that selects one form of a formula; each test runs on both."""
    return lambda forms: getattr(forms, request.param)


def assert_equal(actual, expected):
    assert np.shape(actual) == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4e-9)


def assert_different(printed, expected):
    """Asserts that the shapes are equal and the numbers are not."""
    assert np.shape(printed) == np.shape(expected)
    assert np.abs(np.subtract(printed, expected)).max() >= 0.01


def compute_jacobians(form, *inputs, **options):
    """Computes the Jacobian in each input, of shape value.shape + input.shape, row by row."""
    value = form.value(*inputs, **options)
    rows = []
    for i in range(np.size(value)):
        g = np.zeros(np.shape(value))
        g.flat[i] = 1
        rows.append(form.pullback(g, *inputs, **options))
    return [np.stack(d).reshape(np.shape(value) + d[0].shape) for d in zip(*rows, strict=True)]


def compute_network_gradients(select_form, weights, biases, x, t):
    """Computes loss, dx, dW and db of a sigmoid network; dW and db by layers (F12, F4)."""
    net, loss = select_form(reference.FEEDFORWARD), select_form(reference.SQUARED_ERROR)
    a = net.value(x, weights, biases)
    da, _ = loss.pullback(1.0, a, t)
    return loss.value(a, t), *net.pullback(da, x, weights, biases)


def compute_first_weight_differences(weights, biases, x, t):
    """Computes dc/dW of the first layer by central differences."""

    def c(W):
        a = reference.FEEDFORWARD.matrix.value(x, [W, *weights[1:]], biases)
        return reference.SQUARED_ERROR.matrix.value(a, t)

    return central_difference(c, weights[0])


def test_e01_squared_error_gradient_has_opposite_sign(select_form):
    loss = select_form(reference.SQUARED_ERROR)
    differences = central_difference(lambda a: loss.value(a, T_ONE_HOT), A)
    printed = T_ONE_HOT - A
    assert_equal(differences, column(-0.3, 0.2))
    assert_different(printed, differences)
    da, _ = loss.pullback(1.0, A, T_ONE_HOT)
    assert_equal(da, differences)

    loss_at_a = loss.value(A, T_ONE_HOT)
    assert (
        loss.value(A - 0.1 * printed, T_ONE_HOT) > loss_at_a > loss.value(A - 0.1 * da, T_ONE_HOT)
    )


def test_e01_layer_gradient_has_opposite_sign(select_form):
    layer, x = select_form(reference.SIGMOID_SQUARED_ERROR), column(0.5, -1, 2)
    W, b = WEIGHTS[1], BIASES[1]
    differences = central_difference(lambda W: layer.value(x, W, b, TARGET), W)
    a = reference.SIGMOID.matrix.value(W @ x + b)
    printed = ((TARGET - a) * (1 - a) * a) @ x.T
    assert_different(printed, differences)
    assert_equal(layer.pullback(1.0, x, W, b, TARGET)[1], differences)


def test_e02_squared_error_is_a_scalar(select_form):
    def printed(a):
        return 0.5 * ((T_ONE_HOT - a) * (T_ONE_HOT - a))

    assert_equal(printed(A), column(0.045, 0.02))
    assert central_difference(printed, A).shape == (2, 1, 2, 1)

    loss = select_form(reference.SQUARED_ERROR)
    assert_equal(loss.value(A, T_ONE_HOT), 0.065)
    differences = central_difference(lambda a: loss.value(a, T_ONE_HOT), A)
    assert_equal(loss.pullback(1.0, A, T_ONE_HOT)[0], differences)


@pytest.mark.parametrize("k", [0, 1])
def test_e03_affine_map_sums_over_inputs(select_form, k):
    def printed(W):
        return A[k] * W[:, [k]] + B0

    affine = select_form(reference.AFFINE)
    assert_equal(affine.value(A, W2, B0), column(1.1, 2.9))
    assert_equal(printed(W2), [column(0.7, 2.1), column(0.4, 0.8)][k])
    assert_different(printed(W2), affine.value(A, W2, B0))

    differences = central_difference(lambda W: affine.value(A, W, B0), W2)
    assert_different(central_difference(printed, W2), differences)
    assert_equal(compute_jacobians(affine, A, W2, B0)[1], differences)


def test_e03_sum_over_inputs_of_non_square_layer(select_form):
    W, b = WEIGHTS[0], BIASES[0]
    z = [sum(W[j, k] * X[k, 0] for k in range(4)) + b[j, 0] for j in range(3)]
    assert_equal(select_form(reference.AFFINE).value(X, W, b), column(*z))
    for k in range(4):
        assert_different(X[k] * W[:, [k]] + b, column(*z))


@pytest.mark.parametrize(("x", "W", "b"), [(A, W2, B0), (X, WEIGHTS[0], BIASES[0])])
def test_e04_affine_derivatives_have_row_for_each_output(select_form, x, W, b):
    affine = select_form(reference.AFFINE)
    dz_dW = central_difference(lambda W: affine.value(x, W, b), W)
    dz_db = central_difference(lambda b: affine.value(x, W, b), b)
    m, n = W.shape
    assert dz_dW.shape == (m, 1, m, n)
    assert dz_db.shape == (m, 1, m, 1)
    assert_equal(dz_dW[0, 0, 1, 0], 0)  # printed: a_0
    assert_equal(dz_db[0, 0, 1, 0], 0)  # printed: 1

    assert_different(np.broadcast_to(x[:, 0], (m, 1, m, n)), dz_dW)
    assert_different(np.ones((m, 1, m, 1)), dz_db)
    _, dW, db = compute_jacobians(affine, x, W, b)
    assert_equal(dW, dz_dW)
    assert_equal(db, dz_db)


def test_e05_input_gradient_needs_transposed_weights(select_form):
    delta = column(1, 0)
    differences = central_difference(lambda a: (delta.T @ W2 @ a).item(), A)
    with pytest.raises(ValueError, match="mismatch"):
        delta @ W2  # as printed
    assert_equal(W2 @ delta, column(1, 3))  # without the transpose
    assert_equal(differences, column(1, 2))
    assert_different(W2 @ delta, differences)
    assert_equal(select_form(reference.AFFINE).pullback(delta, A, W2, B0)[0], differences)


def test_e05_earlier_layer_needs_transposed_weights(select_form):
    _, _, dW, db = compute_network_gradients(select_form, WEIGHTS, BIASES, X, TARGET)
    assert_equal(dW[0], compute_first_weight_differences(WEIGHTS, BIASES, X, TARGET))

    a = reference.SIGMOID.matrix.value(WEIGHTS[0] @ X + BIASES[0])
    slope = a * (1 - a)
    for printed in (
        lambda: ((db[1] @ WEIGHTS[1]) * slope) @ X,
        lambda: ((WEIGHTS[1] @ db[1]) * slope) @ X,
        lambda: ((WEIGHTS[1].T @ db[1]) * slope) @ X,
    ):
        with pytest.raises(ValueError, match="mismatch"):
            printed()
    assert_equal(((WEIGHTS[1].T @ db[1]) * slope) @ X.T, dW[0])

    # NumPy broadcasts a row and a column to (3, 3), which is not the shape of dz.
    assert ((db[1].T @ WEIGHTS[1]) * slope).shape == (3, 3)


@pytest.mark.parametrize("beta", [math.e, 2.0])
def test_e06_gradient_of_targets_that_do_not_sum_to_one(select_form, beta):
    loss = select_form(reference.CROSS_ENTROPY)
    t = column(1, 1)
    differences = central_difference(lambda z: loss.value(z, t, beta=beta), Z_P)
    assert_equal(differences, column(-0.5, 0.5) / math.log(beta))
    assert_different((P - t) / math.log(beta), differences)  # (-.75, -.25) in base e
    assert_equal(loss.pullback(1.0, Z_P, t, beta=beta)[0], differences)

    # With targets that do sum to 1 the printed form is right.
    differences = central_difference(lambda z: loss.value(z, T_ONE_HOT, beta=beta), Z_P)
    assert_equal((P - T_ONE_HOT) / math.log(beta), differences)


def test_e06_weight_gradient_of_targets_that_do_not_sum_to_one(select_form):
    head, W, b = select_form(reference.LINEAR_CROSS_ENTROPY), WEIGHTS[0], BIASES[0]
    differences = central_difference(lambda W: head.value(X, W, b, TARGET_3), W)
    a = reference.SOFTMAX.matrix.value(W @ X + b)
    assert_different((a - TARGET_3) @ X.T, differences)
    assert_equal(head.pullback(1.0, X, W, b, TARGET_3)[1], differences)


@pytest.mark.parametrize(
    ("x", "W", "b", "t"),
    [(A, W2, Z_P - W2 @ A, T_ONE_HOT), (X, WEIGHTS[0], BIASES[0], TARGET_3)],
)
def test_e07_weight_gradient_is_column_times_row(select_form, x, W, b, t):
    head = select_form(reference.LINEAR_CROSS_ENTROPY)
    differences = central_difference(lambda W: head.value(x, W, b, t), W)
    _, dW, dz, _ = head.pullback(1.0, x, W, b, t)
    assert_equal(dz @ x.T, differences)
    assert_equal(dW, differences)

    z = W @ x + b
    a = reference.SOFTMAX.matrix.value(z)
    row = (-t / a).T @ reference.SOFTMAX_JACOBIAN.matrix.value(z)
    assert_equal(row, dz.T)
    assert row.shape == (1, len(z))  # printed as a column
    with pytest.raises(ValueError, match="mismatch"):
        row.T @ x  # dz/dW is printed as a column, too


def test_e07_row_times_column_is_one_number():
    row = (-T_ONE_HOT / P).T @ reference.SOFTMAX_JACOBIAN.matrix.value(Z_P)
    assert (row @ A).shape == (1, 1)
    assert (row.T @ A.T).shape == W2.shape


def test_e08_chain_rule_multiplies_derivatives():
    def composition(z):
        return math.e ** (z**2)

    def total(z):
        return math.e**z + z**2

    f_prime, g_prime = math.exp, lambda z: 2 * z  # f = e^z, g = z²
    one = np.array(1.0)
    printed = f_prime(1) + g_prime(1)
    assert_equal(printed, central_difference(total, one))  # right for the sum f + g
    assert_different(printed, central_difference(composition, one))
    assert_equal(f_prime(1**2) * g_prime(1), central_difference(composition, one))


def test_e08_library_multiplies_derivatives(select_form):
    # F13 is F5 after F7: its derivative is the product of theirs.
    z, t = column(0.3, -1, 0.8), TARGET_3
    softmax, loss = select_form(reference.SOFTMAX), select_form(reference.CATEGORICAL_CROSS_ENTROPY)
    differences = central_difference(lambda z: loss.value(softmax.value(z), t), z)
    da, _ = loss.pullback(1.0, softmax.value(z), t)
    (dz,) = softmax.pullback(da, z)
    assert_equal(dz, differences)
    assert_equal(select_form(reference.CROSS_ENTROPY).pullback(1.0, z, t)[0], differences)
    (sums,) = softmax.pullback(np.ones((3, 1)), z)
    assert_different(da + sums, differences)  # f' + g'


@pytest.mark.parametrize("z", [Z_P, column(0.3, -1, 0.8)])
def test_e09_softmax_jacobian_needs_diagonal_matrix(select_form, z):
    differences = central_difference(reference.SOFTMAX.matrix.value, z)[:, 0, :, 0]
    a, one, identity = reference.SOFTMAX.matrix.value(z), np.ones_like(z), np.eye(len(z))
    printed = a.T @ (identity - one @ a.T)
    assert_equal(printed, np.zeros((1, len(z))))
    assert printed.shape != differences.shape
    assert_different(np.broadcast_to(printed, differences.shape), differences)
    assert_equal(np.diagflat(a) @ (identity - one @ a.T), differences)
    assert_equal(select_form(reference.SOFTMAX_JACOBIAN).value(z), differences)


def test_e09_softmax_jacobian_equals_numbers_of_page(select_form):
    assert_equal(
        select_form(reference.SOFTMAX_JACOBIAN).value(Z_P), 0.1875 * np.array([[1, -1], [-1, 1]])
    )


def test_e10_jacobian_has_row_for_each_output(select_form):
    def compute_appendix_b_jacobian(f, x):
        """Has dy_j/dx_i in row i, column j."""
        partials = central_difference(f, x)
        m, n = len(partials), len(x)
        return np.array([[partials[j, 0, i, 0] for j in range(m)] for i in range(n)])

    affine = select_form(reference.AFFINE)
    printed = compute_appendix_b_jacobian(lambda a: affine.value(a, W2, B0), A)
    assert_equal(printed, np.array([[1.0, 3.0], [2.0, 4.0]]))
    assert_different(printed, W2)  # section 4: dz/da = W
    assert_equal(compute_jacobians(affine, A, W2, B0)[0][:, 0, :, 0], W2)

    W, b = WEIGHTS[0], BIASES[0]
    assert compute_appendix_b_jacobian(lambda a: affine.value(a, W, b), X).shape == (4, 3)
    assert_equal(central_difference(lambda a: affine.value(a, W, b), X)[:, 0, :, 0], W)
    assert_equal(compute_jacobians(affine, X, W, b)[0][:, 0, :, 0], W)

    # Softmax does not distinguish the layouts: its Jacobian is symmetric.
    printed = compute_appendix_b_jacobian(reference.SOFTMAX.matrix.value, Z_P)
    assert_equal(printed, select_form(reference.SOFTMAX_JACOBIAN).value(Z_P))


@pytest.mark.parametrize("z", [Z_P, column(0.3, -1, 0.8)])
def test_e11_jacobian_is_not_a_sum_of_partials(select_form, z):
    differences = central_difference(reference.SOFTMAX.matrix.value, z)[:, 0, :, 0]
    printed = differences.sum(axis=1, keepdims=True)
    assert_equal(printed, np.zeros_like(z))
    assert_different(np.broadcast_to(printed, differences.shape), differences)
    assert_equal(compute_jacobians(select_form(reference.SOFTMAX), z)[0][:, 0, :, 0], differences)
    assert_equal(select_form(reference.SOFTMAX_JACOBIAN).value(z), differences)


def test_e11_gradient_is_not_a_sum_of_partials():
    differences = central_difference(lambda v: (v[0] * v[1]).item(), column(2, 3))
    assert_equal(differences, column(3, 2))
    printed = differences.sum()  # f'(x) + f'(y)
    assert_equal(printed, 5.0)
    assert_different(np.broadcast_to(printed, differences.shape), differences)


def test_e12_index_ranges_and_weight_layout(select_form):
    n = len(A)  # "the number of nodes"
    with pytest.raises(IndexError):
        sum(W2[0, k] * A[k, 0] for k in range(n + 1))  # from 0 to n

    affine = select_form(reference.AFFINE)
    z = affine.value(A, W2, B0)
    assert_equal(z, column(1.1, 2.9))
    with pytest.raises(ValueError, match="mismatch"):
        A @ W2  # section 1 on a column
    assert_equal(A.T @ W2, np.array([[1.3, 2.2]]))  # and on a row
    assert_different(A.T @ W2, z.T)
    assert_equal(A.T @ W2.T, z.T)

    W, b = WEIGHTS[0], BIASES[0]  # not square
    with pytest.raises(ValueError, match="mismatch"):
        X.T @ W + b.T
    assert_equal(X.T @ W.T + b.T, affine.value(X, W, b).T)


def test_e13_weight_gradient_uses_input_of_own_layer(select_form):
    x, t, zero = column(2), column(1), column(0)
    weights, biases = [column(0.5), column(1)], [zero, zero]
    differences = compute_first_weight_differences(weights, biases, x, t)
    _, _, dW, db = compute_network_gradients(select_form, weights, biases, x, t)
    a = reference.SIGMOID.matrix.value(weights[0] @ x)
    printed = db[0] @ a.T  # a_q^{L-1}, with the sign (E1) corrected
    assert round(differences.item(), 4) == -0.0280
    assert round(printed.item(), 4) == -0.0102
    assert_different(printed, differences)
    assert_equal(dW[0], differences)


def test_e13_weight_gradient_of_layers_of_different_sizes(select_form):
    differences = compute_first_weight_differences(WEIGHTS, BIASES, X, TARGET)
    _, _, dW, db = compute_network_gradients(select_form, WEIGHTS, BIASES, X, TARGET)
    a = reference.SIGMOID.matrix.value(WEIGHTS[0] @ X + BIASES[0])
    assert (db[0] @ a.T).shape == (3, 3) != differences.shape
    assert_different(db[0] @ a.T, differences[:, :3])
    assert_equal(dW[0], differences)


@pytest.mark.parametrize("z", [Z_P, column(0.3, -1, 0.8)])
def test_e14_sigmoid_derivative_is_a_diagonal_matrix(select_form, z):
    sigmoid = select_form(reference.SIGMOID)
    differences = central_difference(sigmoid.value, z)[:, 0, :, 0]
    a = sigmoid.value(z)
    printed = a * (1 - a)
    assert printed.shape != differences.shape
    assert_different(np.broadcast_to(printed, differences.shape), differences)
    assert_equal(np.diagflat(printed), differences)
    assert_equal(compute_jacobians(sigmoid, z)[0][:, 0, :, 0], differences)

    # The printed vector requires ∘; softmax's Jacobian requires the matrix product.
    g = column(1, -2, 3)[: len(z)]
    with pytest.raises(ValueError, match="mismatch"):
        printed @ g
    assert_equal(sigmoid.pullback(g, z)[0], printed * g)


def test_e14_sigmoid_jacobian_equals_numbers_of_page(select_form):
    assert_equal(
        compute_jacobians(select_form(reference.SIGMOID), Z_P)[0][:, 0, :, 0],
        np.diag([0.25, 0.1875]),
    )


def test_e15_omitting_one_over_n_changes_convergence(select_form):
    n, rate = 4, 2.5
    loss, t = select_form(reference.SQUARED_ERROR), column(1, 0, 0.5, 2)
    start = np.zeros((n, 1))

    def mean_squared_error(a):
        return np.mean((t - a) ** 2)

    differences = central_difference(mean_squared_error, start)
    da, _ = loss.pullback(1.0, start, t)
    assert_different(da, differences)
    assert_equal(2 / n * da, differences)

    descents = {}
    for name, scale in (("mean", 2 / n), ("sum", 1)):
        a = start
        for _ in range(40):
            a = a - rate * scale * loss.pullback(1.0, a, t)[0]
        descents[name] = loss.value(a, t)
    assert descents["mean"] < 1e-12 < 1e6 < descents["sum"]


def test_e16_base_must_exceed_one_and_probabilities_must_exceed_zero(select_form):
    a, t = column(0.7, 0.2, 0.1), column(1, 0, 0)
    loss = select_form(reference.CATEGORICAL_CROSS_ENTROPY)
    differences = central_difference(lambda a: loss.value(a, t, beta=0.5), a)
    da, _ = loss.pullback(1.0, a, t, beta=0.5)
    assert round(loss.value(a, t, beta=0.5), 3) == -0.515  # a loss below 0
    np.testing.assert_allclose(differences, column(2.06, 0, 0), atol=0.005)
    assert_equal(
        -(t / a) / math.log(0.5), differences
    )  # the printed derivative is right for any base
    assert_equal(da, differences)

    # But descending along it makes the true class more likely only for β > 1.
    for beta, becomes_likelier in ((math.e, True), (2.0, True), (0.5, False)):
        da, _ = loss.pullback(1.0, a, t, beta=beta)
        assert ((a - 0.01 * da)[0, 0] > a[0, 0]) == becomes_likelier

    with np.errstate(invalid="ignore"):
        outside = loss.value(column(-0.1, 0.6, 0.5), t)  # in ℝᴺ, but outside the domain
    assert math.isnan(outside)


def test_e17_softmax_depends_on_every_input(select_form):
    # dS(z_0)/dz_1 and dg(z_0)/dz_1 are not 0, though the notation shows no z_1.
    S = central_difference(select_form(reference.SOFTMAX).value, Z_P)[:, 0, :, 0]
    assert_equal(S[0, 1], -0.1875)
    assert_equal(compute_jacobians(select_form(reference.SOFTMAX), Z_P)[0][:, 0, :, 0], S)
    assert_equal(central_difference(lambda z: np.exp(z).sum(), Z_P), np.exp(Z_P))


def test_e17_derivative_of_exponentials_is_diagonal():
    # The printed "de^z/de^x = 0" is right for k ≠ j only; de^{z_j}/dz_j is e^{z_j}.
    partials = central_difference(np.exp, Z_P)[:, 0, :, 0]
    assert_different(np.zeros((2, 2)), partials)
    assert_equal(partials, np.diag([1.0, 3.0]))


def test_e17_division_is_elementwise(select_form):
    # A column has no inverse, so t / a and 1 / (1 + e^-z) must be elementwise.
    with pytest.raises(np.linalg.LinAlgError):
        T_ONE_HOT @ np.linalg.inv(A)
    loss, t = select_form(reference.CATEGORICAL_CROSS_ENTROPY), TARGET
    differences = central_difference(lambda a: loss.value(a, t), A)
    assert_equal(-column(t[0, 0] / A[0, 0], t[1, 0] / A[1, 0]), differences)
    assert_equal(loss.pullback(1.0, A, t)[0], differences)


def test_e17_ellipsis_hides_minus_signs(select_form):
    z, t = column(0.3, -1, 0.8, 0.1), column(0.5, 2, 0.25, 1)
    loss = select_form(reference.CROSS_ENTROPY)
    differences = central_difference(lambda z: loss.value(z, t), z)
    a = reference.SOFTMAX.matrix.value(z)

    def compute_first_row(sign):
        """Computes -(t_0 (1 - a_0) - t_1 a_0 + ⋯ - t_n a_0) of 5.2.2 with a sign for ⋯."""
        ends = t[0] * (1 - a[0]) - t[1] * a[0] - t[3] * a[0]
        return -(ends + sign * t[2] * a[0])

    assert_different(compute_first_row(+1), differences[0])
    assert_equal(compute_first_row(-1), differences[0])
    assert_equal(loss.pullback(1.0, z, t)[0], differences)
