"""The contract shared by all rules, and how rules are stacked.

A rule is three pure functions over a state that holds arrays only:

    init(key, inputs) -> state
    update(state, inputs, *, axis_name=None, **hyperparameters) -> (state, info)
    encode(state, inputs) -> codes

Under `jax.pmap`, `jax.shard_map` or `jax.vmap(..., axis_name=...)`, `update(..., axis_name=name)`
sums its sufficient statistics over the axis, so that a sharded step is the step on the whole batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from sul_jax._check import check_integer

if TYPE_CHECKING:
    import optax


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


class LossState(NamedTuple):
    """State of a rule that descends a loss.

    Attributes:
      params: what `init` gave, changed by the optimizer.
      optimizer: the optimizer's own state.
    """

    params: Any
    optimizer: Any


class LossInfo(NamedTuple):
    """The loss before the step."""

    loss: Array


def from_loss(
    loss: Callable[..., Array],
    init: Callable[[Array, Array], Any],
    apply: Callable[[Any, Array], Any],
    optimizer: "optax.GradientTransformation",
) -> LearningRule:
    """A rule that takes an optimizer's step down a loss, so that it can sit in a `stack`.

    Args:
      loss: `loss(activations, *, axis_name=None, **hyperparameters) -> scalar`, global under
        `axis_name` as those of `coding_rate` are.
      init: `init(key, inputs) -> params`, any tree of arrays.
      apply: `apply(params, inputs) -> activations`; also the rule's `encode`.
      optimizer: from optax.

    Returns:
      A `LearningRule` with a `LossState`; its update hands keyword arguments on to the loss.

    Example:
      >>> import jax
      >>> import optax
      >>> from sul_jax import coding_rate, from_loss, whitening
      >>> def loss(features, *, axis_name=None):  # spread the features over all directions
      ...     unit = whitening.normalize(features)
      ...     return -coding_rate.coding_rate(unit, eps_squared=0.1, axis_name=axis_name)
      >>> def init(key, inputs):
      ...     return jax.random.normal(key, (inputs.shape[1], 3))
      >>> rule = from_loss(loss, init, lambda params, inputs: inputs @ params, optax.adam(0.1))
      >>> inputs = jax.random.normal(jax.random.key(0), (50, 6))
      >>> state = rule.init(jax.random.key(1), inputs)
      >>> state, first = rule.update(state, inputs)
      >>> state, second = rule.update(state, inputs)
      >>> bool(second.loss < first.loss)
      True
    """

    from optax import apply_updates  # whoever has an optimizer has imported it already

    def begin(key: Array, inputs: Array) -> LossState:
        params = init(key, inputs)
        return LossState(params, optimizer.init(params))

    def update(
        state: LossState, inputs: Array, *, axis_name: str | None = None, **hyperparameters: Any
    ) -> tuple[LossState, LossInfo]:
        def of_params(params: Any) -> Array:
            return loss(apply(params, inputs), axis_name=axis_name, **hyperparameters)

        value, gradients = jax.value_and_grad(of_params)(state.params)
        if axis_name is not None:
            # The loss is the global one: what each shard sees of its gradient averages to the whole.
            gradients = lax.pmean(gradients, axis_name)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        return LossState(apply_updates(state.params, updates), optimizer_state), LossInfo(value)

    def encode(state: LossState, inputs: Array) -> Array:
        return apply(state.params, inputs)

    return LearningRule(begin, update, encode)


def scan_updates(
    update: Callable[..., tuple[Any, Any]],
    state: Any,
    inputs: Array,
    indices: Array,
    **per_step: Any,
) -> tuple[Any, Any]:
    """Minibatch steps `update(state, inputs[indices[i]])` for i = 0, 1, … as one `lax.scan`.

    Args:
      update: a rule's update with its fixed keyword arguments bound.
      state: the state before the first step.
      inputs: the data, `[num_examples, ...]`.
      indices: `[num_steps, batch]`, the examples of each step.
      **per_step: keyword arguments with a leading axis of steps, such as `warmup` or
        `learning_rate`.

    Returns:
      The state after the last step and the infos with a leading axis of steps.

    Example:
      >>> import jax
      >>> from sul_jax import k_subspaces, learning_rule
      >>> inputs = jax.random.normal(jax.random.key(0), (120, 8))
      >>> state = k_subspaces.init(jax.random.key(1), inputs, num_subspaces=4, rank=2)
      >>> order = jax.random.permutation(jax.random.key(2), 120).reshape(4, 30)
      >>> state, info = learning_rule.scan_updates(k_subspaces.update, state, inputs, order)
      >>> info.energy.shape
      (4,)
    """

    inputs = jnp.asarray(inputs)  # NumPy's cannot be indexed in a scan

    def step(state: Any, step_inputs: tuple[Array, dict[str, Any]]) -> tuple[Any, Any]:
        batch, keywords = step_inputs
        return update(state, inputs[batch], **keywords)

    return lax.scan(step, state, (indices, per_step))


class Trained(NamedTuple):
    """What `train_greedily` gave.

    Attributes:
      states: one a rule, as those of a `stack`.
      infos: of each rule, with a leading axis of steps.
      codes: the top rule's, `[num_batches * batch_size, ...]`, in the order of the inputs.
    """

    states: tuple[Any, ...]
    infos: tuple[Any, ...]
    codes: Array


def train_greedily(
    key: Array,
    inputs: Array,
    rules: Sequence[LearningRule],
    *,
    batch_size: int,
    passes: int = 1,
    num_batches: int | Array | None = None,
    hyperparameters: Callable[[Array], Mapping[str, Any]] = lambda step: {},
) -> Trained:
    """Trains rules one after the other, each on the codes of the finished one below.

    The codes of all inputs are held, so that each rule encodes them once. Minibatches are taken in the order
    of the inputs: shuffle them first. It is for one device; to split minibatches over several, loop over
    `update` with `axis_name`.

    Args:
      key: `jax.random.key`.
      inputs: `[num_examples, ...]`; a last partial minibatch is left out.
      rules: from the input upwards. A rule's first state is made from the first minibatch.
      batch_size: examples in a minibatch.
      passes: over the inputs, of each rule; 0 leaves the first states as they are.
      num_batches: learn from this many minibatches, by default all. It may be traced: one compiled program
        then serves many budgets. Infos and codes beyond it are zero.
      hyperparameters: from the index of a rule's step to keyword arguments of `update`.

    Returns:
      A `Trained`.

    Raises:
      ValueError: `batch_size` or `passes` out of range, or no rules.

    Example:
      >>> import jax
      >>> from sul_jax import energy, learning_rule
      >>> rules = [energy.layer_rule(energy.EnergyLayer(8, 2, 3, 5, 0)) for _ in range(2)]
      >>> images = jax.random.uniform(jax.random.key(0), (20, 12, 12, 1))
      >>> found = learning_rule.train_greedily(jax.random.key(1), images, rules, batch_size=5, passes=2)
      >>> found.codes.shape, found.infos[0].energy.shape
      ((20, 4, 4, 8), (8,))
    """
    if not rules:
        raise ValueError("rules is empty; at least one rule is needed")
    check_integer("batch_size", batch_size, low=1, high=inputs.shape[0], why=", the number of inputs")
    check_integer("passes", passes, low=0)
    total = inputs.shape[0] // batch_size
    if isinstance(num_batches, int):
        check_integer("num_batches", num_batches, low=1, high=total)
    count = total if num_batches is None else num_batches
    batches = jnp.asarray(inputs[: total * batch_size]).reshape(total, batch_size, *inputs.shape[1:])
    states, infos = [], []
    for rule, rule_key in zip(rules, jax.random.split(key, len(rules)), strict=True):
        state, info = _train(rule, rule.init(rule_key, batches[0]), batches, passes, count, hyperparameters)
        states.append(state)
        infos.append(info)
        batches = _encode(rule, state, batches, count)
    codes = batches.reshape(total * batch_size, *batches.shape[2:])
    return Trained(tuple(states), tuple(infos), codes)


def _train(
    rule: LearningRule,
    state: Any,
    batches: Array,
    passes: int,
    count: int | Array,
    hyperparameters: Callable[[Array], Mapping[str, Any]],
) -> tuple[Any, Any]:
    def update(state: Any, index: Array) -> tuple[Any, Any]:
        return rule.update(state, batches[index % count], **hyperparameters(index))

    shapes = jax.eval_shape(update, state, jnp.zeros((), jnp.int32))[1]
    infos = jax.tree.map(lambda s: jnp.zeros((passes * len(batches), *s.shape), s.dtype), shapes)
    if not passes:
        return state, infos

    def step(index: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        state, info = update(carry[0], index)
        return state, jax.tree.map(lambda all_of, one: all_of.at[index].set(one), carry[1], info)

    result: tuple[Any, Any] = lax.fori_loop(0, passes * count, step, (state, infos))
    return result


def _encode(rule: LearningRule, state: Any, batches: Array, count: int | Array) -> Array:
    shape = jax.eval_shape(rule.encode, state, batches[0])

    def step(index: Array, codes: Array) -> Array:
        return codes.at[index].set(rule.encode(state, batches[index]))

    codes: Array = lax.fori_loop(0, count, step, jnp.zeros((len(batches), *shape.shape), shape.dtype))
    return codes
