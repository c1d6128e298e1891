import hypothesis
import jax
import pytest

# The same examples every time, however slow the machine: the fuzzers look for new ones.
hypothesis.settings.register_profile(
    "never by chance",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("never by chance")


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
