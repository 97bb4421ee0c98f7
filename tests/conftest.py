"""Fixtures shared by the tests, and one cache of compiled programs for all their processes."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="dememo-jax-cache-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

LONG = (
    "test_cli", "test_kill", "test_readme", "test_unlearn_cli", "test_audit_cli", "test_processes", "test_contract",
    "test_golden",
    "test_recipes", "test_devices", "test_sharding", "test_engine", "test_certify", "test_augment", "test_shortcut",
    "test_draws", "test_sharpness", "test_sharpness_cli", "test_estimates",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A process that keeps the programs of every file runs out of memory maps."""
    yield
    jax.clear_caches()


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
