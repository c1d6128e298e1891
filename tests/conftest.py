import jax
import pytest


@pytest.fixture
def x64():
    """Runs a test with 64-bit types enabled."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
