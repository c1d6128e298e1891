"""The one training loop, behind experiments and cross-validation: many networks, one compiled step.

A *lane* is one network to train: a trial, which fixes its initialisation and the order of its
minibatches, and a normalization constant c, which touches neither. So the networks of one trial
differ in nothing but c. `train` goes like this:

1. initialise all lanes;
2. cut the epochs into pieces of at most ``steps_per_call`` minibatches, or put several short
   epochs into one piece;
3. for each piece call one compiled function, which shuffles by (seed, trial, epoch) and takes the
   optimizer's step on each of the piece's minibatches, augmented if the task says how, in every
   lane;
4. note every lane's mean loss and share of zeros, and tell whoever watches;
5. return the parameters of all lanes, stacked.

c is data, not a constant of the compiled program: another c costs no compilation, and c = inf is a
lane like any other. So is a learning rate, where lanes name one. All devices of all processes get
as many lanes, and a lane stays on its device. Every process is called with the same arguments and
returns everything.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

Params = Any
Data = tuple[ArrayLike, ArrayLike]
Apply = Callable[[Params, jax.Array], Any]
Metric = Callable[[Any, jax.Array], jax.Array]
_Chosen = tuple[Any, ...]  # what `Task.optimizer` is called with: c, perhaps a rate


class Lane(NamedTuple):
    """One network to train.

    Attributes:
        trial: fixes the initial weights and the minibatches, together with the seed.
        c: the normalization constant, ``inf`` for none; or one for each layer, by name: then every
            lane names the same layers.
        rate: the learning rate, where the lanes differ in theirs: then every lane names one.
    """

    trial: int
    c: float | Mapping[str, float]
    rate: float | None = None


class Task(NamedTuple):
    """What is trained: functions, the same for every lane.

    Attributes:
        init: ``(key, c) -> params``.
        apply: ``(params, x) -> outputs``, for a batch of inputs.
        loss: ``(outputs, y) -> (batch,)``; its mean is minimised.
        optimizer: ``c -> transformation``, which keeps the lane in its ball; called with
            ``(c, rate)`` where the lanes name their rates. Both are traced.
        augment: ``(key, x) -> x``, what training gives ``apply`` for a minibatch's inputs x; they
            themselves by default.
            The key depends on the seed, the trial and the step, not on c.
        counted: ``params -> params``, those whose zeros are counted; all by default.
    """

    init: Callable[[jax.Array, Any], Params]
    apply: Apply
    loss: Metric
    optimizer: Callable[..., optax.GradientTransformation]
    augment: Callable[[jax.Array, jax.Array], Any] | None = None
    counted: Callable[[Params], Params] = lambda params: params


class Progress(NamedTuple):
    """What one compiled call did: an entry of the history, and news for a progress bar.

    Attributes:
        step: minibatches taken so far by every lane.
        loss: ``(lanes,)`` mean training loss over the minibatches of the call.
        sparsity: ``(lanes,)`` exact zeros after the call, in percent of the parameters counted.
    """

    step: int
    loss: np.ndarray
    sparsity: np.ndarray


class Trained(NamedTuple):
    """What training leaves behind.

    Attributes:
        params: the parameters; every leaf has a leading axis of lanes.
        history: one `Progress` per compiled call.
    """

    params: Params
    history: list[Progress]


class Snapshot(NamedTuple):
    """All that training needs to go on later as if it had never stopped; nothing of it on a device.

    The schedule's step is part of the optimizer's state, the order of the data follows from seed,
    trial and epoch.

    Attributes:
        state: the leaves of parameters and optimizer state, each with a leading axis of lanes.
        history: what was done so far.
    """

    state: list[np.ndarray]
    history: list[Progress]


class _State(NamedTuple):
    """What a lane takes from one step into the next: parameters and optimizer state."""

    params: Params
    opt_state: optax.OptState


def train(
    task: Task,
    lanes: Sequence[Lane],
    data: Data,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    rows: ArrayLike | None = None,
    steps_per_call: int = 100,
    lanes_at_once: int | None = None,
    watch: Callable[[Progress], None] | None = None,
    resume: Snapshot | None = None,
    keep: Callable[[Snapshot], None] | None = None,
) -> Trained:
    """Train every lane by projected gradient descent on minibatches (Algorithm 1 of the paper).

    Args:
        task: the network, its loss and its optimizer.
        lanes: the networks to train.
        data: inputs ``(sets, n, ...)`` and targets ``(sets, n, ...)``: trial ``t`` trains on set
            ``t % sets``. One set serves all trials; as many sets as trials serve one each.
        epochs: passes over the data. Each takes ``n // batch_size`` minibatches in a new order and
            leaves out the remainder, which is another one every time.
        batch_size: examples per step; the whole set if it has no more.
        seed: of everything random.
        rows: ``(folds, m)`` which examples of its set a trial trains on: trial ``t`` on those of
            fold ``t % folds``, by default on all. Folds that have fewer than m end in -1. All take
            as many minibatches as the smallest; the larger leave out more at random.
        steps_per_call: minibatches per compiled call at most, so how often ``watch`` hears.
        lanes_at_once: how many lanes of a device a step computes together, by `jax.vmap`, while the
            others wait. By default one on a CPU, where a single lane keeps the cores busy and
            stays in their cache, and all on an accelerator. Equal to rounding either way.
        watch: called after every compiled call.
        resume: where to go on, on any number of devices: what ``keep`` was given by a call that had
            the same arguments. It ends with the same bits as if nothing had come between.
        keep: called after every compiled call with what it takes to go on from there.

    Returns:
        The trained parameters and the history, whole on every process.

    Raises:
        ValueError: if there is nothing to do: no lane, no epoch, an empty batch; or ``resume`` is
            of other lanes or another network.
    """
    x, y = (on_all_devices(a) for a in data)
    counts = {"epochs": epochs, "batch_size": batch_size, "steps_per_call": steps_per_call}
    for name, value in {"the number of lanes": len(lanes), **counts}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: give at least 1")
    rows = np.arange(y.shape[1])[None] if rows is None else np.asarray(rows)
    smallest = int((rows >= 0).sum(axis=1).min())
    batch_size = min(batch_size, smallest)
    if lanes_at_once is None:
        lanes_at_once = 1 if jax.default_backend() == "cpu" else len(lanes)

    keys, trials, chosen = shared_out(_lane_arrays(lanes, seed))
    state = _start(task, keys, chosen)
    history: list[Progress] = []
    if resume is not None:
        state, history = _resumed(resume, state, len(lanes)), [*resume.history]
    steps = steps_per_epoch(smallest, batch_size)
    for piece in itertools.islice(_pieces(epochs, steps, steps_per_call), len(history), None):
        state, losses, zeros = _advance(
            task, batch_size, lanes_at_once, state, keys, trials, chosen, piece, rows, x, y
        )
        done = (piece.last_epoch - 1) * steps + piece.last
        progress = Progress(done, *gathered((losses, zeros), len(lanes)))
        history.append(progress)
        if watch:
            watch(progress)
        if keep:  # a copy: the next call overwrites the state
            leaves = [np.array(leaf) for leaf in gathered(jax.tree.leaves(state), len(lanes))]
            keep(Snapshot(leaves, [*history]))
    if jax.process_count() > 1:
        params = jax.tree.map(jnp.asarray, gathered(state.params, len(lanes)))
    else:
        params = jax.tree.map(lambda leaf: leaf[: len(lanes)], state.params)
    return Trained(params, history)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """How many minibatches `train` takes from ``n`` examples: at least one, with all of them."""
    return max(1, n // batch_size)


def share_of_zeros(params: Params, below: float = 0.0) -> jax.Array:
    """Zeros among all entries of all parameters of one network, in percent.

    Args:
        params: the parameters of one network.
        below: 0 counts exact zeros. Otherwise an entry counts if its magnitude is less: 1e-3 is
            by all signs what the paper's tables count.

    Returns:
        A float32 scalar, 0 to 100.
    """
    entries = jnp.concatenate([jnp.abs(leaf).ravel() for leaf in jax.tree.leaves(params)])
    return 100.0 * jnp.mean(entries < below if below else entries == 0)


def on_all_devices(value: Any) -> jax.Array:
    """An array that every device of every process has; it is the same in all of them."""
    return _placed(jnp.asarray(value), PartitionSpec())


def shared_out(lanes: Any) -> Any:
    """Arrays with a leading axis of lanes, dealt out to all devices; the last lane fills up."""

    def placed(leaf: Any) -> jax.Array:
        if spare := -len(leaf) % jax.device_count():
            leaf = np.concatenate([leaf, np.repeat(leaf[-1:], spare, axis=0)])
        return _placed(leaf, PartitionSpec("lanes"))

    return jax.tree.map(placed, lanes)


def _placed(array: Any, spec: PartitionSpec) -> jax.Array:
    """An array that every process has, on the devices of all; through the host only if need be."""
    sharding = NamedSharding(_devices(), spec)
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def map_lanes(one: Callable, lanes: Any, common: Any, at_once: int | None = None) -> Any:
    """``one(lane, common)`` of all lanes: on each device its share, ``at_once`` at a time."""

    def share(lanes: Any, common: Any) -> Any:
        return jax.lax.map(lambda lane: one(lane, common), lanes, batch_size=at_once)

    return jax.shard_map(
        share,
        mesh=_devices(),
        in_specs=(PartitionSpec("lanes"), PartitionSpec()),
        out_specs=PartitionSpec("lanes"),
        check_vma=False,  # a lane's loops start from constants
    )(lanes, common)


def gathered(lanes: Any, number: int) -> Any:
    """What `map_lanes` has made of so many lanes, as NumPy arrays that every process has."""
    if jax.process_count() > 1:
        lanes = multihost_utils.process_allgather(lanes, tiled=True)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:number], lanes)


def _devices() -> Mesh:
    return Mesh(np.array(jax.devices()), ("lanes",))


def _lane_arrays(lanes: Sequence[Lane], seed: int) -> tuple[jax.Array, jax.Array, _Chosen]:
    """Bits of their keys, trials, and what they have chosen."""
    trials = jnp.array([lane.trial for lane in lanes])
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(trials)
    keys = jax.random.key_data(keys)
    radii = jax.tree.map(lambda *c: _rounded_down(np.array(c)), *[lane.c for lane in lanes])
    if all(lane.rate is None for lane in lanes):
        return keys, trials, (radii,)
    return keys, trials, (radii, jnp.array([lane.rate for lane in lanes]))


def _resumed(snapshot: Snapshot, start: _State, lanes: int) -> _State:
    """The state of a snapshot, laid out like the one that training would start from."""
    leaves, structure = jax.tree.flatten(start)
    wanted = [((lanes, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    given = [(leaf.shape, leaf.dtype) for leaf in snapshot.state]
    if given != wanted:
        raise ValueError(
            f"resume holds arrays of {given}, but these lanes of this task have {wanted}: "
            "resume with the arguments that it was kept with"
        )

    return jax.tree.unflatten(structure, shared_out(snapshot.state))


def _rounded_down(c: np.ndarray) -> jax.Array:
    """In float32: a column within the radius is then within c itself."""
    nearest = c.astype(np.float32)
    return jnp.asarray(np.where(nearest > c, np.nextafter(nearest, np.float32(0)), nearest))


class _Piece(NamedTuple):
    """Minibatches ``first`` to ``last`` of each of the epochs ``first_epoch`` to ``last_epoch``.

    Either bound is like those of `range`.
    """

    first_epoch: int
    last_epoch: int
    first: int
    last: int


def _pieces(epochs: int, steps: int, steps_per_call: int) -> Iterator[_Piece]:
    """What one compiled call does, after the other."""
    together = max(1, steps_per_call // steps)
    for epoch in range(0, epochs, together):
        last_epoch = min(epoch + together, epochs)
        for first in range(0, steps, steps_per_call):
            yield _Piece(epoch, last_epoch, first, min(first + steps_per_call, steps))


@partial(jax.jit, static_argnums=0)
def _start(task: Task, keys: jax.Array, chosen: _Chosen) -> _State:
    def one(lane: tuple[jax.Array, _Chosen], _: tuple) -> _State:
        key_data, own = lane
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), 0)
        params = task.init(key, own[0])
        return _State(params, task.optimizer(*own).init(params))

    return map_lanes(one, (keys, chosen), ())


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _advance(
    task: Task,
    batch_size: int,
    lanes_at_once: int,
    state: _State,
    keys: jax.Array,
    trials: jax.Array,
    chosen: _Chosen,
    piece: _Piece,
    rows: jax.Array,
    x: jax.Array,
    y: jax.Array,
) -> tuple[_State, jax.Array, jax.Array]:
    """The minibatches of a piece, in every lane."""

    def one(
        lane: tuple[_State, jax.Array, jax.Array, _Chosen],
        common: tuple[_Piece, jax.Array, jax.Array, jax.Array],
    ) -> tuple:
        state, key_data, trial, settings = lane
        piece, folds, x, y = common
        key = jax.random.wrap_key_data(key_data)
        update = task.optimizer(*settings).update
        fold = folds[trial % folds.shape[0]]
        own = trial % y.shape[0]

        def step(
            epoch: jax.Array, order: jax.Array, i: jax.Array, carry: tuple[_State, jax.Array]
        ) -> tuple:
            (params, opt_state), total = carry
            rows = jax.lax.dynamic_slice_in_dim(order, i * batch_size, batch_size)
            inputs = x[own, rows]
            if task.augment is not None:
                # Orders count the epochs from 1 upwards: no key of theirs is used again.
                of_epoch = jax.random.fold_in(key, -1 - epoch)
                inputs = task.augment(jax.random.fold_in(of_epoch, i), inputs)

            def mean_loss(params: Params) -> jax.Array:
                return task.loss(task.apply(params, inputs), y[own, rows]).mean()

            loss, grads = jax.value_and_grad(mean_loss)(params)
            updates, opt_state = update(grads, opt_state, params)
            return _State(optax.apply_updates(params, updates), opt_state), total + loss

        def one_epoch(epoch: jax.Array, carry: tuple[_State, jax.Array]) -> tuple:
            order = jax.random.permutation(jax.random.fold_in(key, 1 + epoch), fold)
            order = order[jnp.argsort(order < 0)]  # what only fills a fold up comes last
            return jax.lax.fori_loop(piece.first, piece.last, partial(step, epoch, order), carry)

        # The bounds are traced: a last piece that is shorter needs no second program.
        state, total = jax.lax.fori_loop(
            piece.first_epoch, piece.last_epoch, one_epoch, (state, jnp.zeros(()))
        )
        taken = (piece.last_epoch - piece.first_epoch) * (piece.last - piece.first)
        return state, total / taken, share_of_zeros(task.counted(state.params))

    return map_lanes(one, (state, keys, trials, chosen), (piece, rows, x, y), lanes_at_once)
