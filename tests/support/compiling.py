"""Programs of tests that are compiled in half the time, where it does not matter how fast they are.

They go without LLVM's optimization, and through XLA's older code generator for CPUs, as the newer
one writes MLIR first. JAX has no setting for that, and a flag in the environment is for the whole
process. So this goes around JAX: where that does not work, tests take longer, and nothing else.
"""

from functools import cache

import jax

OLDER_GENERATOR = {"xla_cpu_use_fusion_emitters": "False"}


def set_haste(hasty: bool) -> None:
    """Compile in haste from now on, or as for everybody."""
    if hasty == jax.config.read("jax_disable_most_optimizations"):
        return
    go_around_jax()
    jax.clear_caches()  # nobody uses the programs of the other kind
    jax.config.update("jax_disable_most_optimizations", hasty)


def is_known(options: dict[str, str]) -> bool:
    """Whether this release of XLA has such options."""
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@cache
def go_around_jax() -> None:
    """Give the options to whatever is compiled in haste, once for the process."""
    try:
        from jax._src import compiler

        for_everybody = compiler.get_compile_options
    except (ImportError, AttributeError):
        return
    if not is_known(OLDER_GENERATOR):
        return

    def options(*args, **kwargs):
        chosen = for_everybody(*args, **kwargs)
        if jax.config.read("jax_disable_most_optimizations"):
            chosen.env_option_overrides = [*chosen.env_option_overrides, *OLDER_GENERATOR.items()]
        return chosen

    compiler.get_compile_options = options
