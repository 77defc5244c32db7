r"""Optimiser updates over flat vectors: one pass over memory each.

theta, gradient and moments are (P,) of one dtype. `factor` multiplies the gradient first: the clipping coefficient
costs no pass of its own. `limit` clamps each element of the gradient to [-limit, limit]; infinity leaves it alone.
"""

import math

import numpy as np

from .compile import kernel
from .types import Array


@kernel
def sum_of_squares(vector: Array) -> float:
    """sum_i vector_i^2 of a (P,) array, added up in float64 by blocks of 4096."""
    total = 0.0
    for start in range(0, vector.size, 4096):
        block = vector[start : start + 4096]
        part = vector.dtype.type(0)
        for i in range(block.size):
            part += block[i] * block[i]
        total += part
    return total


@kernel
def clamp(x: float, limit: float) -> float:
    """x within [-limit, limit]; NaN stays NaN."""
    x = limit if x > limit else x
    return -limit if x < -limit else x


@kernel
def sgd_update(
    theta: Array,
    gradient: Array,
    velocity: Array,
    lr: float,
    momentum: float,
    nesterov: bool,
    decay: float,
    factor: float,
    limit: float,
) -> None:
    """Stochastic gradient descent (Sutskever et al. 2013, in PyTorch's form).

    g += decay theta;  v = momentum v + g;  theta -= lr (g + momentum v if nesterov else v).
    velocity (P,) or (0,) where momentum is 0: then theta -= lr g.
    """
    real = theta.dtype.type
    lr, momentum, decay, factor, limit = real(lr), real(momentum), real(decay), real(factor), real(limit)
    if velocity.size == 0:
        for i in range(theta.size):
            theta[i] -= lr * (clamp(gradient[i] * factor, limit) + decay * theta[i])
    elif nesterov:
        for i in range(theta.size):
            g = clamp(gradient[i] * factor, limit) + decay * theta[i]
            v = momentum * velocity[i] + g
            velocity[i] = v
            theta[i] -= lr * (g + momentum * v)
    else:
        for i in range(theta.size):
            v = momentum * velocity[i] + clamp(gradient[i] * factor, limit) + decay * theta[i]
            velocity[i] = v
            theta[i] -= lr * v


@kernel
def adam_update(
    theta: Array,
    gradient: Array,
    mean: Array,
    square: Array,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
    decoupled: bool,
    factor: float,
    limit: float,
) -> None:
    """Adam (Kingma and Ba 2015); decoupled: AdamW (Loshchilov and Hutter 2019). step counts from 1.

    m = beta1 m + (1 - beta1) g;  s = beta2 s + (1 - beta2) g^2
    theta -= lr m / (1 - beta1^step) / (sqrt(s / (1 - beta2^step)) + epsilon)
    decay is added to the gradient as decay theta, or, decoupled, theta *= 1 - lr decay.
    """
    real = theta.dtype.type
    size = real(lr / (1 - beta1**step))
    root = real(1 / math.sqrt(1 - beta2**step))
    shrink = real(1 - lr * decay) if decoupled else real(1)
    pull = real(0) if decoupled else real(decay)
    keep1, keep2, new1, new2 = real(beta1), real(beta2), real(1 - beta1), real(1 - beta2)
    epsilon, factor, limit = real(epsilon), real(factor), real(limit)
    for i in range(theta.size):
        g = clamp(gradient[i] * factor, limit) + pull * theta[i]
        m = keep1 * mean[i] + new1 * g
        s = keep2 * square[i] + new2 * g * g
        mean[i] = m
        square[i] = s
        theta[i] = shrink * theta[i] - size * m / (math.sqrt(s) * root + epsilon)


@kernel
def rmsprop_update(
    theta: Array,
    gradient: Array,
    square: Array,
    lr: float,
    alpha: float,
    epsilon: float,
    decay: float,
    factor: float,
    limit: float,
) -> None:
    """RMSprop (Tieleman and Hinton 2012, in the form of Torch7's optim).

    s = alpha s + (1 - alpha) g^2;  theta -= lr g / (sqrt(s) + epsilon)
    """
    real = theta.dtype.type
    keep, new = real(alpha), real(1 - alpha)
    lr, epsilon, decay, factor, limit = real(lr), real(epsilon), real(decay), real(factor), real(limit)
    for i in range(theta.size):
        g = clamp(gradient[i] * factor, limit) + decay * theta[i]
        s = keep * square[i] + new * g * g
        square[i] = s
        theta[i] -= lr * g / (math.sqrt(s) + epsilon)


def sgd_reference(
    theta: Array, g: Array, v: Array, lr: float, momentum: float, nesterov: bool, decay: float
) -> tuple[Array, Array]:
    """One step by NumPy. Returns theta and velocity."""
    g = g + decay * theta
    v = momentum * v + g
    return theta - lr * (g + momentum * v if nesterov else v), v


def adam_reference(
    theta: Array,
    g: Array,
    m: Array,
    s: Array,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
    decoupled: bool,
) -> tuple[Array, Array, Array]:
    """One step by NumPy. Returns theta, m and s."""
    g = g if decoupled else g + decay * theta
    m = beta1 * m + (1 - beta1) * g
    s = beta2 * s + (1 - beta2) * g**2
    theta = theta * (1 - lr * decay) if decoupled else theta
    return theta - lr * (m / (1 - beta1**step)) / (np.sqrt(s / (1 - beta2**step)) + epsilon), m, s


def rmsprop_reference(
    theta: Array, g: Array, s: Array, lr: float, alpha: float, epsilon: float, decay: float
) -> tuple[Array, Array]:
    """One step by NumPy. Returns theta and s."""
    g = g + decay * theta
    s = alpha * s + (1 - alpha) * g**2
    return theta - lr * g / (np.sqrt(s) + epsilon), s
