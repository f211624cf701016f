"""How rules are trained: minibatches, compiled steps, layers one after the other.

A rule's `update` takes one step. Here are the loops around it, for one network or several seeds side by side
(`seeds.over_seeds`), with a callback for progress and checkpoints:

- `shuffled` and `Minibatches` say which examples a step sees;
- `compiled` turns a step into a function of several steps;
- `train` takes all steps of a training, `train_layers` those of a stack, layer after layer;
- `map_batches` applies what was learned to many examples;
- `sum_chunks` sums what a step on all of the data needs, if they do not fit into memory.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from sul_jax._check import check_integer
from sul_jax._parallel import gathered
from sul_jax.learning_rule import LearningRule, stack
from sul_jax.seeds import over_seeds

Step = Callable[..., tuple[Any, Any]]
"""`step(state, inputs, *arrays) -> (state, info)`."""
Inputs = Callable[[int, int], Any]
"""From first and end to the inputs of steps first, …, end − 1: a tree with a leading axis of steps."""
Callback = Callable[[int, Any, Any], None]
"""Called with the number of steps done, the state, and the infos of the last steps."""


def scan_updates(
    update: Step,
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
      indices: `[num_steps, batch]`, the examples of each step, such as those of `shuffled`.
      **per_step: keyword arguments with a leading axis of steps, such as `key`, `warmup` or
        `learning_rate`.

    Returns:
      The state after the last step and the infos with a leading axis of steps.

    Example:
      >>> import jax
      >>> from sul_jax import k_subspaces, training
      >>> inputs = jax.random.normal(jax.random.key(0), (120, 8))
      >>> rule = k_subspaces.rule(num_subspaces=4, rank=2)
      >>> state = rule.init(jax.random.key(1), inputs)
      >>> order = training.shuffled(0, 120, 30)
      >>> state, info = training.scan_updates(rule.update, state, inputs, order)
      >>> info.energy.shape
      (4,)
    """
    inputs = jnp.asarray(inputs)  # NumPy's cannot be indexed in a scan

    def step(state: Any, step_inputs: tuple[Array, dict[str, Any]]) -> tuple[Any, Any]:
        batch, keywords = step_inputs
        return update(state, inputs[batch], **keywords)

    return lax.scan(step, state, (jnp.asarray(indices), per_step))


def shuffled(
    entropy: int | Sequence[int],
    num_examples: int,
    batch_size: int,
    *,
    num_steps: int | None = None,
    drop_last: bool = True,
) -> np.ndarray:
    """Indices of minibatches: passes over the examples, each in a random order of its own.

    Args:
      entropy: seeds NumPy's generator; whole numbers of at least 0.
      num_examples: to choose from.
      batch_size: examples in a minibatch, at most `num_examples`.
      num_steps: minibatches; by default those of one pass.
      drop_last: leave out what a pass has beyond whole minibatches; False fills the minibatch up from the
        next pass.

    Returns:
      int64 `[num_steps, batch_size]`.

    Raises:
      ValueError: a size out of range.

    Example:
      >>> from sul_jax import training
      >>> training.shuffled(0, 7, 2).shape, training.shuffled(0, 7, 2, num_steps=5).shape
      ((3, 2), (5, 2))
    """
    check_integer("num_examples", num_examples, low=1)
    high, why = (num_examples, ", the number of examples") if drop_last else (None, "")
    check_integer("batch_size", batch_size, low=1, high=high, why=why)
    used = num_examples // batch_size * batch_size if drop_last else num_examples
    total = (used // batch_size if num_steps is None else num_steps) * batch_size
    generator = np.random.default_rng(entropy)
    passes = [generator.permutation(num_examples)[:used] for _ in range(-(-total // used))]
    return np.concatenate([np.zeros(0, np.int64), *passes])[:total].reshape(-1, batch_size)


class Minibatch(NamedTuple):
    """What a step sees of the data, by indices.

    Attributes:
      indices: int32 `[batch_size]`.
      key: of the step.
    """

    indices: Any
    key: Any


class Minibatches:
    """Minibatches of epochs shuffled by keys, and a key for every step.

    An instance is called with the first step and the end, and gives a `Minibatch` with leading axes of steps
    and, for several keys, of seeds: `indices` `[steps, seeds, batch_size]`, `key` `[steps, seeds]`.

    Args:
      keys: one key, or `[seeds]`.
      num_examples: to choose from.
      batch_size: examples in a minibatch, at most `num_examples`.
      fill_last: the last minibatch of an epoch is filled up from its beginning; otherwise what an epoch has
        beyond whole minibatches is left out.

    Raises:
      ValueError: a size out of range.

    Attributes:
      per_epoch: minibatches of an epoch.

    Example:
      >>> import jax
      >>> from sul_jax import training
      >>> batches = training.Minibatches(jax.random.key(0), 10, 4, fill_last=True)
      >>> batches.per_epoch, batches(0, 5).indices.shape
      (3, (5, 4))
    """

    def __init__(self, keys: Array, num_examples: int, batch_size: int, *, fill_last: bool = False):
        check_integer("num_examples", num_examples, low=1)
        check_integer("batch_size", batch_size, low=1, high=num_examples, why=", the number of examples")
        self.per_epoch = -(-num_examples // batch_size) if fill_last else num_examples // batch_size
        self._keys = jnp.atleast_1d(keys)
        self._several = keys.ndim > 0
        self._epoch, self._order = -1, np.empty(0)
        # Wraps around where the last minibatch is filled up.
        self._places = np.arange(self.per_epoch * batch_size).reshape(-1, batch_size) % num_examples
        self._permutation = jax.jit(
            jax.vmap(
                lambda key, epoch: jax.random.permutation(_folded(key, 0, epoch), num_examples), (0, None)
            )
        )
        self._step_keys = jax.jit(
            jax.vmap(jax.vmap(lambda key, index: _folded(key, 1, index), (0, None)), (None, 0))
        )

    def __call__(self, first: int, end: int) -> Minibatch:
        indices = np.stack([self._of_step(index) for index in range(first, end)])
        keys = self._step_keys(self._keys, jnp.arange(first, end))
        return Minibatch(indices, keys) if self._several else Minibatch(indices[:, 0], keys[:, 0])

    def _of_step(self, index: int) -> np.ndarray:
        """`[seeds, batch_size]`; the order of an epoch is drawn once."""
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.asarray(self._permutation(self._keys, epoch))
        return self._order[:, self._places[place]]


def _folded(key: Array, stream: int, number: Any) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, stream), number)


def compiled(step: Step, *, scan: bool = True) -> Step:
    """A function of several steps, compiled once for each number of them.

    Args:
      step: from a state, one step's inputs and further arrays to the new state and an info.
      scan: several steps are one program; otherwise a program a step, as `scans_convolutions` advises.

    Returns:
      A function of a state, which is donated, inputs with a leading axis of steps, and the further arrays
      (not constants of the compiled program, as captured ones would be), to the new state and the infos with
      a leading axis of steps.

    Example:
      >>> import jax.numpy as jnp
      >>> from sul_jax import training
      >>> add = training.compiled(lambda total, number, factor: (total + factor * number, factor * number))
      >>> [value.tolist() for value in add(jnp.zeros(()), jnp.arange(3.0), jnp.array(2.0))]
      [6.0, [0.0, 2.0, 4.0]]
    """
    one = jax.jit(step, donate_argnums=0)

    @partial(jax.jit, donate_argnums=0)
    def several(state: Any, inputs: Any, arrays: tuple[Any, ...]) -> tuple[Any, Any]:
        return lax.scan(lambda state, own: step(state, own, *arrays), state, inputs)

    def steps(state: Any, inputs: Any, *arrays: Any) -> tuple[Any, Any]:
        number = len(jax.tree.leaves(inputs)[0])
        if scan and number > 1:
            return several(state, inputs, arrays)
        infos = []
        for index in range(number):
            own = jax.tree.map(lambda leaf, index=index: leaf[index], inputs)
            state, info = one(state, own, *arrays)
            infos.append(info)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *infos)

    return steps


def scans_convolutions() -> bool:
    """Whether several steps of a network of convolutions should be one compiled program: not on a CPU.

    In a loop XLA's CPU runs convolutions on one core, and slower still: 9× for a ResNet.

    Example:
      >>> from sul_jax import training
      >>> training.scans_convolutions() in (True, False)
      True
    """
    return jax.default_backend() != "cpu"


def train(
    steps: Step,
    state: Any,
    inputs: Inputs,
    *arrays: Any,
    num_steps: int,
    start: int = 0,
    stride: int = 1,
    stops: Collection[int] = (),
    callback: Callback | None = None,
) -> Any:
    """Takes all steps of a training, a few at a time.

    Args:
      steps: from `compiled`.
      state: a tree of arrays; not used again, since `steps` takes its memory.
      inputs: of the steps from first to before end.
      *arrays: handed to every step, such as the data set.
      num_steps: in all.
      start: steps that `state` has taken already.
      stride: steps between two calls of `callback`, and of one compiled program where `steps` scans.
      stops: numbers of steps after which there is a call as well.
      callback: called with the number of steps done, the state (to be looked at, not kept) and the infos of
        the last steps.

    Returns:
      The last state.

    Example:
      >>> import jax
      >>> from sul_jax import hebbian, training
      >>> rule = hebbian.rule(num_units=4, learning_rate=0.02)
      >>> vectors = jax.random.uniform(jax.random.key(0), (60, 6))
      >>> steps = training.compiled(lambda state, batch, vectors: rule.update(state, vectors[batch.indices]))
      >>> batches = training.Minibatches(jax.random.key(1), 60, 20)
      >>> state = training.train(steps, rule.init(jax.random.key(2), vectors), batches, vectors, num_steps=9)
      >>> state.weights.shape
      (4, 6)
    """
    check_integer("num_steps", num_steps, low=0)
    check_integer("stride", stride, low=1)
    done = start
    while done < num_steps:
        end = min(done + stride, num_steps, *(stop for stop in stops if stop > done))
        state, infos = steps(state, inputs(done, end), *arrays)
        done = end
        if callback is not None:
            callback(done, state, infos)
    return state


def map_batches(
    function: Callable[[Array], Any], inputs: np.ndarray | Array, *, batch_size: int = 500
) -> Any:
    """Applies a compiled function, such as a rule's `encode`, to many inputs batch by batch.

    The function sees batches of one size, so that it is compiled once.

    Args:
      function: maps `[batch, ...]` to an array `[batch, ...]` or a tree of such arrays, example by example.
      inputs: `[num_examples, ...]`; a NumPy array is put on the device a batch at a time.
      batch_size: examples at a time; fewer where there are no more.

    Returns:
      The results of all, put together.

    Raises:
      ValueError: no inputs, or a batch size below 1.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from sul_jax import training
      >>> squares = training.map_batches(jax.jit(lambda x: x**2), np.arange(7.0), batch_size=3)
      >>> squares.tolist()
      [0.0, 1.0, 4.0, 9.0, 16.0, 25.0, 36.0]
    """
    number = len(inputs)
    check_integer("len(inputs)", number, low=1)
    check_integer("batch_size", batch_size, low=1)
    if number <= batch_size:
        return function(jnp.asarray(inputs))
    starts = range(0, number, batch_size)
    # Slicing an array on the device would compile a program for each place.
    cut = (
        (lambda s: jnp.asarray(inputs[s : s + batch_size]))
        if isinstance(inputs, np.ndarray)
        else (lambda s: _window(inputs, s, size=batch_size))
    )
    # The last batch ends with the last example; those that the one before has had already are cut off.
    parts = [function(cut(min(s, number - batch_size))) for s in starts]
    repeated = len(starts) * batch_size - number
    parts[-1] = jax.tree.map(lambda array: array[repeated:], parts[-1])
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


@partial(jax.jit, static_argnames="size")
def _window(inputs: Array, start: int | Array, *, size: int) -> Array:
    return lax.dynamic_slice_in_dim(inputs, start, size)


def sum_chunks(statistics: Callable[..., Any], state: Any, chunks: Iterable[Any]) -> Any:
    """Statistics of all chunks of the data together: with a rule's `apply`, one exact step on the whole.

    They are added up in float64 on the host, and over all processes of `jax.distributed`, of which each may
    have other chunks, as many as it likes.

    Args:
      statistics: `statistics(state, chunk)`, compiled, such as that of `k_means` or `k_subspaces`.
      state: of the rule.
      chunks: of inputs; a tuple is handed on as several arguments.

    Returns:
      The sums, a tree of arrays of the types of one chunk's.

    Raises:
      ValueError: no chunks.

    Example:
      >>> import jax
      >>> from sul_jax import k_means, training
      >>> inputs = jax.random.normal(jax.random.key(0), (90, 6))
      >>> state = k_means.init(jax.random.key(1), inputs, num_clusters=3)
      >>> chunks = (inputs[first : first + 30] for first in (0, 30, 60))
      >>> sums = training.sum_chunks(jax.jit(k_means.statistics), state, chunks)
      >>> state, info = k_means.apply(state, sums)
      >>> int(info.counts.sum())
      90
    """
    total, like = None, None
    for chunk in chunks:
        own = statistics(state, *(chunk if isinstance(chunk, tuple) else (chunk,)))
        like = jax.tree.map(lambda leaf: leaf.dtype, own)
        wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(_wide(leaf.dtype)), own)
        total = wide if total is None else jax.tree.map(np.add, total, wide)
    if total is None:
        raise ValueError("chunks is empty; at least one is needed")
    if jax.process_count() > 1:  # as float32: what goes from process to process is an array of JAX
        every = gathered(jax.tree.map(lambda leaf, kind: leaf.astype(kind)[None], total, like))
        total = jax.tree.map(lambda leaf: np.sum(leaf, axis=0, dtype=_wide(leaf.dtype)), every)
    return jax.tree.map(lambda leaf, kind: jnp.asarray(leaf.astype(kind)), total, like)


def _wide(kind: Any) -> Any:
    return np.float64 if jnp.issubdtype(kind, jnp.floating) else np.int64


class LayerTraining(NamedTuple):
    """How `train_layers` trains one layer.

    Attributes:
      inputs: of the layer's steps; by `see` they become the network's inputs.
      num_steps: minibatches; 0 leaves the first state as it is.
      keys: of the first state, `[seeds]`.
    """

    inputs: Inputs
    num_steps: int
    keys: Array


def train_layers(
    rules: Sequence[LearningRule],
    states: Sequence[Any],
    plan: Callable[[int], LayerTraining],
    *arrays: Any,
    see: Callable[..., Array] = lambda inputs: inputs,
    hyperparameters: Callable[[np.ndarray], Mapping[str, Any]] = lambda steps: {},
    unfinished: tuple[Any, int] | None = None,
    stride: int = 1,
    mesh: Mesh | None = None,
    callback: Callable[[int, int, tuple[Any, ...], Any], None] | None = None,
    programs: "LayerPrograms | None" = None,
) -> tuple[Any, ...]:
    """Trains rules one after the other, each on what the finished ones below make of its inputs.

    All states have a leading axis of seeds, and so have the inputs of a step. A layer's first state is made
    from its first minibatch.

    Args:
      rules: of the whole stack, from the input upwards.
      states: of the rules that have learned already.
      plan: from a rule's place to how it is trained.
      *arrays: handed to `see`, without an axis of seeds, such as the data set.
      see: from one seed's inputs of a step and `arrays` to what the lowest rule sees, `[batch, ...]`.
      hyperparameters: from numbers of steps to keyword arguments of `update`, each with an axis of steps.
      unfinished: state of the first rule to train and the steps that it has taken, to go on from there.
      stride: steps between two calls of `callback`, and of one compiled program.
      mesh: splits every minibatch over its axis `batch`.
      callback: called with the rule's place, its steps done, all states, and the infos `[steps, seeds, ...]`.
      programs: compiled by an earlier call with the same rules, `see` and `mesh`.

    Returns:
      The states of all rules.

    Example:
      >>> import jax
      >>> from sul_jax import energy, training
      >>> rules = [energy.layer_rule(energy.EnergyLayer(8, 2, 3, 5, 0)) for _ in range(2)]
      >>> images = jax.random.uniform(jax.random.key(0), (20, 12, 12, 1))
      >>> def plan(layer):
      ...     order = training.shuffled([0, layer], 20, 5)[:, None]  # of one seed
      ...     keys = jax.random.split(jax.random.key(layer), 1)
      ...     return training.LayerTraining(lambda first, end: order[first:end], len(order), keys)
      >>> see = lambda indices, images: images[indices]
      >>> states = training.train_layers(rules, (), plan, images, see=see)
      >>> [state.bases.shape for state in states]
      [(1, 8, 2, 25), (1, 8, 2, 200)]
    """
    made = LayerPrograms(rules, see, mesh) if programs is None else programs
    learned = tuple(states)
    for place in range(len(learned), len(rules)):
        inputs, num_steps, keys = plan(place)
        if unfinished is not None:
            (state, start), unfinished = unfinished, None
        else:
            first = jax.tree.map(lambda leaf: leaf[0], inputs(0, 1))
            state, start = made.begin(place)(keys, learned, first, arrays), 0
        state = train(
            made.steps(place),
            state,
            partial(_with_keywords, inputs, hyperparameters, len(keys)),
            learned,
            arrays,
            num_steps=num_steps,
            start=start,
            stride=stride,
            callback=partial(_report, callback, place, learned),
        )
        learned = (*learned, state)
    return learned


def _with_keywords(
    inputs: Inputs, hyperparameters: Any, num_seeds: int, first: int, end: int
) -> tuple[Any, Any]:
    """Inputs of steps, and the steps' hyperparameters for every seed."""
    chosen = dict(hyperparameters(np.arange(first, end)))
    return inputs(first, end), jax.tree.map(lambda one: np.repeat(one[:, None], num_seeds, axis=1), chosen)


def _report(callback: Any, place: int, below: tuple[Any, ...], done: int, state: Any, infos: Any) -> None:
    if callback is not None:
        callback(place, done, (*below, state), infos)


class LayerPrograms:
    """The compiled programs of `train_layers`, one to begin and one to train each layer.

    Networks that are trained one after the other share them.

    Args:
      rules: as in `train_layers`, as are the others.
    """

    def __init__(
        self,
        rules: Sequence[LearningRule],
        see: Callable[..., Array] = lambda inputs: inputs,
        mesh: Mesh | None = None,
    ):
        self._rules, self._see, self._mesh = tuple(rules), see, mesh
        self._net = stack(*rules)
        self._begin: dict[int, Any] = {}
        self._steps: dict[int, Step] = {}

    def begin(self, place: int) -> Callable[..., Any]:
        """A function of keys, the states below, inputs and arrays to the first state of a layer."""
        if place not in self._begin:

            def one(key: Array, below: tuple[Any, ...], inputs: Any, arrays: tuple[Any, ...]) -> Any:
                return self._rules[place].init(key, self._net.encode(below, self._see(inputs, *arrays)))

            self._begin[place] = jax.jit(over_seeds(one, (0, 0, 0, None)))
        return self._begin[place]

    def steps(self, place: int) -> Step:
        """The `compiled` steps of a layer."""
        if place not in self._steps:
            axis_name = None if self._mesh is None else "batch"

            def update(
                state: Any, own: tuple[Any, Any], below: tuple[Any, ...], arrays: tuple[Any, ...]
            ) -> tuple[Any, Any]:
                inputs, keywords = own
                codes = self._net.encode(below, self._see(inputs, *arrays))
                return self._rules[place].update(state, codes, axis_name=axis_name, **keywords)

            if self._mesh is not None:
                whole, part = PartitionSpec(), PartitionSpec("batch")
                specs = (whole, (part, whole), whole, whole)
                update = jax.shard_map(update, mesh=self._mesh, in_specs=specs, out_specs=whole)
            self._steps[place] = compiled(over_seeds(update, (0, 0, 0, None)))
        return self._steps[place]
