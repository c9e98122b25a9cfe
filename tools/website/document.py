"""What the document prints for each formula, in its notation, by the catalogue's title."""

PRINTED: dict[str, tuple[str, ...]] = {
    "affine map": (
        r"\mathbf{z}^L = \mathbf{a}^{L-1} W^L + B^L \quad\text{(section 1)}",
        r"z_j^L = a_k^{L-1} w_{jk}^L + b_j^L",
        r"\frac{dz_j^L}{dw_{jk}^L} = a_k^{L-1}, \qquad \frac{dz_j^L}{db_j^L} = 1,"
        r" \qquad \frac{dz_j^L}{da_k^{L-1}} = w_{jk}^L",
        r"\mathbf{z}^L = W^L \cdot \mathbf{a}^{L-1} + \mathbf{b}^L",
        r"\frac{d\mathbf{z}^L}{dW^L} = \mathbf{a}^{L-1}, \qquad"
        r" \frac{d\mathbf{z}^L}{d\mathbf{b}^L} = 1, \qquad"
        r" \frac{d\mathbf{z}^L}{d\mathbf{a}^{L-1}} = W^L",
    ),
    "tanh": (r"\mathbf{a}^L = f(\mathbf{z}^L), \quad f \text{ e.g. sigmoid, tanh, relu}",),
    "relu": (r"\mathbf{a}^L = f(\mathbf{z}^L), \quad f \text{ e.g. sigmoid, tanh, relu}",),
    "cost of a batch": (r"\text{the mean of the loss function over a batch of training examples}",),
    "squared error": (
        r"c = \frac{1}{2} \sum_{j=0}^n (t_j - a_j^L)^2, \qquad"
        r" \frac{dc}{da_j^L} = t_j - a_j^L",
        r"c = \frac{1}{2} ((\mathbf{t} - \mathbf{a}^L) \circ (\mathbf{t} - \mathbf{a}^L)), \qquad"
        r" \frac{dc}{d\mathbf{a}^L} = \mathbf{t} - \mathbf{a}^L",
    ),
    "cross entropy of probabilities": (
        r"c = - \sum_{j=0}^n t_j \log_b(a_j^L), \qquad"
        r" \frac{dc}{da_j^L} = -\frac{1}{\ln(b)} \frac{t_j}{a_j^L}",
        r"c = -\mathbf{t}^T \cdot \log_b(\mathbf{a}^L), \qquad"
        r" \frac{dc}{d\mathbf{a}^L} = -\frac{1}{\ln(b)} (\mathbf{t} \oslash \mathbf{a}^L)",
    ),
    "sigmoid": (
        r"a_j^L = \sigma(z_j^L) = \frac{1}{1 + e^{-z_j^L}}, \qquad"
        r" \frac{da_j^L}{dz_j^L} = a_j^L (1 - a_j^L)",
        r"\mathbf{a}^L = \sigma(\mathbf{z}^L), \qquad"
        r" \frac{d\mathbf{a}^L}{d\mathbf{z}^L} = \mathbf{a}^L \circ (1 - \mathbf{a}^L)",
    ),
    "softmax": (
        r"a_j^L = \frac{e^{z_j^L}}{\sum_{i=0}^n e^{z_i^L}}, \qquad"
        r" \frac{da_j^L}{dz_k^L} = a_j^L (\delta_{jk} - a_k^L)",
        r"\frac{d\mathbf{a}}{d\mathbf{z}} = \begin{pmatrix}"
        r" \frac{da_0}{dz_0} + \frac{da_0}{dz_1} + \dots + \frac{da_0}{dz_n} \\ \vdots \\"
        r" \frac{da_n}{dz_0} + \frac{da_n}{dz_1} + \dots + \frac{da_n}{dz_n} \end{pmatrix}"
        r" \quad\text{(appendix B)}",
    ),
    "softmax's Jacobian": (
        r"\frac{d\mathbf{a}^L}{d\mathbf{z}^L} = \begin{pmatrix} a_0^L & a_1^L & \cdots & a_n^L"
        r" \end{pmatrix} \left( I_n - \begin{pmatrix} a_0^L & a_1^L & \cdots & a_n^L \\"
        r" \vdots & \vdots & \ddots & \vdots \\ a_0^L & a_1^L & \cdots & a_n^L \end{pmatrix}"
        r" \right)",
    ),
    "affine, sigmoid, squared error": (
        r"\frac{dc}{dw_{jk}^L} = (t_j - a_j^L) (1 - a_j^L) a_j^L a_k^{L-1}",
        r"\frac{dc}{dW^L} = \left( \frac{dc}{d\mathbf{a}^L} \circ"
        r" \frac{d\mathbf{a}^L}{d\mathbf{z}^L} \right) \cdot \frac{d\mathbf{z}^L}{dW^L}{}^T",
    ),
    "feed-forward network": (
        r"\frac{dc}{dw_{kq}^{L-1}} = \left( \sum_{j=0}^n (t_j - a_j^L) (1 - a_j^L) a_j^L w_{jk}^L"
        r" \right) (a_k^{L-1} (1 - a_k^{L-1})) (a_q^{L-1})",
        r"\frac{dc}{dW^{L-1}} = \left( \left( \frac{dc}{d\mathbf{z}^L} \cdot"
        r" \frac{d\mathbf{z}^L}{d\mathbf{a}^{L-1}} \right) \circ"
        r" \frac{d\mathbf{a}^{L-1}}{d\mathbf{z}^{L-1}} \right) \cdot"
        r" \frac{d\mathbf{z}^{L-1}}{dw^{L-1}}, \qquad"
        r" \frac{d\mathbf{z}^{L-1}}{dw^{L-1}} = \mathbf{a}^{L-2}",
    ),
    "softmax, cross entropy": (
        r"\frac{dc}{dz_j^L} = \sum_{i=0}^n \frac{dc}{da_i^L} \frac{da_i^L}{dz_j^L}"
        r" = \frac{1}{\ln(b)} (a_j^L - t_j)",
        r"\frac{dc}{d\mathbf{z}^L} = \frac{dc}{d\mathbf{a}^L}^T \cdot"
        r" \frac{d\mathbf{a}^L}{d\mathbf{z}^L} = \frac{1}{\ln(b)} (\mathbf{a}^L - \mathbf{t})",
    ),
    "affine, softmax, cross entropy": (
        r"\frac{dc}{dw_{jk}^L} = \frac{1}{\ln(b)} (a_j^L - t_j) a_k^{L-1}",
        r"\frac{dc}{dW^L} = \frac{1}{\ln(b)} ((\mathbf{a}^L - \mathbf{t}) \cdot"
        r" {\mathbf{a}^{L-1}}^T)",
    ),
}
