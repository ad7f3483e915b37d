"""Truth is measured in float64, and programs that run once are compiled in a hurry.

With XLA_FLAGS= and JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment, the tests compile as users'
programs do; that takes several times as long and must give the same verdicts.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax

jax.config.update("jax_enable_x64", True)
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
