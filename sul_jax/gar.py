"""Auto-clustering output layer and Graph-based Activity Regularization (Kilinc & Uysal 2018).

A softmax over all nodes, pooled over the nodes of each parent class, lets a network that is taught only the
parents divide each of them into clusters. The activations B = ReLU(Z) of a batch's logits make a graph of
nodes, N = BᵀB: affinity measures how much nodes share examples, balance measures how evenly they share the
work. With low affinity and high balance, every node takes a cluster.

Node j belongs to parent j mod `num_parents`. No Gram matrix is formed: the sum of N's entries is the sum over
examples of their squared activity, so the cost is one reading of the activations. Every function is global
under `axis_name`: sums over the batch come before their ratios.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from sul_jax._check import check_array, check_floating, check_integer, check_labels
from sul_jax._linalg import at_least_float32, root
from sul_jax._parallel import sum_over

Frobenius = Literal["squared", "mean", "norm"]
_PAPERS_BATCH = 400


def affinity(activations: Array, *, num_parents: int = 1, axis_name: str | None = None) -> Array:
    """α(B) = Σ_{i≠j} N_ij / ((n − 1) Σ_i N_ii) with N = BᵀB (eq. 5), and its mean over parents (eq. 11).

    Args:
      activations: B, non-negative, `[batch, num_nodes]`.
      num_parents: with more than one, N is that of each parent's own nodes, of which there are n.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A scalar in [0, 1]: 0 if no two nodes of a parent are active for the same example. A parent without
      activity counts 0.

    Raises:
      ValueError: wrong rank, or nodes that are not divided evenly into parents of at least two.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import gar
      >>> gar.affinity(jnp.eye(3)).item(), round(gar.affinity(jnp.ones((4, 3))).item(), 4)
      (0.0, 1.0)
    """
    by_parent = at_least_float32(_by_parent("activations", activations, num_parents))
    squares = jnp.sum(jnp.square(by_parent), axis=1)
    # Example by example, so that one active node leaves exactly nothing.
    shared = sum_over(jnp.sum(jnp.square(jnp.sum(by_parent, axis=1)) - squares, axis=0), axis_name)
    own = sum_over(jnp.sum(squares, axis=0), axis_name)
    return _mean_ratio(shared, own, by_parent.shape[1])


def balance(
    activations: Array,
    *,
    num_parents: int = 1,
    energy: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """β(B) = Σ_{i≠j} V_ij / ((n − 1) Σ_i V_ii) with V = vvᵀ, v = diag(N) (eq. 6, 12).

    In a small batch even the best nodes differ in how many examples fall to them: of examples drawn evenly
    over eight parents of 20 nodes, one node each, 1 − β is 0.29 in a batch of 400, and 0.79 in one of 50.
    With `energy` of more examples β is the same at every batch size.

    Args:
      activations: B, non-negative, `[batch, num_nodes]`.
      num_parents: with more than one, V is that of each parent's own nodes, of which there are n.
      energy: a moving average of `node_energy`, of this batch and others before it, `[num_nodes]`: β is
        measured on it, with the gradient of a batch that has it. By default v is the batch's.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A scalar in [0, 1]: 1 if all nodes of a parent have the same total activity. A parent without activity
      counts 0.

    Raises:
      ValueError: wrong rank or shape, or nodes that are not divided evenly into parents of at least two.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import gar
      >>> gar.balance(jnp.eye(3)).item(), gar.balance(jnp.array([[1.0, 0.0], [2.0, 0.0]])).item()
      (1.0, 0.0)
      >>> gar.balance(jnp.array([[1.0, 0.0]]), energy=jnp.array([0.5, 0.5])).item()
      1.0
    """
    by_parent = at_least_float32(_by_parent("activations", activations, num_parents))
    here = sum_over(jnp.sum(jnp.square(by_parent), axis=0), axis_name)  # v, [n, num_parents]
    if energy is not None:
        known = at_least_float32(check_array("energy", energy, ndim=1, axes="[num_nodes]"))
        if known.size != here.size:
            raise ValueError(f"energy has {known.size} nodes, where activations has {here.size}")
        known = known.reshape(here.shape)
        # Of this batch's size, so that its own gradients have the size that they have in a batch alone.
        total, own = (jnp.sum(values, axis=0, keepdims=True) for values in (known, here))
        known = jnp.where(total > 0, known * own / jnp.where(total > 0, total, 1), here)
        here = here + lax.stop_gradient(known - here)
    # Only ratios matter; of a node's energy the square may leave float32.
    largest = lax.stop_gradient(jnp.max(here, axis=0, keepdims=True))
    here = here / jnp.where(largest > 0, largest, 1)
    squares = jnp.sum(jnp.square(here), axis=0)
    return _mean_ratio(jnp.square(jnp.sum(here, axis=0)) - squares, squares, len(here))


def node_energy(activations: Array, *, axis_name: str | None = None) -> Array:
    """v / batch, the diagonal of N (eq. 6) for each example: how active each node is, `[num_nodes]`.

    Args:
      activations: B, non-negative, `[batch, num_nodes]`.
      axis_name: mapped axis over which the batch is split.

    Raises:
      ValueError: wrong rank.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import gar
      >>> gar.node_energy(jnp.array([[1.0, 0.0], [3.0, 0.0]])).tolist()
      [5.0, 0.0]
    """
    activations = at_least_float32(check_array("activations", activations, ndim=2, axes="[batch, num_nodes]"))
    mean = jnp.mean(jnp.square(activations), axis=0)
    return mean if axis_name is None else lax.pmean(mean, axis_name)


def gar_loss(
    logits: Array,
    *,
    num_parents: int = 1,
    affinity_weight: float | Array = 0.1,
    balance_weight: float | Array = 1.0,
    frobenius_weight: float | Array = 1e-6,
    frobenius: Frobenius = "squared",
    energy: Array | None = None,
    axis_name: str | None = None,
) -> Array:
    """c_α α(B) + c_β (1 − β(B)) + c_F F with B = ReLU(Z) (eq. 7, 9 and 13); the weights are the paper's.

    Args:
      logits: Z, `[batch, num_nodes]`.
      num_parents: parents among whose nodes affinity and balance are measured.
      affinity_weight: c_α, the weight of affinity.
      balance_weight: c_β, the weight of missing balance.
      frobenius_weight: c_F, the weight of the squared logits.
      frobenius: F, which keeps the activity bounded: `"squared"` is ΣZ², the sum over batch and nodes that
        the authors' code takes and for which they give c_F; `"mean"` is the same for their batch of 400 and
        does not depend on the batch's size; `"norm"` is ‖B‖_F as the paper prints it, which does not hold
        back negative logits and grows with the root of the batch only.
      energy: as in `balance`.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A scalar.

    Raises:
      ValueError: wrong rank, nodes that are not divided evenly, or an unknown `frobenius`.

    Example:
      >>> import jax
      >>> from sul_jax import gar
      >>> logits = jax.random.normal(jax.random.key(0), (100, 12))
      >>> loss = gar.gar_loss(logits, num_parents=3)
      >>> loss.shape
      ()
    """
    logits = check_floating("logits", logits)
    activations = jax.nn.relu(logits)
    shared = affinity(activations, num_parents=num_parents, axis_name=axis_name)
    even = balance(activations, num_parents=num_parents, energy=energy, axis_name=axis_name)
    size = frobenius_penalty(logits, frobenius=frobenius, axis_name=axis_name)
    return affinity_weight * shared + balance_weight * (1 - even) + frobenius_weight * size


def frobenius_penalty(
    logits: Array, *, frobenius: Frobenius = "squared", axis_name: str | None = None
) -> Array:
    """The last term of `gar_loss`: ΣZ², its value for 400 examples, or ‖ReLU(Z)‖_F.

    Args:
      logits: Z, `[batch, num_nodes]`.
      frobenius: `"squared"`, `"mean"` or `"norm"`.
      axis_name: mapped axis over which the batch is split.

    Raises:
      ValueError: unknown `frobenius`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import gar
      >>> z = jnp.array([[3.0, -4.0]])
      >>> gar.frobenius_penalty(z).item(), gar.frobenius_penalty(z, frobenius="norm").item()
      (25.0, 3.0)
      >>> gar.frobenius_penalty(z, frobenius="mean").item()
      10000.0
    """
    logits = at_least_float32(check_floating("logits", logits))
    if frobenius == "squared":
        return sum_over(jnp.sum(jnp.square(logits)), axis_name)
    if frobenius == "mean":
        return _PAPERS_BATCH * jnp.sum(node_energy(logits, axis_name=axis_name))
    if frobenius != "norm":
        names = ", ".join(map(repr, get_args(Frobenius)))
        raise ValueError(f"frobenius={frobenius!r} is not accepted: it must be one of {names}")
    total = sum_over(jnp.sum(jnp.square(jax.nn.relu(logits))), axis_name)
    return root(total)  # a finite gradient where nothing is active


def acol_pool(probabilities: Array, *, num_parents: int) -> Array:
    """Probabilities of the parents: the sums over their nodes.

    Args:
      probabilities: softmax over all nodes, `[batch, num_nodes]`.
      num_parents: number of parents; node j belongs to parent j mod `num_parents`.

    Returns:
      `[batch, num_parents]`.

    Raises:
      ValueError: wrong rank, or nodes that are not divided evenly.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import gar
      >>> gar.acol_pool(jnp.array([[0.5, 0.0, 0.25, 0.25]]), num_parents=2).tolist()
      [[0.75, 0.25]]
    """
    return jnp.sum(_by_parent("probabilities", probabilities, num_parents, least=1), axis=1)


def parent_loss(logits: Array, parents: Array, *, num_parents: int, axis_name: str | None = None) -> Array:
    """Cross-entropy of the parents' probabilities, which `gar_loss` is added to: what supervision teaches.

    Args:
      logits: Z, `[batch, num_nodes]`.
      parents: integers `[batch]`, the parent of each example.
      num_parents: number of parents.
      axis_name: mapped axis over which the batch is split.

    Returns:
      A scalar, at least 0.

    Raises:
      ValueError: wrong rank, nodes that are not divided evenly, or (outside jit, where they are known)
        parents that are not integers from 0 to `num_parents` − 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import gar
      >>> logits, parents = jnp.zeros((1, 4)), jnp.array([0])
      >>> round(gar.parent_loss(logits, parents, num_parents=2).item(), 4)  # log 2
      0.6931
    """
    by_parent = at_least_float32(_by_parent("logits", logits, num_parents, least=1))
    parents = check_labels("parents", parents, num_examples=len(by_parent), num_classes=num_parents)
    # In logarithms: a parent of no probability has a gradient too.
    pooled = jax.nn.log_softmax(jax.nn.logsumexp(by_parent, axis=1))
    loss = -jnp.mean(jnp.take_along_axis(pooled, parents[:, None], axis=1))
    return loss if axis_name is None else lax.pmean(loss, axis_name)


def _by_parent(name: str, values: Any, num_parents: int, least: int = 2) -> Array:
    """`[batch, nodes of a parent, num_parents]`."""
    values = check_array(name, values, ndim=2, axes="[batch, num_nodes]")
    nodes = values.shape[1]
    check_integer("num_parents", num_parents, low=1)
    if nodes % num_parents or nodes < least * num_parents:
        raise ValueError(
            f"num_parents={num_parents} is not accepted: {name} has {nodes} nodes, which must be a multiple "
            f"of it, at least {least} for each parent"
        )
    return values.reshape(values.shape[0], nodes // num_parents, num_parents)


def _mean_ratio(others: Array, diagonal: Array, nodes: int) -> Array:
    """Mean over parents of others / ((n − 1) diagonal); 0 where nothing is active."""
    active = diagonal > 0
    ratio = others / ((nodes - 1) * jnp.where(active, diagonal, 1))
    return jnp.mean(jnp.where(active, ratio, 0))
