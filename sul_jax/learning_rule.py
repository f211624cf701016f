"""The contract shared by all rules, and how rules are stacked.

A rule is three pure functions over a state that holds arrays only::

    init(key, inputs) -> state
    update(state, inputs, *, axis_name=None, **hyperparameters) -> (state, info)
    encode(state, inputs) -> codes

Under `jax.pmap`, `jax.shard_map` or `jax.vmap(..., axis_name=...)`, `update(..., axis_name=name)`
sums its sufficient statistics over the axis, so that a sharded step is the step on the whole batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax import Array, lax

if TYPE_CHECKING:
    import optax
    from flax import nnx


class LearningRule(NamedTuple):
    """A learning rule with its sizes and hyperparameters bound.

    Attributes:
      init: `init(key, inputs) -> state` from an example batch.
      update: `update(state, inputs, *, axis_name=None, **hyperparameters) -> (state, info)`.
      encode: `encode(state, inputs) -> codes`.

    Example:
      >>> from functools import partial
      >>> import jax
      >>> from sul_jax import LearningRule, k_subspaces
      >>> rule = LearningRule(
      ...     partial(k_subspaces.init, num_subspaces=4, rank=2), k_subspaces.update, k_subspaces.encode
      ... )
      >>> inputs = jax.random.normal(jax.random.key(0), (100, 8))
      >>> state, info = rule.update(rule.init(jax.random.key(1), inputs), inputs)
      >>> rule.encode(state, inputs).shape
      (100, 4)
    """

    init: Callable[..., Any]
    update: Callable[..., tuple[Any, Any]]
    encode: Callable[..., Array]


def stack(*rules: LearningRule) -> LearningRule:
    """Rules on top of each other, each learning from the codes of the one below.

    The state is a tuple, one state a rule. `encode` goes through as many rules as it is given
    states, so `encode(states[:2], inputs)` is what the third rule sees. `update(states, inputs,
    layer=i)` changes rule i alone (greedy training); without `layer` every rule takes a step, on
    the codes of the states before the step. Further keyword arguments go to the updated rules.

    Args:
      *rules: from the input upwards.

    Returns:
      A `LearningRule`; its info is rule i's, or the tuple of all of them without `layer`.

    Raises:
      ValueError: no rules, more states than rules, or a `layer` without a state.

    Example:
      >>> from functools import partial
      >>> import jax
      >>> from sul_jax import LearningRule, k_subspaces, stack
      >>> def layer(num_subspaces):
      ...     init = partial(k_subspaces.init, num_subspaces=num_subspaces, rank=2)
      ...     return LearningRule(init, k_subspaces.update, k_subspaces.encode)
      >>> net = stack(layer(6), layer(3))
      >>> inputs = jax.random.normal(jax.random.key(0), (100, 8))
      >>> states = net.init(jax.random.key(1), inputs)
      >>> states, info = net.update(states, inputs, layer=1)
      >>> net.encode(states[:1], inputs).shape, net.encode(states, inputs).shape
      ((100, 6), (100, 3))
    """
    if not rules:
        raise ValueError("stack() needs at least one rule, got none")

    def init(key: Array, inputs: Array) -> tuple[Any, ...]:
        states: list[Any] = []
        for rule, rule_key in zip(rules, jax.random.split(key, len(rules)), strict=True):
            states.append(rule.init(rule_key, inputs))
            inputs = rule.encode(states[-1], inputs)
        return tuple(states)

    def update(
        states: tuple[Any, ...],
        inputs: Array,
        *,
        layer: int | None = None,
        axis_name: str | None = None,
        **hyperparameters: Any,
    ) -> tuple[tuple[Any, ...], Any]:
        check_depth(states)
        if layer is not None:
            if not 0 <= layer < len(states):
                raise ValueError(
                    f"layer={layer} is not accepted: it must be between 0 and {len(states) - 1}, "
                    f"the rules that have a state"
                )
            inputs = encode(states[:layer], inputs)
            state, info = rules[layer].update(states[layer], inputs, axis_name=axis_name, **hyperparameters)
            return (*states[:layer], state, *states[layer + 1 :]), info
        updated, infos = [], []
        for rule, state in zip(rules, states, strict=False):
            new_state, info = rule.update(state, inputs, axis_name=axis_name, **hyperparameters)
            updated.append(new_state)
            infos.append(info)
            inputs = rule.encode(state, inputs)
        return tuple(updated), tuple(infos)

    def encode(states: tuple[Any, ...], inputs: Array) -> Array:
        check_depth(states)
        for rule, state in zip(rules, states, strict=False):
            inputs = rule.encode(state, inputs)
        return inputs

    def check_depth(states: tuple[Any, ...]) -> None:
        if len(states) > len(rules):
            raise ValueError(f"got {len(states)} states for a stack of {len(rules)} rules")

    return LearningRule(init, update, encode)


class GradientState(NamedTuple):
    """State of a rule that descends a loss.

    Attributes:
      params: parameters that the rule changes, as Flax's `nnx.State`.
      rest: what else the network holds: statistics of batch normalisation, parameters that stay as they are.
      optimizer: the optimizer's memory.
    """

    params: Any
    rest: Any
    optimizer: Any


class GradientInfo(NamedTuple):
    """What a step saw, before it changed the network.

    Attributes:
      loss: the scalar that is descended.
      terms: what the loss gave beside it, such as its parts by name; `()` if nothing.
    """

    loss: Array
    terms: Any


def gradient_rule(
    build: "Callable[[nnx.Rngs], nnx.Module]",
    loss: Callable[..., Any],
    optimizer: "optax.GradientTransformation",
    *,
    encode: Callable[..., Array] | None = None,
    trained: Sequence[str] | None = None,
    dtype: Any = None,
) -> LearningRule:
    """A Flax network, a loss and an optimizer as a rule: the one place where gradients meet an optimizer.

    Under `axis_name` statistics of batch normalisation and dropout are those of the whole batch, and the
    gradients of the shards are averaged: the loss must be the global one.

    Args:
      build: makes the untrained network.
      loss: `loss(network, inputs, *, key=None, axis_name=None, **hyperparameters)`, a scalar or a pair of
        the scalar and a tree of further scalars. The network is in `train()` mode.
      optimizer: from optax; those that look at the value of the loss (line searches, plateaus) are handed it.
      encode: `encode(network, inputs) -> codes`, with the network in `eval()` mode; by default its call.
      trained: names of the network's parts that learn; by default all of its parameters.
      dtype: in which the network computes, such as `jnp.bfloat16`; its parameters and statistics stay as they
        are. By default that of the parameters.

    Returns:
      A `LearningRule` with a `GradientState`. `init` does not look at its inputs. `update` hands `key`,
      where one is given, and further keyword arguments on to the loss. To have the network itself:
      `nnx.update(network, state.params, state.rest)`.

    Raises:
      ValueError: a name in `trained` that the network lacks.

    Example:
      >>> import jax
      >>> import optax
      >>> from flax import nnx
      >>> from sul_jax import coding_rate, gradient_rule, whitening
      >>> def loss(network, inputs, *, axis_name=None):  # spread the features over all directions
      ...     unit = whitening.normalize(network(inputs))
      ...     return -coding_rate.coding_rate(unit, eps_squared=0.1, axis_name=axis_name)
      >>> rule = gradient_rule(lambda rngs: nnx.Linear(6, 3, rngs=rngs), loss, optax.adam(0.1))
      >>> inputs = jax.random.normal(jax.random.key(0), (50, 6))
      >>> state = rule.init(jax.random.key(1), inputs)
      >>> state, first = rule.update(state, inputs)
      >>> state, second = rule.update(state, inputs)
      >>> bool(second.loss < first.loss), rule.encode(state, inputs).shape
      (True, (50, 3))
    """
    # Whoever has a network and an optimizer has imported these already; the other rules need neither.
    import optax
    from flax import nnx

    def learns(path: tuple[Any, ...], value: Any) -> bool:
        return isinstance(value, nnx.Param) and (trained is None or path[0] in trained)

    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, everything = nnx.split(abstract)
    missing = set(trained or ()) - {str(name) for name in everything}
    if missing:
        raise ValueError(f"trained={tuple(trained or ())} is not accepted: the network has no {missing}")
    descent = optax.with_extra_args_support(optimizer)

    def init(key: Array, inputs: Array) -> GradientState:
        del inputs  # the network knows its sizes
        parts: Any = nnx.split(build(nnx.Rngs(key)), learns, ...)
        _, params, rest = parts
        return GradientState(params, rest, descent.init(params))

    def merge(params: Any, rest: Any) -> Any:
        if dtype is not None:
            low = partial(jax.tree.map, lambda leaf: leaf.astype(dtype))
            fixed, others = nnx.split_state(rest, nnx.Param, ...)
            params, rest = low(params), nnx.merge_state(low(fixed), others)
        return nnx.merge(graph, params, rest, copy=True)  # statistics change at this level of tracing

    def update(
        state: GradientState,
        inputs: Array,
        *,
        key: Array | None = None,
        axis_name: str | None = None,
        **hyperparameters: Any,
    ) -> tuple[GradientState, GradientInfo]:
        drawn = {} if key is None else {"key": key}

        def objective(params: Any) -> tuple[Array, tuple[Any, Any]]:
            network = merge(params, state.rest)
            network.train()
            if axis_name is not None:  # batch normalisation and dropout then speak of the whole batch
                network.set_attributes(axis_name=axis_name, raise_if_not_found=False)
            result = loss(network, inputs, axis_name=axis_name, **drawn, **hyperparameters)
            value, terms = result if isinstance(result, tuple) else (result, ())
            # Not the fixed parameters: the network's are rounded to `dtype`.
            moved = nnx.state(network, nnx.Not(nnx.Param))
            before = nnx.filter_state(state.rest, nnx.Not(nnx.Param))
            moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, before)
            return value, (terms, nnx.merge_state(state.rest, moved))

        (value, (terms, rest)), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
        if axis_name is not None:
            # The loss is the global one: what each shard sees of its gradient averages to the whole.
            gradients = lax.pmean(gradients, axis_name)
        changes, memory = descent.update(
            gradients,
            state.optimizer,
            state.params,
            value=value,
            grad=gradients,
            value_fn=lambda params: objective(params)[0],
        )
        params = optax.apply_updates(state.params, changes)
        return GradientState(params, rest, memory), GradientInfo(value, terms)

    def codes(state: GradientState, inputs: Array) -> Array:
        network = merge(state.params, state.rest)
        network.eval()
        return network(inputs) if encode is None else encode(network, inputs)

    return LearningRule(init, update, codes)
