"""How all tests run: in which processes, with which examples, with what compiled.

- All tests run on all cores. Files and tests that are named run in this process, one after the
  other, so that ``--pdb`` and ``print`` work.
- What XLA compiles is kept in ``.pytest_cache``, where the next run finds it. With ``CI`` set, as
  servers do, only until the run ends: it shows that all programs still compile.
"""

import ctypes
import gc
import os
import shutil
import tempfile

import hypothesis
import jax
import psutil
import pytest

from tests.support import compiling

# The same examples every time, however slow the machine: the fuzzers look for new ones.
hypothesis.settings.register_profile(
    "never by chance",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("never by chance")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Takes all cores, unless a file, a test or a word of names was asked for."""
    paths = (config.invocation_params.dir / name.split("::")[0] for name in config.args)
    named = config.option.keyword or any(path.is_file() for path in paths)
    if config.option.numprocesses is None and not hasattr(config, "workerinput"):
        config.option.numprocesses = 0 if named else "auto"


def pytest_ignore_collect(collection_path, config):
    """With ``-m quick``, imports no file in which nothing is: importing all takes half of it."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return "mark.quick" not in collection_path.read_text() or None
    return None


def pytest_configure(config):
    """Keeps compiled programs for all processes of this run, and for the next one.

    Compiling is most of the tests' time. Children and pytest-xdist's workers inherit the folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    if os.environ.get("CI") or not hasattr(config, "cache"):
        folder = tempfile.mkdtemp(prefix="compiled_")
        config.add_cleanup(lambda: shutil.rmtree(folder))
    else:
        folder = str(config.cache.mkdir("compiled"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def pytest_make_parametrize_id(val, argname):
    """Ids are the same in every process, or pytest-xdist runs nothing."""
    if isinstance(val, bytes):
        raise ValueError(f"{argname} is {val!r:.40}, and bytes may hold the time: name it by ids=")
    return f"{val:.6g}" if isinstance(val, float) else None  # the last digits are the machine's


@pytest.fixture
def x64():
    """Runs a test with 64-bit types enabled."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


# Files whose programs run once, on a few numbers: two thirds of the time that they take to compile
# buys nothing. Everybody's compiler stays where the last bits of a projection are tested, where
# bits are those of another process, and where networks are trained for longer than they compile.
HASTY = {
    "test_bounds.py",
    "test_certificates.py",
    "test_cifar10.py",
    "test_conformance.py",
    "test_depth.py",
    "test_diagnosis.py",
    "test_docs.py",
    "test_faults.py",
    "test_layers.py",
    "test_linen.py",
    "test_metric.py",
    "test_models.py",
    "test_nnx.py",
    "test_optimizers.py",
    "test_pruning.py",
    "test_quick.py",
    "test_regression.py",
    "test_regularizers.py",
    "test_reported.py",
    "test_rescaling.py",
    "test_sample_size.py",
    "test_schedules.py",
    "test_select_c.py",
    "test_sharding.py",
    "test_step_size.py",
    "test_transform.py",
    "test_trial.py",
}


@pytest.fixture(scope="module", autouse=True)
def programs_are_optimized_where_it_matters(request):
    """Compiles the programs of some files in haste."""
    compiling.set_haste(request.path.name in HASTY)


ROOM = 500_000_000  # bytes
GIVE_BACK = getattr(ctypes.CDLL(None), "malloc_trim", int)  # glibc keeps what is freed otherwise


def resident():
    """The bytes that this process holds."""
    return psutil.Process().memory_info().rss


@pytest.fixture(scope="session")
def held():
    """The bytes that were left the last time that programs were dropped."""
    return [resident()]


@pytest.fixture(autouse=True)
def programs_are_dropped(held):
    """Drops what tests have compiled whenever it takes half a gigabyte: all of it takes six."""
    yield
    if resident() > held[0] + ROOM:
        jax.clear_caches()
        gc.collect()
        GIVE_BACK(0)
        held[0] = resident()
