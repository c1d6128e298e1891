import jax
import pytest

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
