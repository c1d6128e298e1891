"""A training that is stopped goes on from its checkpoints as if it had never stopped."""

import pickle
import random
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from l1inf_optax._lanes import Progress, Snapshot, train
from l1inf_optax.experiments.command.checkpoints import open_checkpoints
from l1inf_optax.experiments.command.options import OptionError
from tests.support import children, devices
from tests.support.checkpointed import (
    LANES,
    OPTIONS,
    RUN,
    TASK,
    X,
    Y,
    assert_saved,
    kill_and_compare,
    listing,
    process,
    run,
    run_with,
)

# Orbax forgets the other reads when one fails. They complain when they end: in some later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Stopped(Exception):
    pass


def stop_after(folder, calls, **more):
    """A run that ends in the middle, after so many calls of this process."""
    with open_checkpoints(folder, RUN, **more) as (resume, keep):
        done = 0

        def counted(snapshot):
            nonlocal done
            keep(snapshot)
            done += 1
            if done == calls:
                raise Stopped

        with pytest.raises(Stopped):
            run(resume=resume, keep=counted)


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)
    assert len(got.history) == len(expected.history)
    for one, other in zip(got.history, expected.history, strict=True):
        assert one.step == other.step
        np.testing.assert_array_equal(one.loss, other.loss)
        np.testing.assert_array_equal(one.sparsity, other.sparsity)


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_that_goes_on_is_the_uninterrupted_run(uninterrupted, tmp_path, asynchronous):
    for calls in (2, 1):
        stop_after(tmp_path, calls, asynchronous=asynchronous)
    assert_same(run_with(tmp_path, asynchronous=asynchronous), uninterrupted)
    assert_same(run_with(tmp_path, asynchronous=asynchronous), uninterrupted)  # nothing is left


def damage_by_truncation(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_by_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_a_bit])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(
    uninterrupted, tmp_path, damage
):
    whole = tmp_path / "whole"
    stop_after(whole, 3, asynchronous=False)
    files = [p.relative_to(whole) for p in (whole / "15").rglob("*") if p.stat().st_size]
    data = [p for p in files if "/d/" in p.as_posix() or p.name == "metadata"]
    assert data
    for i, path in enumerate(data):
        folder = tmp_path / str(i)
        shutil.copytree(whole, folder)
        damage(folder / path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with open_checkpoints(folder, RUN, asynchronous=False) as (resume, keep):
                assert len(resume.history) == (2 if caught else 3)
                if i == 0 or not caught:  # bytes that nothing reads may change
                    assert_same(run(resume=resume, keep=keep), uninterrupted)
        if caught:
            assert "step 15 is damaged and will not be used" in str(caught[0].message)


def test_a_forged_array_is_refused(tmp_path, monkeypatch):
    stop_after(tmp_path, 1)
    with open_checkpoints(tmp_path, RUN, asynchronous=False) as (resume, keep):
        forged = Snapshot([leaf + 1 for leaf in resume.state], resume.history)
        forged.history[-1] = forged.history[-1]._replace(step=10)
        monkeypatch.setattr(
            "l1inf_optax.experiments.command.checkpoints._hash", lambda *_: "of others"
        )
        keep(forged)
    monkeypatch.undo()
    with (
        pytest.warns(UserWarning, match="step 10 is damaged .* not those that were saved"),
        open_checkpoints(tmp_path, RUN) as (resume, _),
    ):
        assert resume.history[-1].step == 5


def test_a_checkpoint_whose_run_is_no_run_is_refused(tmp_path):
    with open_checkpoints(tmp_path, ["no", "run"], asynchronous=False) as (_, keep):
        keep(Snapshot([np.ones(2)], [Progress(1, np.ones(2), np.ones(2))]))
    with (
        pytest.warns(UserWarning, match=r"step 1 is damaged .* does not say of which run"),
        pytest.raises(OptionError, match="no checkpoint that can be read"),
        open_checkpoints(tmp_path, RUN),
    ):
        pass


def test_a_folder_that_cannot_be_opened_is_an_error(tmp_path):
    with open_checkpoints(tmp_path, RUN, asynchronous=False) as (_, keep):
        keep(Snapshot([np.ones(2)], [Progress(1, np.ones(2), np.ones(2))]))
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text("[]")
    with (
        pytest.raises(OptionError, match=r"cannot be opened .* name another folder"),
        open_checkpoints(tmp_path, RUN),
    ):
        pass


class Alarm:
    """Raises when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was loaded')",)


def test_a_pickle_in_a_checkpoint_is_never_loaded(tmp_path):
    with open_checkpoints(tmp_path, RUN, asynchronous=False) as (_, keep):
        keep(Snapshot([np.ones(2)], [Progress(1, np.ones(2), np.ones(2))]))
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        path.write_bytes(pickle.dumps(Alarm()))
    assert_all_refused(tmp_path, "step 1 is damaged")


def test_a_folder_without_a_readable_checkpoint_is_an_error(tmp_path):
    stop_after(tmp_path, 1)
    for path in tmp_path.rglob("metadata"):
        path.write_text("{")
    assert_all_refused(tmp_path, "damaged")


def assert_all_refused(folder, warning):
    with (
        pytest.warns(UserWarning, match=warning),
        pytest.raises(OptionError, match="no checkpoint that can be read"),
        open_checkpoints(folder, RUN),
    ):
        pass


def test_checkpoints_of_another_run_are_an_error(tmp_path):
    stop_after(tmp_path, 1)
    with (
        pytest.raises(OptionError, match="of a run with another c; name another folder"),
        open_checkpoints(tmp_path, {**RUN, "c": [0.5]}),
    ):
        pass


def test_a_snapshot_of_other_lanes_is_an_error():
    snapshots = []
    run(keep=snapshots.append)
    with pytest.raises(ValueError, match="resume with the arguments that it was kept with"):
        train(TASK, LANES[:2], (X[None], Y[None]), **OPTIONS, resume=snapshots[0])


def test_a_run_goes_on_on_another_number_of_devices(uninterrupted, tmp_path):
    stop_after(tmp_path / "checkpoints", 3)
    with process(tmp_path / "checkpoints", tmp_path / "out.npz", n=2) as running:
        assert running.wait() == 0
    # For several devices XLA simplifies otherwise what reads the metric off Adam: its last bits
    # differ, and so those of the projection. With SGD, or another metric, none would.
    assert_saved(tmp_path / "out.npz", uninterrupted, rtol=1e-5, atol=1e-6)


def test_killing_a_run_at_any_time_changes_nothing(uninterrupted, tmp_path):
    kill_and_compare(uninterrupted, tmp_path, kills=2)


@contextmanager
def on_interrupt(action):
    """What SIGINT does. A shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, action)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def interruptible():
    with on_interrupt(signal.default_int_handler):
        yield


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_the_checkpoint_that_is_written(tmp_path, monkeypatch):
    def interrupted(manager, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return save(manager, *args, **kwargs)

    save = ocp.CheckpointManager.save
    monkeypatch.setattr(ocp.CheckpointManager, "save", interrupted)
    for step in (5, 10):
        with pytest.raises(KeyboardInterrupt, match=f"goes on from step {step}"):
            run_with(tmp_path)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_a_checkpoint_is_read_does_not_condemn_it(tmp_path, monkeypatch):
    def interrupted(manager, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return restore(manager, *args, **kwargs)

    stop_after(tmp_path, 2)
    restore = ocp.CheckpointManager.restore
    monkeypatch.setattr(ocp.CheckpointManager, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_with(tmp_path)
    monkeypatch.undo()
    with open_checkpoints(tmp_path, RUN) as (resume, _):
        assert resume.history[-1].step == 10


def test_an_interrupt_that_is_ignored_stays_ignored(uninterrupted, tmp_path, monkeypatch):
    def ignored(manager, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return save(manager, *args, **kwargs)

    save = ocp.CheckpointManager.save
    monkeypatch.setattr(ocp.CheckpointManager, "save", ignored)
    with on_interrupt(signal.SIG_IGN):
        assert_same(run_with(tmp_path), uninterrupted)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def command(folder, last):
    """``python -m l1inf_optax.experiments mnist --checkpoint``, with a small run for MNIST's.

    It does not come further than to step ``last``, which it does not keep. An interrupt ends it,
    though the tests may run where interrupts are ignored.
    """
    program = (
        "import pathlib, runpy, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from l1inf_optax.experiments.paper import mnist\n"
        "from tests.support.checkpointed import run_with\n"
        "last = int(sys.argv.pop())\n"
        "def watch(progress):\n"
        "    time.sleep(600 if progress.step == last else 0.1)\n"
        "mnist.run = lambda args: run_with(pathlib.Path(args.checkpoint), watch)\n"
        "sys.argv[1:1] = ['mnist', '--checkpoint']\n"
        "runpy.run_module('l1inf_optax.experiments', run_name='__main__')\n"
    )
    return children.started(
        [sys.executable, "-c", program, folder, last],
        env=devices.environment(1),
        stderr=children.PIPE,
        text=True,
    )


def test_an_interrupted_command_says_where_it_goes_on(uninterrupted, tmp_path):
    rng, steps = random.Random(0), [0]
    for number, last in ((signal.SIGINT, 15), (signal.SIGTERM, 30)):
        before = listing(tmp_path)
        with command(tmp_path, last) as running:
            while listing(tmp_path) == before and running.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            running.send_signal(number)
            said = running.communicate()[1]
        assert running.returncode == 130, said
        steps.append(max(map(int, listing(tmp_path))))  # nothing is left that was not finished
        assert said.endswith(f"interrupted; the same command goes on from step {steps[-1]}\n")
        assert "Traceback" not in said
    assert steps == sorted(set(steps)), "both runs came further"
    assert_same(run_with(tmp_path), uninterrupted)
