"""Fixtures shared by the tests, and one cache of compiled programs for all their processes."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="dememo-jax-cache-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling well takes longer here than running does, and every process has one core.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=1", "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1",
    ]
)  # fmt: skip

import jax
import pytest

# Whose time is compilation: their programs run a few times, and are not worth optimising.
QUICK = {
    "test_adapters", "test_labels", "test_language", "test_simnpo",
    "test_adversarial", "test_audit_cli", "test_augment", "test_certify", "test_contract", "test_curvature", "test_dampening",
    "test_engine", "test_estimates", "test_experiments", "test_landscape", "test_sharpness", "test_sharpness_cli",
    "test_heads", "test_langevin", "test_newton", "test_noisy", "test_objectives", "test_protect", "test_sharded",
    "test_readme", "test_shadows", "test_shortcut", "test_stream", "test_tangent", "test_training_cli", "test_unlearn_cli",
    "test_nets", "test_pretrained", "test_recipes", "test_recovery", "test_text_cli", "test_text_experiments", "test_train",
    "test_unlearn_recipes", "test_victims",
}  # fmt: skip
LONG = (
    "test_cli", "test_kill", "test_readme", "test_unlearn_cli", "test_audit_cli", "test_processes", "test_contract",
    "test_golden",
    "test_recipes", "test_devices", "test_sharding", "test_engine", "test_certify", "test_augment", "test_shortcut",
    "test_draws", "test_sharpness", "test_sharpness_cli", "test_estimates",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly(request):
    quick = request.module.__name__ in QUICK
    if quick:
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    if quick:
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()  # the next file may want the optimised ones


@pytest.fixture(scope="module")
def no_pictures():
    """They are drawn in other tests."""
    from dememo_jax import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda plot: bytes.fromhex("89504e470d0a1a0a"))
        yield


def pytest_collection_modifyitems(items):
    """Files that take long go first, so that the processes end together."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.module.__name__, len(order)))
